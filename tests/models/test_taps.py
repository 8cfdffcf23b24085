"""Taps: which place a name stands for, in networks of any kind, what is read there, and that nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.activations import Tap, batch_statistics, values_at
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.committee import committee
from dfkd_cli.models.registry import build
from dfkd_cli.models.statistics import batch_moments, running_moments
from dfkd_cli.models.taps import Taps, find_taps
from dfkd_cli.objectives.base import ask


def classifier(spec: str, side: int = 32, channels: int = 3) -> Classifier:
    size = (channels, side, side)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return of(build(spec, 10, size), size, spec)


def of(net: nn.Module, size: tuple[int, int, int], spec: str = "test") -> Classifier:
    classes = 10 if spec != "test" else 2
    return Classifier(net, ModelInfo(spec, classes, size, (0.0,) * size[0], (1.0,) * size[0])).eval()


def hooked(made: Classifier) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.modules())


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "side", "stages"),
    [
        ("torchvision:resnet18", 64, {"relu": (64, 32), "layer1": (64, 16), "layer2": (128, 8), "layer3": (256, 4),
                                      "layer4": (512, 2)}),
        ("torchvision:vgg11", 32, {"features.1": (64, 32), "features.4": (128, 16), "features.9": (256, 8),
                                   "features.14": (512, 4), "features.19": (512, 2)}),
        ("timm:resnet18", 64, {"act1": (64, 32), "layer1": (64, 16), "layer2": (128, 8), "layer3": (256, 4),
                               "layer4": (512, 2)}),
        ("lenet5", 32, {"stage1": (6, 14), "stage2": (16, 5)}),
        ("resnet20", 32, {"stage1": (16, 32), "stage2": (32, 16), "stage3": (64, 8)}),
        ("wrn-16-1", 32, {"stage1": (16, 32), "stage2": (32, 16), "stage3": (64, 8)}),
        ("vgg8", 32, {"stage1": (64, 32), "stage2": (128, 16), "stage3": (256, 8), "stage4": (512, 4),
                      "stage5": (512, 4)}),
    ],
)  # fmt: skip
def test_stages_of_networks_that_name_them_and_of_those_that_do_not(spec, side, stages):
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    made = classifier(spec, side)
    taps = Taps(made)
    assert taps.stages == {f"stage{i}": path for i, path in enumerate(stages, start=1)}
    for name, (path, (channels, pixels)) in zip(taps.stages, stages.items(), strict=True):
        assert taps.find(name) == Tap(made.net.get_submodule(path))
        assert taps.shape(name) == (channels, pixels, pixels)
    assert taps.names(["stages", "last.pre", "logits"]) == [*taps.stages, f"stage{len(stages)}.pre", "logits"]
    assert taps.shape("penultimate") == (made.head().in_features,)
    assert taps.shape("logits") == (10,)
    assert hooked(made) == 0


class OneActivation(nn.Sequential):
    """Two resolutions whose maps one module activates."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3, stride=2), act, nn.Flatten(), nn.LazyLinear(10))


@pytest.mark.parametrize("shared", [True, False])
def test_a_stage_whose_last_map_cannot_be_read_is_named(shared, caplog):
    net = OneActivation(nn.ReLU())
    if not shared:
        net[3] = nn.ReLU()
    made = of(net, (3, 8, 8))
    assert Taps(made).names(["stages", "logits"]) == ["stage1", "stage2", "logits"]
    told = [record.getMessage() for record in caplog.records]
    assert [("stage1 is what comes out of 0, before 1" in line) for line in told] == [True] * shared


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:vgg11", "lenet5", "resnet20", "wrn-16-1"])
def test_features_are_what_the_layers_give_and_lead_to_the_logits(spec):
    made, pixels = classifier(spec), torch.rand(3, 3, 32, 32)
    names = [*Taps(made).stages, "penultimate", "logits"]
    outputs = ask(made, pixels, find_taps(made, names))
    assert list(outputs.features) == names
    torch.testing.assert_close(made.head()(outputs.features["penultimate"]), outputs.logits)
    assert torch.equal(outputs.features["logits"], made(pixels))
    assert hooked(made) == 0


def test_a_name_of_several_is_all_of_them():
    made = classifier("resnet8")
    assert list(find_taps(made, ["stages", "last", "penultimate"])) == ["stage1", "stage2", "stage3", "penultimate"]


def test_a_module_path_is_a_name():
    made = classifier("torchvision:resnet18")
    assert find_taps(made, ["layer3.1.conv2"]) == {"layer3.1.conv2": Tap(made.net.layer3[1].conv2)}


@pytest.mark.parametrize("name", ["stage3", "layer1", "", "stage3.pre", "stages.pre"])
def test_an_unknown_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError) as caught:
        Taps(classifier("lenet5")).find(name)
    assert "lenet5 has no features" in caught.value.message
    assert "stage1, stage2, penultimate, logits" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stage1", "last", "stages", "penultimate"])
def test_several_teachers_have_no_stages_in_common(name):
    """Each has its own, and the last one's would be taken for those of all."""
    made = committee([classifier("lenet5"), classifier("lenet5-half")], "logits")
    with pytest.raises(ConfigError, match=f"several teachers together have no features '{name}'"):
        find_taps(made, [name])
    assert find_taps(made, ["members.1.net.stage1"])["members.1.net.stage1"].layer is made.net.members[1].net.stage1
    assert Taps(made).shape("logits") == (10,)


def test_no_linear_layer_no_penultimate():
    made = of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), (1, 8, 8))
    with pytest.raises(ArtifactError, match="no linear layer"):
        Taps(made).find("penultimate")
    assert Taps(made).shape("stage1") == (2, 6, 6)


def test_looking_changes_nothing():
    made = classifier("resnet8").train()
    before = copy.deepcopy(made.state_dict())
    state = torch.get_rng_state()
    Taps(made)
    assert made.training and made.net.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


# -- before the activation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:vgg11", "resnet20"])
def test_before_the_activation_of_a_stage(spec):
    """Also where the activation works in place, and where its module runs twice in a block."""
    made = classifier(spec)
    stages = list(Taps(made).stages)
    outputs = ask(made, torch.rand(2, 3, 32, 32), find_taps(made, [*stages, *(f"{s}.pre" for s in stages)]))
    for stage in stages:
        before = outputs.features[f"{stage}.pre"]
        assert (before < 0).any()
        torch.testing.assert_close(F.relu(before), outputs.features[stage])


def test_before_the_next_activation_where_stages_are_not_activated():
    made = classifier("wrn-16-1")
    names = ["stage1", "stage1.pre", "stage3", "stage3.pre"]
    features = ask(made, torch.rand(2, 3, 32, 32), find_taps(made, names)).features
    torch.testing.assert_close(features["stage1.pre"], made.net.stage2[0].bn1(features["stage1"]))
    torch.testing.assert_close(features["stage3.pre"], made.net.norm[0](features["stage3"]))


@pytest.mark.parametrize(
    ("spec", "norms"),
    [
        ("resnet8", {"stage1.pre": "stage1.0.bn2", "stage2.pre": "stage2.0.bn2", "stage3.pre": "stage3.0.bn2"}),
        ("torchvision:resnet18", {"stage1.pre": "bn1", "stage2.pre": "layer1.1.bn2", "stage3.pre": "layer2.1.bn2"}),
        ("wrn-16-1", {"stage1.pre": "stage2.0.bn1", "stage2.pre": "stage3.0.bn1", "stage3.pre": "norm.0"}),
        ("vgg8", {"stage1.pre": "stage1.1", "stage5.pre": "stage5.1"}),
    ],
)
def test_batch_norm_before_an_activation(spec, norms):
    made = classifier(spec)
    taps = Taps(made)
    assert {name: taps.batch_norm(name) for name in norms} == {n: made.net.get_submodule(p) for n, p in norms.items()}


def test_no_batch_norm_before_an_activation():
    with pytest.raises(ArtifactError, match=r"no BatchNorm with a scale before 'stage2.pre'"):
        Taps(classifier("torchvision:vgg11")).batch_norm("stage2.pre")


def test_attention_is_no_activation():
    made = of(build("torchvision:vit_b_16", 2, (3, 32, 32)), (3, 32, 32))
    with pytest.raises(ConfigError, match="no activation module of its own is found there"):
        Taps(made).find("encoder.layers.encoder_layer_0.ln_1.pre")


def test_an_activation_that_is_used_again_later_is_no_tap():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage1, self.stage2 = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 4, 3, 2)
            self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)

        def forward(self, x):
            x = self.relu(self.stage2(self.relu(self.stage1(x))))
            return self.head(x.mean((2, 3)))

    taps = Taps(of(Reuses(), (1, 9, 9)))
    with pytest.raises(ConfigError, match="no activation module of its own"):
        taps.find("stage1.pre")
    assert taps.shape("stage2.pre") == (4, 1, 1)


def test_values_are_those_before_a_change_in_place():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2))
    made, pixels = of(net, (1, 5, 5)), torch.randn(3, 1, 5, 5)
    outputs = ask(made, pixels, find_taps(made, ["0", "stage1.pre", "stage1"]))
    expected = net[0](pixels)
    assert (expected < 0).any()
    torch.testing.assert_close(outputs.features["0"], expected)
    torch.testing.assert_close(outputs.features["stage1.pre"], expected)
    torch.testing.assert_close(outputs.features["stage1"], expected.relu())


def test_gradients_go_through_taps():
    made = of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)), (1, 5, 5))
    outputs = ask(made, torch.randn(3, 1, 5, 5), find_taps(made, ["stage1.pre"]))
    outputs.features["stage1.pre"].sum().backward()
    assert made.net[0].weight.grad.abs().sum() > 0
    assert made.net[3].weight.grad is None


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_are_gone_however_the_block_ends():
    made = classifier("lenet5", channels=1)
    taps = find_taps(made, ["stage1", "penultimate"])
    with pytest.raises(ZeroDivisionError), values_at(taps):
        assert hooked(made) == 2
        raise ZeroDivisionError
    assert hooked(made) == 0
    with pytest.raises(RuntimeError):
        ask(made, torch.rand(1, 7, 32, 32), taps)  # the network itself fails
    assert hooked(made) == 0


def test_without_names_nothing_is_hooked_and_nothing_is_run():
    made, ran = classifier("lenet5", channels=1), []
    made.net.register_forward_hook(lambda *_: ran.append(hooked(made)))
    assert find_taps(made, []) == {}
    assert ran == []
    assert ask(made, torch.rand(1, 1, 32, 32), {}).features == {}
    assert ran == [1]  # this test's own


# -- the teacher's mode ------------------------------------------------------------------------------------------------


def test_batch_statistics_are_used_and_not_learned():
    made, pixels = classifier("resnet8").freeze(), 3 * torch.rand(16, 3, 32, 32)
    before = copy.deepcopy(made.state_dict())
    learning = copy.deepcopy(made)
    expected = learning.net.train()(pixels)
    calm = made(pixels)
    with pytest.raises(ZeroDivisionError), batch_statistics(made):
        torch.testing.assert_close(made(pixels), expected)
        raise ZeroDivisionError
    assert not torch.allclose(expected, calm, atol=1e-3)
    assert torch.equal(made(pixels), calm)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert not any(module.training for module in made.modules())


class Shared(nn.Module):
    """One activation module for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.relu, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(4, 2)

    def forward(self, x):
        for conv in self.convs:
            x = self.pool(self.relu(conv(x)))
        return self.fc(x.mean((2, 3)))


def test_stages_of_a_network_with_one_activation_are_different_values():
    made = of(Shared(), (3, 16, 16))
    taps = Taps(made)
    features = ask(made, torch.rand(2, 3, 16, 16), find_taps(made, taps.stages)).features
    assert [features[name].shape[2] for name in taps.stages] == [16, 8, 4]


class Blocks(nn.Module):
    """Blocks that give a tuple, and a norm that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.block = nn.Identity()
        self.block.forward = lambda x: (x * 2, None)

    def forward(self, x):
        return self.fc(self.block(self.bn(input=self.conv(x)))[0].mean((2, 3)))


def test_tuples_and_keywords_are_read_too():
    made = of(Blocks(), (3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    taps = {**find_taps(made, ["block"]), "norm": Tap(made.net.bn, before=True)}
    with values_at(taps) as values, batch_moments(made) as seen:
        made(images)
    normed = made.net.bn(made.net.conv(images))
    torch.testing.assert_close(values["block"], 2 * normed)
    torch.testing.assert_close(values["norm"], made.net.conv(images))
    torch.testing.assert_close(seen["bn"].mean, made.net.conv(images).mean((0, 2, 3)))


class ActivatedNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def test_a_norm_that_holds_its_activation():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.Conv2d(4, 5, 3, stride=2), ActivatedNorm(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    taps = Taps(of(net, (3, 16, 16)))
    assert [taps.batch_norm(f"{stage}.pre") for stage in taps.stages] == [net[1], net[3]]


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 4, size) for size in (1, 3, 5))
        self.bn, self.fc = nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 2)  # keeps the mean over its runs

    def forward(self, x):
        return self.fc(sum(self.bn(convolution(x)).mean((2, 3)) for convolution in self.convolutions))


def test_a_norm_that_runs_several_times_sees_what_it_records():
    made = of(SharedNorm(), (3, 8, 8))
    with batch_moments(made, correction=1) as seen, running_moments(made) as total:
        for seed in (0, 1):
            images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            made(images)
            if seed == 0:
                total.clear()
    made.train()(images)
    norm = made.net.bn
    torch.testing.assert_close(seen["bn"].mean, norm.running_mean)  # of the latest pass alone
    torch.testing.assert_close(seen["bn"].variance, norm.running_var)
    torch.testing.assert_close(total["bn"].mean.float(), norm.running_mean)
    counts = [2 * side**2 for side in (8, 6, 4)]
    runs = total["bn"].runs.values()
    assert [run.count for run in runs] == counts
    unbiased = [run.variance * n / (n - 1) for run, n in zip(runs, counts, strict=True)]
    torch.testing.assert_close((sum(unbiased) / 3).float(), norm.running_var)
