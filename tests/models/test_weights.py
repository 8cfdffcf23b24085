"""Weights from files: wrappers and prefixes, what does not fit, and that a file runs no code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from comparisons import same_weights
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models import cifar_resnet, lenet
from dfkd_cli.models.registry import build
from dfkd_cli.models.weights import load_weights


@pytest.fixture(scope="module")
def source() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)  # other weights than those of the target, which a test draws after seed 0
        return build("resnet8", 10, (1, 8, 8))


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
    with pytest.raises(ArtifactError, match="not readable as PyTorch weights"):
        load_weights(torch.nn.Linear(64, 64, bias=False), tmp_path / "w.pt")
