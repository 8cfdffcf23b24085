"""Networks: architecture, and the words that name one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_oracles import convolved
from stand_ins import classifier
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.layers import FirstConv2d, HalvingMaxPool, ResponseNorm
from dfkd_cli.models.registry import build

BUILT_IN = [
    "lenet5", "lenet5-half", "lenet5-half-dafl", "alexnet", "alexnet-half",
    "resnet8", "resnet14", "resnet20", "resnet26", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4",
    "resnet32x4",
    "plain8", "plain20", "resnet18", "resnet34", "wrn-16-1", "wrn-40-2", "vgg8", "vgg11", "vgg13", "vgg16",
]  # fmt: skip


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# --- architecture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "classes", "size", "expected"),
    [
        ("lenet5", 10, (1, 32, 32), 156 + 2416 + 48120 + 10164 + 850),
        ("lenet5-half", 10, (1, 32, 32), 78 + 608 + 24120 + 10164 + 850),
        ("lenet5-half-dafl", 10, (1, 32, 32), 78 + 608 + 12060 + 2562 + 430),
        ("vgg8", 100, (3, 32, 32), 1792 + 73856 + 295168 + 1180160 + 2359808 + 2 * 1472 + 51300),
        # As published: RepDistiller's logs, and the common 3x3-stem ResNets for CIFAR-10.
        ("resnet20", 100, (3, 32, 32), 278_324),
        ("plain20", 100, (3, 32, 32), 278_324 - (16 * 32 + 2 * 32) - (32 * 64 + 2 * 64)),  # less two shortcuts
        ("resnet8x4", 100, (3, 32, 32), 1_233_540),
        ("wrn-16-2", 100, (3, 32, 32), 703_284),
        ("wrn-40-2", 100, (3, 32, 32), 2_255_156),
        ("resnet18", 10, (3, 32, 32), 11_173_962),
        ("resnet34", 10, (3, 32, 32), 21_282_122),
    ],
)
def test_parameter_count(spec, classes, size, expected):
    assert parameters(build(spec, classes, size)) == expected


def test_lenet_is_two_convolutions_and_three_layers_between_which_nothing_is_negative():
    net = build("lenet5-half", 10, (2, 16, 20)).double()
    images = torch.randn(3, 2, 16, 20, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}
    maps = images.numpy()
    for stage in ("stage1.0", "stage2.0"):
        maps = np.maximum(convolved(maps, weights[f"{stage}.weight"], weights[f"{stage}.bias"], 1, 0), 0)
        maps = maps.reshape(*maps.shape[:2], maps.shape[2] // 2, 2, maps.shape[3] // 2, 2).max((3, 5))
    rows = maps.reshape(3, -1)
    for layer in ("fc1.0", "fc2.0"):
        rows = np.maximum(rows @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"], 0)
    expected = rows @ weights["head.weight"].T + weights["head.bias"]
    np.testing.assert_allclose(net(images).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2)])
def test_pooling_gives_the_same_bits_in_the_same_layout(layout, size):
    images = torch.randn(3, 5, *size).to(memory_format=layout)
    images[0, 0, 0, 0], images[1, 1, 1, 1] = float("nan"), -float("inf")
    library = nn.MaxPool2d(2)(images)
    pooled = HalvingMaxPool()(images)
    assert torch.equal(pooled.nan_to_num(99.0), library.nan_to_num(99.0))
    assert pooled.shape == library.shape
    assert pooled.stride() == library.stride()
    with_gradients = HalvingMaxPool()(images.requires_grad_())
    assert torch.equal(with_gradients.nan_to_num(99.0), library.nan_to_num(99.0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2)])
def test_pooling_gives_the_same_gradients_also_where_pixels_are_equal(layout, size):
    images = torch.randint(3, (3, 5, *size)).float().to(memory_format=layout).requires_grad_()
    weights = torch.randn(3, 5, size[0] // 2, size[1] // 2)
    expected, given = (
        torch.autograd.grad((pool(images) * weights).sum(), images)[0] for pool in (nn.MaxPool2d(2), HalvingMaxPool())
    )
    assert torch.equal(given, expected)
    assert given.stride() == images.stride()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels, kernel, padding", [(1, 5, 0), (1, 3, 1), (1, 3, 2), (2, 3, 1)])
def test_the_first_convolution_has_the_gradients_of_any_other(channels, kernel, padding, layout, bias):
    layer = FirstConv2d(channels, 4, kernel, padding=padding, bias=bias).double().to(memory_format=layout)
    library = nn.Conv2d(channels, 4, kernel, padding=padding, bias=bias).double().to(memory_format=layout)
    library.load_state_dict(layer.state_dict())
    images = torch.randn(3, channels, 9, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    for with_images, with_parameters in ((True, False), (True, True), (False, True)):
        results = []
        for convolution in (layer, library):
            inputs = [images] * with_images + list(convolution.parameters()) * with_parameters
            output = convolution(images)
            results.append([output, *torch.autograd.grad(output.pow(3).sum(), inputs)])
        for given, expected in zip(*results, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels, size", [(7, 5), (7, 4), (3, 5), (1, 1)])
def test_response_norm_is_that_of_the_library(channels, size, layout):
    images = 3 * torch.randn(2, channels, 5, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    results = []
    for layer in (ResponseNorm(size, alpha=0.3, k=1.5), nn.LocalResponseNorm(size, 0.3, 0.75, 1.5)):
        output = layer(images)
        results.append([output, *torch.autograd.grad(output.pow(3).sum(), images)])
    for given, expected in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    x = images.detach().numpy()
    sums = [np.square(x)[:, max(c - size // 2, 0) : c + (size - 1) // 2 + 1].sum(1) for c in range(channels)]
    np.testing.assert_allclose(results[0][0].detach(), x * (1.5 + 0.3 / size * np.stack(sums, 1)) ** -0.75, rtol=1e-12)


def test_response_norm_under_autocast_keeps_the_precision_of_its_images():
    images = 3 * torch.randn(2, 16, 6, 6)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = images.bfloat16().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = ResponseNorm(5, alpha=0.3)(inputs)
            (gradient,) = torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=True)
            results.append([output, gradient, *torch.autograd.grad(gradient.pow(2).sum(), inputs)])
        assert output.dtype is dtype
    for given, expected in zip(*results, strict=True):
        assert (given.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "layer, library",
    [(HalvingMaxPool(), nn.MaxPool2d(2)), (ResponseNorm(5, 0.3, k=1.5), nn.LocalResponseNorm(5, 0.3, 0.75, 1.5))],
)
def test_gradients_of_quick_layers_have_the_gradients_of_the_librarys(layer, library):
    images = 3 * torch.randn(2, 4, 5, 7, dtype=torch.float64)
    results = []
    for function in (layer, library):
        inputs = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(inputs).pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(gradient.pow(2).sum(), inputs)[0])
    assert results[1].any()
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_alexnet_parameter_count_by_layer():
    def count(f, hidden):
        convolutions = [(5, 3, f[0]), (5, f[0], f[1]), (3, f[1], f[2]), (3, f[2], f[3]), (3, f[3], f[4])]
        linears = [(9 * f[4], hidden[0]), (hidden[0], hidden[1]), (hidden[1], 10)]  # 32 -> 15 -> 7 -> 3 pixels
        norms = 2 * (sum(f) + sum(hidden))
        return sum(k * k * i * o + o for k, i, o in convolutions) + sum(i * o + o for i, o in linears) + norms

    full, half = (48, 128, 192, 192, 128), (24, 64, 96, 96, 64)
    assert parameters(build("alexnet", 10, (3, 32, 32))) == count(full, (512, 256))
    assert parameters(build("alexnet-half", 10, (3, 32, 32))) == count(half, (256, 128))


@pytest.mark.slow
@pytest.mark.parametrize("spec", BUILT_IN)
@pytest.mark.parametrize(("size", "classes"), [((1, 32, 32), 7), ((3, 32, 32), 10), ((2, 24, 40), 3)])
def test_every_network_takes_any_channels_classes_and_shape(spec, size, classes):
    net = build(spec, classes, size)
    assert net(torch.rand(2, *size)).shape == (2, classes)
    assert not any(getattr(module, "inplace", False) for module in net.modules())


@pytest.mark.parametrize("spec", BUILT_IN)
def test_head_is_found_and_named(spec):
    model = classifier(spec=spec)
    assert model.head() is model.net.head


@pytest.mark.parametrize(
    ("spec", "channels", "sides"),
    [
        ("resnet20", [16, 16, 32, 64], [32, 32, 16, 8]),
        ("resnet8x4", [32, 64, 128, 256], [32, 32, 16, 8]),
        ("resnet18", [64, 64, 128, 256, 512], [32, 32, 16, 8, 4]),
        ("wrn-16-2", [16, 32, 64, 128], [32, 32, 16, 8]),
    ],
)
def test_residual_stages(spec, channels, sides):
    net, x = build(spec, 10, (3, 32, 32)), torch.rand(2, 3, 32, 32)
    shapes = []
    for name in ["stem", *(f"stage{i}" for i in range(1, len(channels)))]:
        x = getattr(net, name)(x)
        shapes.append(x.shape)
    assert [(c, h, w) for _, c, h, w in shapes] == [(c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert (x.min() < 0) == spec.startswith("wrn")  # pre-activation stages end before the ReLU


@pytest.mark.parametrize("spec", ["plain8", "resnet8"])
def test_plain_networks_have_no_way_around_a_block(spec):
    net = build(spec, 10, (3, 32, 32)).eval()
    nn.init.zeros_(net.stage1[0].bn2.weight)  # its bias is 0
    logits = net(torch.rand(2, 3, 32, 32))
    assert torch.equal(*logits) == (spec == "plain8")


def test_vgg_pools_large_images_once_more():
    for side, expected in [(32, 4), (64, 4)]:
        net, x = build("vgg8", 10, (3, side, side)), torch.rand(1, 3, side, side)
        for i in range(1, 6):
            x = getattr(net, f"stage{i}")(x)
        assert x.shape == (1, 512, expected, expected)


def test_residual_blocks_end_in_a_relu_that_sees_the_sum():
    net = build("resnet8", 10, (3, 8, 8)).eval()
    block, x = net.stage2[0], torch.randn(2, 16, 8, 8)
    total = block.bn2(block.conv2(block.bn1(block.conv1(x)).clamp(min=0))) + block.shortcut(x)
    torch.testing.assert_close(block(x), total.clamp(min=0))
    seen = []
    block.relu2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(x)
    torch.testing.assert_close(seen[0], total)  # not overwritten in place


def test_wide_residual_blocks_are_preactivated():
    net = build("wrn-10-2", 10, (3, 8, 8)).eval()
    block, x = net.stage1[0], torch.randn(2, 16, 8, 8)
    active = block.bn1(x).clamp(min=0)
    expected = block.conv2(block.bn2(block.conv1(active)).clamp(min=0)) + block.shortcut(active)
    torch.testing.assert_close(block(x), expected)


def test_alexnet_follows_tensorflow():
    net = build("alexnet", 10, (3, 32, 32))
    assert [net.get_submodule(f"stage{i}")[0].bias.mean().item() for i in range(1, 6)] == [0, 1, 0, 1, 1]
    assert 0.009 < net.stage2[0].weight.std() < 0.011
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, 1e-3)] * 7
    x = np.random.default_rng(0).normal(scale=30, size=(1, 9, 2, 2))
    expected = np.empty_like(x)
    for c in range(9):  # tf.nn.local_response_normalization(depth_radius=2, bias=1, alpha=1e-4, beta=0.75)
        expected[:, c] = x[:, c] / (1 + 1e-4 * (x[:, max(0, c - 2) : c + 3] ** 2).sum(1)) ** 0.75
    lrn = next(m for m in net.modules() if isinstance(m, nn.LocalResponseNorm))
    np.testing.assert_allclose(lrn(torch.from_numpy(x)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("spec", "minimum"), [("lenet5", 16), ("alexnet", 15), ("vgg8", 8)])
def test_too_small_images_are_refused(spec, minimum):
    build(spec, 10, (1, minimum, minimum))
    with pytest.raises(ConfigError, match=f"at least {minimum}x{minimum} pixels, got {minimum}x{minimum - 1}"):
        build(spec, 10, (1, minimum, minimum - 1))


# --- specs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet6", "did you mean 'lenet5'"),
        ("resnet200", "did you mean 'resnet20'"),
        ("wrn-17-2", "depth 10, 16, 22"),
        ("wrn-16-0", "width 1, 2"),
        ("wrn-16-2x", "unknown model"),
        ("torchvision:resnt18", "resnet18"),
    ],
)
def test_unknown_names_are_usage_errors(spec, message):
    with pytest.raises(ConfigError, match=message):
        build(spec, 10, (3, 32, 32))


def test_torchvision():
    model = classifier(spec="torchvision:resnet18", size=(3, 32, 32), classes=7)
    assert model.head() is model.net.fc
    with pytest.raises(ConfigError, match=r"cannot run on 1x32x32 images.*3 channels"):
        build("torchvision:resnet18", 7, (1, 32, 32))


def test_timm_gets_channels_and_the_image_size_where_it_is_fixed():
    pytest.importorskip("timm")
    for spec in ("timm:vit_tiny_patch16_224", "timm:resnet10t"):
        assert build(spec, 7, (1, 32, 32))(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ConfigError, match="closest names: timm:resnet18"):
        build("timm:resnt18", 7, (3, 32, 32))


def test_timm_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'dfkd\[timm\]'"):
        build("timm:resnet18", 10, (3, 32, 32))


@pytest.mark.parametrize("source", ["./user_net.py", "user_net"])
def test_user_factory(user_code, source):
    net = build(f"{source}:make", 5, (3, 8, 8), allow_code=True)
    assert net[1].weight.shape == (5, 192)
    assert build(f"{source}:fixed", 4, (3, 8, 8), allow_code=True)[1].out_features == 4
    for factory in ("Zoo.make", "Zoo.Inner.make"):
        assert build(f"{source}:{factory}", 4, (3, 8, 8), allow_code=True)[1].out_features == 4


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("fixed", ArtifactError, r"gives \(1, 4\).*instead of logits \(1, 5\)"),
        ("broken", ConfigError, "ValueError: two lines"),
        ("text", ConfigError, "returned str"),
        ("absent", ConfigError, "absent"),
        ("Zoo.absent", ConfigError, r"no function Zoo\.absent"),
        ("fixed.absent.make", ConfigError, r"no function fixed\.absent\.make"),
        ("square", ConfigError, r"unsupported operand.*input_size, which is given as \(channels, height, width\)"),
        ("net", ConfigError, "user_net.py:net: is a network, not a function that makes one -- name a function"),
    ],
)
def test_user_factory_that_does_not_fit(user_code, factory, error, message):
    with pytest.raises(error, match=message):
        build(f"./user_net.py:{factory}", 5, (3, 8, 8), allow_code=True)


def test_user_code_needs_permission(user_code):
    (user_code / "spy.py").write_text("open('ran', 'w')\ndef make(): ...\n")
    for spec in ("./spy.py:make", "spy:make"):
        with pytest.raises(ArtifactError, match="--allow-code"):
            build(spec, 5, (3, 8, 8))
    assert not (user_code / "ran").exists()


def test_user_code_imports_what_lies_in_the_working_directory(user_code):
    """As for ``python -m``, and not only what lies beside the file, which comes first."""
    for folder in ("nets", "parts"):
        (user_code / folder).mkdir()
    (user_code / "parts/size.py").write_text("CLASSES = 3\n")
    (user_code / "nets/helper.py").write_text("from torch import nn\nclasses = 4\nlinear = nn.Linear\n")
    (user_code / "nets/net.py").write_text(
        "from torch import nn\nfrom parts.size import CLASSES\nimport helper\n"
        "def make():\n    import parts.size\n    return nn.Sequential(nn.Flatten(), helper.linear(4, CLASSES))\n"
        "def other(): return nn.Sequential(nn.Flatten(), nn.Linear(4, helper.classes))\n"
    )
    before = [*sys.path]
    for _ in range(2):
        assert build("nets/net.py:make", 3, (1, 2, 2), allow_code=True)[1].out_features == 3
        assert build("nets/net.py:other", 4, (1, 2, 2), allow_code=True)[1].out_features == 4
        assert build("./user_net.py:make", 5, (1, 2, 2), allow_code=True)[1].out_features == 5
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("nets/deep/net.py", "nets.deep.net:make"), ("./net.py", "here.net:make, in {}"), ("{}/o/net.py", "o.net:make")],
)
def test_a_relative_import_is_told_to_be_of_a_package(tmp_path, monkeypatch, spec, hint):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = Path(spec.format(tmp_path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("layers.py").write_text("from torch.nn import Flatten, Linear, Sequential\n")
    path.write_text("from .layers import *\ndef make(): return Sequential(Flatten(), Linear(4, 3))\n")
    with pytest.raises(ConfigError) as refused:
        build(f"{path}:make", 3, (1, 2, 2), allow_code=True)
    assert refused.value.hint.startswith(f"name it as a package: {hint.format(tmp_path)}")
    if spec != "nets/deep/net.py":
        monkeypatch.chdir(tmp_path)
    package = refused.value.hint.removeprefix("name it as a package: ").partition(",")[0]
    assert build(package, 3, (1, 2, 2), allow_code=True)[1].out_features == 3


ARGUMENTS = """
import argparse
from torch import nn
parser = argparse.ArgumentParser()
parser.add_argument("--classes", type=int, default=3)
{more}
args = parser.parse_args()
def make(): return nn.Sequential(nn.Flatten(), nn.Linear(4, args.classes))
"""


def test_arguments_are_none_of_the_users_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["dfkd", "synthesize", "--method", "noise"]
    monkeypatch.setattr(sys, "argv", words)
    Path("net.py").write_text(ARGUMENTS.format(more=""))
    assert build("./net.py:make", 3, (1, 2, 2), allow_code=True)[1].out_features == 3
    assert sys.argv is words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            ARGUMENTS.format(more='parser.add_argument("data")'),
            "ends the program when it is imported: 2 -- put what parses arguments under if __name__ ==",
        ),
        ("raise SystemExit('no GPU')", "ends the program when it is imported: no GPU -- put"),
        (
            "import sys\ndef make(): sys.exit('no GPU')",
            "ends the program when it is called: no GPU -- parse no arguments",
        ),
    ],
)
def test_code_that_ends_the_program_is_refused(tmp_path, monkeypatch, cli, code, words):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(code)
    argv = [*sys.argv]
    command = ("synthesize", "--method", "noise", "--teacher", "./net.py:make", "--weights", "net.py")
    status, _, err = cli(*command, "--input-size", "1", "2", "2", "--num-classes", "3")
    assert (status, words in err) == (2, True), err
    assert sys.argv == argv
