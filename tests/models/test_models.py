"""Networks: architecture, normalisation, the layer that gives the logits, weights from files, model directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models import cifar_resnet, lenet
from dfkd_cli.models.classifier import Classifier, ModelInfo, probe
from dfkd_cli.models.directory import identity, load_model, save_model
from dfkd_cli.models.layers import FirstConv2d, HalvingMaxPool
from dfkd_cli.models.registry import build
from dfkd_cli.models.weights import load_weights

BUILT_IN = [
    "lenet5", "lenet5-half", "lenet5-half-dafl", "alexnet", "alexnet-half",
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "resnet18", "resnet34", "wrn-16-1", "wrn-40-2", "vgg8", "vgg11", "vgg13",
]  # fmt: skip


def classifier(net: nn.Module | None = None, spec: str = "lenet5", size=(1, 32, 32), classes: int = 10) -> Classifier:
    channels = size[0]
    info = ModelInfo(spec, classes, size, mean=(0.25,) * channels, std=(0.5,) * channels)
    return Classifier(net or build(spec, classes, size), info)


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
        ("resnet8x4", 100, (3, 32, 32), 1_233_540),
        ("wrn-16-2", 100, (3, 32, 32), 703_284),
        ("wrn-40-2", 100, (3, 32, 32), 2_255_156),
        ("resnet18", 10, (3, 32, 32), 11_173_962),
        ("resnet34", 10, (3, 32, 32), 21_282_122),
    ],
)
def test_parameter_count(spec, classes, size, expected):
    assert parameters(build(spec, classes, size)) == expected


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


def test_alexnet_parameter_count_by_layer():
    def count(f, hidden):
        convolutions = [(5, 3, f[0]), (5, f[0], f[1]), (3, f[1], f[2]), (3, f[2], f[3]), (3, f[3], f[4])]
        linears = [(9 * f[4], hidden[0]), (hidden[0], hidden[1]), (hidden[1], 10)]  # 32 -> 15 -> 7 -> 3 pixels
        norms = 2 * (sum(f) + sum(hidden))
        return sum(k * k * i * o + o for k, i, o in convolutions) + sum(i * o + o for i, o in linears) + norms

    full, half = (48, 128, 192, 192, 128), (24, 64, 96, 96, 64)
    assert parameters(build("alexnet", 10, (3, 32, 32))) == count(full, (512, 256))
    assert parameters(build("alexnet-half", 10, (3, 32, 32))) == count(half, (256, 128))


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


FACTORY = """
from torch import nn
import helper
def make(num_classes, input_size):
    c, h, w = input_size
    return nn.Sequential(nn.Flatten(), helper.linear(c * h * w, num_classes))
def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
def broken(num_classes):
    raise ValueError("two\\nlines")
def text():
    return "no module"
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch) -> Path:
    (tmp_path / "user_net.py").write_text(FACTORY)
    (tmp_path / "helper.py").write_text("from torch import nn\nlinear = nn.Linear\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("source", ["./user_net.py", "user_net"])
def test_user_factory(user_code, source):
    net = build(f"{source}:make", 5, (3, 8, 8), allow_code=True)
    assert net[1].weight.shape == (5, 192)
    assert build(f"{source}:fixed", 4, (3, 8, 8), allow_code=True)[1].out_features == 4


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("fixed", ArtifactError, r"gives \(1, 4\).*instead of logits \(1, 5\)"),
        ("broken", ConfigError, "ValueError: two lines"),
        ("text", ConfigError, "returned str"),
        ("absent", ConfigError, "absent"),
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


# --- classifier -----------------------------------------------------------------------------------------------------


def test_normalisation_and_logits():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    net = build("resnet8", 4, (3, 8, 8)).eval()
    model = Classifier(net, ModelInfo("resnet8", 4, (3, 8, 8), mean, std)).eval()
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(model.normalise(torch.from_numpy(pixels)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(torch.from_numpy(pixels)), net(torch.from_numpy(expected).float()))
    assert all(key.startswith("net.") for key in model.state_dict())


def test_no_normalisation_costs_nothing():
    model = Classifier(nn.Identity(), ModelInfo("x", 1, (1, 2, 2), (0.0,), (1.0,)))
    pixels = torch.rand(1, 1, 2, 2)
    assert model.normalise(pixels) is pixels


def test_freeze_survives_a_training_parent():
    model = classifier().freeze()
    nn.ModuleList([model]).train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.num_parameters == 61_706


def test_thawed_is_as_before_it_was_frozen():
    model = classifier()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    layers[0].eval()
    layers[1].requires_grad_(False)

    def state():
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], model.frozen

    before = state()
    model.freeze().freeze()
    assert state() != before
    model.thaw()
    assert state() == before
    assert model.train().training


def test_batch_norms_are_those_with_statistics():
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.BatchNorm1d(8)
    )
    assert classifier(net).batch_norms() == [net[0], net[3]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 0}, "positive whole numbers"),
        ({"input_size": (3, 8)}, "positive whole numbers"),
        ({"mean": (0.5,)}, "3-channel images need 3"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"classes": ("cat",)}, "1 class names for 2 classes"),
    ],
)
def test_model_info_is_checked(values, message):
    good = {"spec": "x", "num_classes": 2, "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with pytest.raises(ConfigError, match=message):
        ModelInfo(**good | values)


def test_head_may_be_a_convolution_that_is_flattened():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 10, 1), nn.Flatten(), nn.Dropout())
    assert classifier(net).head() is net[2]


@pytest.mark.parametrize("last", [nn.ReLU(), nn.ReLU(inplace=True), nn.LogSoftmax(1)])
def test_head_must_give_the_logits_themselves(last):
    with pytest.raises(ArtifactError, match="no linear layer gives the logits"):
        classifier(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), last)).head()


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("end", [nn.Identity(), Fails()])
def test_probe_leaves_no_trace(end):
    net = nn.Sequential(build("resnet8", 10, (1, 32, 32)), nn.Dropout(), end).train()
    net[0].stage1.eval()  # a mixed mode must come back too
    model = classifier(net)
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.random.get_rng_state()
    if isinstance(end, Fails):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.head()
    else:
        assert model.head() is net[0].head
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_probe_keeps_the_random_state_of_a_random_network():
    class Noisy(nn.Module):
        def forward(self, x):
            return torch.randn(1, 3)

    random = torch.random.get_rng_state()
    assert probe(Noisy(), (1, 4, 4)).shape == (1, 3)
    assert torch.equal(torch.random.get_rng_state(), random)


# --- weights from files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return build("resnet8", 10, (1, 8, 8))


def target(classes: int = 10) -> nn.Module:
    return cifar_resnet.build("resnet8", classes, (1, 8, 8))


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"model_state_dict": prefixed(s, "module."), "optimizer": {"lr": 0.1}},
        lambda s: {"net": prefixed(s, "_orig_mod.")},
        lambda s: {"state_dict": prefixed(s, "model._orig_mod."), "hyper_parameters": {"lr": 0.1}},
        lambda s: prefixed(s, "module.net."),
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_wrappers_and_prefixes_are_removed(tmp_path, source, wrap, suffix):
    torch.save(wrap(source.state_dict()), tmp_path / f"w{suffix}")
    net = target()
    assert not same(net, source)
    load_weights(net, tmp_path / f"w{suffix}")
    assert same(net, source)


def test_safetensors_weights(tmp_path, source):
    safetensors.torch.save_file(prefixed(source.state_dict(), "module."), tmp_path / "w.safetensors")
    net = target()
    load_weights(net, tmp_path / "w.safetensors")
    assert same(net, source)


def test_prefix_that_belongs_to_the_network_stays(tmp_path):
    net = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(prefixed(net.state_dict(), "module."), tmp_path / "w.pt")
    other = nn.ModuleDict({"model": nn.Linear(2, 2)})
    load_weights(other, tmp_path / "w.pt")
    assert same(other, net)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, source, zipped):
    content = {**source.state_dict(), "x": Malicious(tmp_path / "ran")}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"carries code.*safetensors"):
        load_weights(target(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_pickled_module_is_refused(tmp_path):
    torch.save(lenet.build("lenet5", 10, (1, 32, 32)), tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match="carries code"):
        load_weights(target(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"hello world\n" * 20, lambda b: b""])
def test_damaged_files(tmp_path, source, suffix, damage):
    file = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), file)
    else:
        safetensors.torch.save_file(source.state_dict(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactError, match="not readable"):
        load_weights(target(), file)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3, "lr": 0.1}, {0: torch.ones(1)}])
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match="holds no state_dict"):
        load_weights(target(), tmp_path / "w.pt")


def test_file_must_exist_and_have_a_known_type(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        load_weights(target(), tmp_path / "w.pt")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(ConfigError, match="unknown type"):
        load_weights(target(), tmp_path / "w.onnx")


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path, source):
    state = source.state_dict()
    del state["stem.0.weight"]
    for i in range(5):
        state[f"extra{i}"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    net = target(classes=7)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load_weights(net, tmp_path / "w.pt")
    message = caught.value.message
    assert "missing stem.0.weight" in message
    assert "unexpected extra0, extra1, extra2 and 2 more" in message
    assert "head.weight (10, 64) instead of (7, 64)" in message
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# --- model directories ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Classifier]:
    size = (1, 8, 8)
    info = ModelInfo("resnet8", 3, size, (0.1,), (0.3,), classes=("a", "b", "ü"))
    model = Classifier(build("resnet8", 3, size), info)
    model(torch.rand(4, *size))  # moves the BatchNorm statistics
    model.eval()
    save_model(tmp_path / "teacher", model, metrics={"top1": 0.5}, provenance={"dataset": "digits"})
    return tmp_path / "teacher", model


def edit(directory: Path, **values) -> None:
    record = json.loads((directory / "model.json").read_text())
    (directory / "model.json").write_text(json.dumps(record | values))


def test_round_trip_is_bit_identical(saved):
    directory, model = saved
    random = torch.random.get_rng_state()
    loaded, record = load_model(directory)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert loaded.info == model.info
    assert same(loaded, model)
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(pixels), model(pixels))
    assert record["metrics"] == {"top1": 0.5}
    assert record["provenance"] == {"dataset": "digits"}
    assert sorted(path.name for path in directory.iterdir()) == ["model.json", "model.safetensors"]
    again = save_model(directory.parent / "copy", loaded, metrics={}, provenance={})
    assert again == identity(record)
    assert again != identity({**record, "mean": [0.9]}), "how the weights are used is part of what a model is"


def test_shared_and_strided_weights_are_stored(tmp_path, user_code):
    (user_code / "tied.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = nn.Parameter(net[1].weight.detach().t())\n"
        "    net[2].weight = net[1].weight\n"
        "    return net\n"
    )
    spec = "./tied.py:make"
    model = classifier(build(spec, 4, (1, 2, 2), allow_code=True), spec, (1, 2, 2), classes=4)
    save_model(tmp_path / "m", model, metrics={}, provenance={})
    with pytest.raises(ArtifactError, match="--allow-code"):
        load_model(tmp_path / "m")
    loaded, _ = load_model(tmp_path / "m", allow_code=True)
    assert same(loaded, model)
    assert loaded.net[1].weight is loaded.net[2].weight


def test_a_flipped_bit_is_noticed(saved):
    weights = saved[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(saved[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "model schema 2"),
        ({"kind": "shards"}, "'shards', not a model"),
        ({"num_classes": 5, "classes": None}, r"head.weight \(3, 64\) instead of \(5, 64\)"),
        ({"num_classes": 5}, "3 class names for 5 classes"),
        ({"num_classes": "3"}, "not a model record"),
        ({"mean": None}, "not a model record"),
        ({"weights": None}, "not a model record"),
        ({"spec": "resnet14"}, "missing stage1.1"),
        ({"spec": "resnet9"}, "unknown model"),
    ],
)
def test_records_that_do_not_hold(saved, values, message):
    edit(saved[0], **values)
    with pytest.raises(ArtifactError, match=message):
        load_model(saved[0])


def test_directories_that_are_none(saved):
    directory, _ = saved
    for path, message in [
        (directory / "absent", "no such directory"),
        (directory.parent, "no model.json"),
        (directory / "model.json", "a file, not a model directory"),
    ]:
        with pytest.raises(ArtifactError, match=message) as caught:
            load_model(path)
        assert caught.value.hint
    (directory / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="incomplete"):
        load_model(directory)
    (directory / "model.json").write_text("hello")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load_model(directory)
