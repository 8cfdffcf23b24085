"""Weights from files: wrappers and prefixes, and what does not fit."""

from __future__ import annotations

import copy
import gzip
import re

import pytest
import safetensors.torch
import torch
import torchvision
from comparisons import same_weights
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError, RunFailed
from dfkd_cli.models import cifar_resnet
from dfkd_cli.models.directory import save_weights
from dfkd_cli.models.names import locate
from dfkd_cli.models.registry import build
from dfkd_cli.models.weights import load_weights, require_tensors
from dfkd_cli.options import ForeignModel
from dfkd_cli.trust import Code


def target(classes: int = 10) -> nn.Module:
    return cifar_resnet.build("resnet8", classes, (1, 8, 8))


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
        lambda s: {"model": {f"{k.partition('.')[0]}._orig_mod.{k.partition('.')[2]}": v for k, v in s.items()}},
        lambda s: {
            "module._fsdp_wrapped_module." + k.replace(".", "._checkpoint_wrapped_module."): v for k, v in s.items()
        },
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_wrappers_and_prefixes_are_removed(tmp_path, source, wrap, suffix):
    torch.save(wrap(source.state_dict()), tmp_path / f"w{suffix}")
    net = target()
    assert not same_weights(net, source)
    load_weights(net, tmp_path / f"w{suffix}")
    assert same_weights(net, source)


def test_safetensors_weights(tmp_path, source):
    safetensors.torch.save_file(prefixed(source.state_dict(), "module."), tmp_path / "w.safetensors")
    net = target()
    load_weights(net, tmp_path / "w.safetensors")
    assert same_weights(net, source)


def test_prefix_that_belongs_to_the_network_stays(tmp_path):
    net = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(prefixed(net.state_dict(), "module."), tmp_path / "w.pt")
    other = nn.ModuleDict({"model": nn.Linear(2, 2)})
    load_weights(other, tmp_path / "w.pt")
    assert same_weights(other, net)


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


def test_file_must_exist_and_be_of_a_known_type(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        load_weights(target(), tmp_path / "w.pt")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(ArtifactError, match="not readable as weights of PyTorch or safetensors"):
        load_weights(target(), tmp_path / "w.onnx")


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page", "download the file itself"),
        (gzip.compress(b"weights"), "compressed by gzip", "unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5", "only weights of PyTorch"),
    ],
    ids=["lfs", "html", "gzip", "hdf5"],  # not the bytes: those of gzip have the time in them
)
def test_files_of_other_kinds_are_named_with_what_brings_the_weights(tmp_path, content, what, hint):
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=what) as refused:
        load_weights(target(), file)
    assert hint in str(refused.value.hint)


@pytest.mark.parametrize("name", ["w.th", "w.pth.tar", "pytorch_model.bin", "W.PTH", "w", "w.safetensors", "w.pt"])
@pytest.mark.parametrize("zipped", [True, False, None])
def test_the_content_decides_not_the_name(tmp_path, source, name, zipped):
    if zipped is None:
        safetensors.torch.save_file(source.state_dict(), tmp_path / name)
    else:
        torch.save(source.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    net = target()
    load_weights(net, tmp_path / name)
    assert same_weights(net, source)


def halves(state):
    """The parts of a network, each in a dictionary of its own."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
        lambda s: {"state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(10)}},
        lambda s: {"weights": prefixed(s, "backbone.")},
        lambda s: {"student": target(7).state_dict(), "teacher": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "ema": torch.ones(3)}},
        lambda s: {"checkpoint": {"networks": [1], "classifier": {"state_dict": prefixed(s, "module.model.")}}},
        halves,
        lambda s: {"state_dict": {**prefixed(s, "teacher."), **prefixed(target(7).state_dict(), "student.")}},
    ],
)
def test_what_lies_beside_the_weights_does_not_count(tmp_path, source, wrap):
    torch.save(wrap(source.state_dict()), tmp_path / "w")
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)


def test_a_prefix_that_the_network_has_and_the_file_lacks(tmp_path, source):
    torch.save({"state_dict": prefixed(source.state_dict(), "net.")}, tmp_path / "w")
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"net": target()})})
    load_weights(wrapped, tmp_path / "w")
    assert same_weights(wrapped["model"]["net"], source)


def test_of_several_that_fit_one_is_named_and_the_user_may_choose(tmp_path, source, caplog):
    other = target()
    content = {"ema": {"shadow": other.state_dict()}, "model": source.state_dict()}
    torch.save(content, tmp_path / "w")
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)
    assert "took model; ema.shadow would fit too: --weights-key" in caplog.text
    for key in ("ema", "ema.shadow"):
        load_weights(net, tmp_path / "w", key)
        assert same_weights(net, other)
        load_weights(net, tmp_path / "w", "model")
    with pytest.raises(ConfigError, match=r"--weights-key emma: not in .*did you mean 'ema'"):
        load_weights(net, tmp_path / "w", "emma")


def test_a_teacher_is_preferred_to_its_student(tmp_path, source):
    both = {"student": target().state_dict(), "teacher": source.state_dict()}
    within = {f"{who}.{key}": value for who, state in both.items() for key, value in state.items()}  # as Lightning's
    for content in (both, {"state_dict": within}):
        torch.save(content, tmp_path / "w")
        net = target()
        load_weights(net, tmp_path / "w")
        assert same_weights(net, source)


def test_files_of_several_are_told_how_they_are_joined(tmp_path, source):
    state = source.state_dict()
    last = {"head.weight": state.pop("head.weight")}
    for suffix, save in ((".bin", torch.save), (".safetensors", safetensors.torch.save_file)):
        files = [tmp_path / f"model-0000{number}-of-00002{suffix}" for number in (1, 2)]
        for file, part in zip(files, (state, last), strict=True):
            save(part, file)
        index = tmp_path / f"model{suffix}.index.json"
        index.write_text('{"weight_map": {}}')
        for named in (files[0], index):
            with pytest.raises(ArtifactError) as caught:
                load_weights(target(), named)
            typed = caught.value.hint.removeprefix("join the several files: ")
            exec(typed, {"torch": torch, "safetensors": safetensors, "FILES": files, "NEW": tmp_path / "whole"})
            net = target()
            load_weights(net, tmp_path / "whole")
            assert same_weights(net, source)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


@pytest.mark.parametrize("prefix", ["", "module."])
def test_tied_weights_are_in_a_file_once(tmp_path, prefix):
    tied, net = Tied(), Tied()
    safetensors.torch.save_model(nn.ModuleDict({"module": tied}) if prefix else tied, tmp_path / "w")
    assert len(safetensors.torch.load_file(tmp_path / "w")) == 3
    load_weights(net, tmp_path / "w")
    assert same_weights(net, tied)
    assert net.encoder.weight is net.decoder.weight


def test_a_file_without_checksums(tmp_path, source):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "w")
    finally:
        torch.serialization.set_crc32_options(True)
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_when_loaded(tmp_path, source, value):
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    state["head.weight"][3, 5] = value
    torch.save(state, tmp_path / "w")
    net = target()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"not finite: head\.weight"):
        load_weights(net, tmp_path / "w")
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_the_nearest_names_and_shapes_stand_side_by_side(tmp_path, source):
    state = dict(source.state_dict())
    state["fc.weight"], state["fc.bias"] = state.pop("head.weight"), state.pop("head.bias")
    torch.save(state, tmp_path / "w")
    with pytest.raises(ArtifactError) as caught:
        load_weights(target(), tmp_path / "w")
    assert "head.weight (10, 64) (nearest there: fc.weight (10, 64))" in caught.value.message
    assert "head.bias (10,) (nearest there: fc.bias (10,))" in caught.value.message


def test_a_prefix_that_file_and_network_have_in_common_is_no_choice(tmp_path, caplog):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    torch.save(net.state_dict(), tmp_path / "w")
    load_weights(net, tmp_path / "w")
    assert not caplog.text


def test_official_weights_with_auxiliary_heads(tmp_path, caplog):
    net = torchvision.models.googlenet(weights=None, num_classes=4, init_weights=False).eval()  # transforms inputs
    net.transform_input = True
    torch.save(net.state_dict(), tmp_path / "w")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    said = ForeignModel(weights=str(tmp_path / "w"), input_size=(3, 64, 64), num_classes=4, mean=mean, std=std)
    model = locate("torchvision:googlenet", said).open(Code()).classifier.eval()
    assert "auxiliary heads are left out: aux1, aux2" in caplog.text
    pixels = torch.rand(2, 3, 64, 64)
    shape = (1, 3, 1, 1)
    expected = net((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    torch.testing.assert_close(model(pixels), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_counts_of_operations_are_left_out(tmp_path, source, caplog, prefix):
    counted = target()
    counted.load_state_dict(source.state_dict())
    for layer in counted.modules():
        layer.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        layer.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    torch.save(prefixed(counted.state_dict(), prefix), tmp_path / "w")
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)
    assert "left out: total_ops, total_params, stem.total_ops and" in caplog.text
    other = target()
    other.register_buffer("total_ops", torch.ones(1))  # the network's own
    load_weights(other, tmp_path / "w")
    assert not other.total_ops.any()


def test_what_is_only_beside_the_weights_is_told_to_be_left_out(tmp_path, source):
    state = {**source.state_dict(), "criterion.weight": torch.ones(10)}
    torch.save(state, tmp_path / "w")
    net = target()
    with pytest.raises(
        ArtifactError, match=r"unexpected criterion\.weight -- where they are no .* leave them out: torch\.save"
    ) as refused:
        load_weights(net, tmp_path / "w")
    how = refused.value.hint.partition(": ")[2]
    eval(how, {"torch": torch, "state": state, "net": net, "NEW": tmp_path / "w"})
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)
    del state["head.bias"]
    torch.save(state, tmp_path / "w")
    with pytest.raises(ArtifactError, match=r"unexpected criterion\.weight -- check the model SPEC"):
        load_weights(net, tmp_path / "w")


def test_what_a_deeper_network_has_more_is_not_told_to_be_left_out(tmp_path):
    pairs = [
        (build("resnet14", 10, (1, 8, 8)), target()),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))),
    ]
    for deeper, net in pairs:
        torch.save(deeper.state_dict(), tmp_path / "w")
        with pytest.raises(ArtifactError, match=r"do not fit the model: unexpected .* -- check the model SPEC"):
            load_weights(net, tmp_path / "w")


def test_pixels_in_0_to_255_are_told_by_their_mean(tmp_path, caplog):
    said = ForeignModel(weights="w", input_size=(3, 8, 8), num_classes=4, mean=(123.7, 116.3, 103.5))
    locate("resnet8", said)
    assert "divide by 255" in caplog.text


@pytest.mark.parametrize(
    ("spec", "mean", "told"),
    [
        ("torchvision:resnet18", None, True),
        ("timm:resnet18", None, True),
        ("torchvision:resnet18", (0.0, 0.0, 0.0), False),
        ("resnet18", None, False),
    ],
)
def test_pixels_that_nobody_normalises_are_told(spec, mean, told, caplog):
    locate(spec, ForeignModel(weights="w", input_size=(3, 64, 64), num_classes=4, mean=mean))
    assert ("--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in caplog.text) == told


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


def saved_as(state, *names):
    """The weights of a head that has other parameters in their place."""
    own = {key: value for key, value in state.items() if key != "head.weight"}
    return own | {f"head.{name}": state["head.weight"] for name in names}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda state: {k: v for k, v in state.items() if "running" not in k}, "statistics of BatchNorm are buffers"),
        (lambda state: state | {"head.zero_point": torch.zeros(1)}, "of a quantized network"),
        (lambda state: saved_as(state, "weight_orig", "weight_mask"), r"prune\.remove"),
        (lambda state: saved_as(state, "weight_g", "weight_v"), "weight or spectral norm"),
        (lambda state: saved_as(state, "weight_orig", "weight_u"), "weight or spectral norm"),
        (
            lambda state: saved_as(state, "parametrizations.weight.original0", "parametrizations.weight.original1"),
            "weight or spectral norm",
        ),
    ],
)
def test_what_is_the_matter_with_weights_is_said(tmp_path, source, change, hint):
    torch.save(change(source.state_dict()), tmp_path / "w")
    with pytest.raises(ArtifactError, match=hint):
        load_weights(target(), tmp_path / "w")


def test_a_wrapper_that_holds_itself_has_an_end(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "own.pt")
    with pytest.raises(ArtifactError, match="holds no state_dict"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "own.pt")


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    torch.save({"weight": torch.full((64, 64), 7.0)}, tmp_path / "w.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    data[data.index(b"\x00\x00\xe0\x40" * 9) + 6] ^= 1
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(ArtifactError, match="not readable as weights"):
        load_weights(torch.nn.Linear(64, 64, bias=False), tmp_path / "w.pt")


def test_layers_that_ask_for_their_version_are_read_as_they_are_saved(tmp_path):
    net, other = (torchvision.models.mnasnet0_5(num_classes=2).eval() for _ in range(2))
    save_weights(tmp_path / "w", net)
    load_weights(other, tmp_path / "w")
    assert same_weights(net, other)


def old_names(layer: str, new: nn.Module) -> dict[str, torch.Tensor]:
    """What a file has of a network whose layers had other names before."""
    state = new.state_dict()
    if layer == "vit":
        return {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in state.items()}
    if layer == "densenet":
        return {re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", key): v for key, v in state.items()}
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {re.sub("|".join(names), lambda match: names[match.group()], key): v for key, v in state.items()}


NETWORKS = {
    "vit": lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 4, 6, num_classes=3),
    "densenet": lambda: torchvision.models.DenseNet(2, (1, 2), 4, num_classes=3),
    "weight-norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("layer", NETWORKS)
def test_names_that_layers_had_before(tmp_path, layer):
    saved, net = NETWORKS[layer](), NETWORKS[layer]()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.normal_()
    state = old_names(layer, saved)
    assert state.keys() != saved.state_dict().keys()
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "w")
    load_weights(net, tmp_path / "w")
    assert same_weights(net, saved)
    torch.save({key: value for key, value in state.items() if "bias" not in key}, tmp_path / "w")
    before = copy.deepcopy(net)
    with pytest.raises(ArtifactError, match="do not fit the model: missing"):
        load_weights(net, tmp_path / "w")
    assert same_weights(net, before)


class Stateful(nn.Linear):
    """Keeps something beside its weights."""

    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}

    def set_extra_state(self, _) -> None: ...


def test_a_state_that_is_more_than_tensors_is_refused(tmp_path):
    torch.save(nn.Sequential(Stateful(4, 2)).state_dict(), tmp_path / "w")
    with pytest.raises(
        ConfigError, match=r"Sequential: its state is more than dense tensors that can be stored: 0\._ex"
    ):
        load_weights(nn.Sequential(Stateful(4, 2)), tmp_path / "w")


class Watching(nn.Sequential):
    """Has a buffer that nothing was seen for yet."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.register_buffer("seen", torch.tensor([torch.nan, torch.inf]))


def test_buffers_may_hold_anything_but_those_of_batchnorm(tmp_path):
    net, other = Watching(), Watching()
    other.seen.zero_()
    save_weights(tmp_path / "w", net)
    load_weights(other, tmp_path / "w")
    assert other.seen.isnan().tolist() == [True, False]
    for key, value in (("1.running_var", torch.nan), ("1.running_mean", torch.inf), ("0.bias", -torch.inf)):
        bad = Watching()
        bad.state_dict()[key].fill_(value)
        with pytest.raises(RunFailed, match="the weights are not finite"):
            save_weights(tmp_path / "bad", bad)
        torch.save(bad.state_dict(), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=f"not finite: {key}"):
            load_weights(other, tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.to_sparse(), r"0\.weight \(cpu, sparse_coo, float32\)"),
        (lambda weight: (weight * 99).to(torch.int8), r"0\.weight \(cpu, strided, int8\)"),
        (lambda weight: weight.to(torch.complex64), r"0\.weight \(cpu, strided, complex64\)"),
        (lambda weight: weight.to("meta"), r"0\.weight \(meta, strided, float32\)"),
    ],
)
def test_tensors_that_are_no_weights_as_they_are(tmp_path, change, words):
    state = Watching().state_dict()
    torch.save({**state, "0.weight": change(state["0.weight"])}, tmp_path / "w")
    with pytest.raises(ArtifactError, match=words):
        load_weights(Watching(), tmp_path / "w")


class Wave(nn.BatchNorm1d):
    """Has complex numbers that it learns and others that it keeps."""

    def __init__(self) -> None:
        super().__init__(2)
        self.gain = nn.Parameter(torch.complex(torch.rand(2), torch.rand(2)))
        self.register_buffer("band", torch.complex(torch.rand(2), torch.rand(2)))


def test_complex_numbers_are_weights_where_the_network_has_them(tmp_path, recwarn):
    net, other = Wave(), Wave()
    save_weights(tmp_path / "w", net)
    load_weights(other, tmp_path / "w")
    assert torch.equal(net.gain, other.gain) and torch.equal(net.band, other.band)
    torch.save(net.state_dict() | {"gain": torch.complex(torch.ones(2), torch.full((2,), torch.nan))}, tmp_path / "w")
    with pytest.raises(ArtifactError, match="not finite: gain"):
        load_weights(other, tmp_path / "w")
    wide = torch.full((2,), 1e300, dtype=torch.complex128)
    torch.save(net.state_dict() | {"gain": wide}, tmp_path / "w")
    with pytest.raises(ArtifactError, match="not finite: gain"):  # as those of the network would be
        load_weights(other, tmp_path / "w")
    torch.save(net.state_dict() | {"gain": torch.ones(2, dtype=torch.int8)}, tmp_path / "w")
    with pytest.raises(ArtifactError, match=r"not weights as they are: gain \(cpu, strided, int8\)"):
        load_weights(other, tmp_path / "w")
    net.register_buffer("wide", wide)
    with pytest.raises(ConfigError, match=r"can be stored: wide -- .* complex numbers as complex64"):
        require_tensors(net)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_eight_bits_are_weights(tmp_path, dtype):
    net, state = Watching(), {key: value.to(dtype) for key, value in Watching().state_dict().items()}
    torch.save(state, tmp_path / "w")
    load_weights(net, tmp_path / "w")
    assert torch.equal(net[0].weight, state["0.weight"].float())
    torch.save(state | {"1.running_var": torch.full((2,), -1.0).to(dtype)}, tmp_path / "w")
    with pytest.raises(ArtifactError, match=r"1\.running_var \(below 0\)"):
        load_weights(net, tmp_path / "w")


def test_floats_of_other_widths_are_weights(tmp_path):
    state = {
        key: value.bfloat16() if "weight" in key else value.double() for key, value in Watching().state_dict().items()
    }
    torch.save(state, tmp_path / "w")
    net = Watching()
    load_weights(net, tmp_path / "w")
    assert torch.equal(net[0].weight, state["0.weight"].float()) and net[0].bias.dtype == torch.float32
