"""Files of weights that hold objects too: none of their code is run, and what they hold beside weights is not read."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import re
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import same_weights
from torch import nn

from dfkd_cli.errors import ArtifactError
from dfkd_cli.models import cifar_resnet, lenet
from dfkd_cli.models.weights import load_weights


def target() -> nn.Module:
    return cifar_resnet.build("resnet8", 10, (1, 8, 8))


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


def mended(net: nn.Module, file: Path) -> nn.Module:
    """The network with the weights of a file, after what is told when the file itself is refused was done."""
    with pytest.raises(ArtifactError) as refused:
        load_weights(net, file)
    new = file.with_name("new")
    (how,) = re.findall(r"torch\.save\(.*, NEW\)", refused.value.hint)
    assert "\n" not in str(refused.value)
    eval(how, {"torch": torch, "numpy": np, "pickle": pickle, "net": net, "FILE": file, "NEW": new})
    load_weights(net, new)
    return net


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        lambda net: {"model": net, "epoch": 3},
        lambda net: {"args": argparse.Namespace(), "checkpoint": {"ema": net}, "loss": torch.ones(1)},
        lambda net: {key: value.numpy() for key, value in net.state_dict().items()},
        lambda net: {"params": {key: value.numpy() for key, value in net.state_dict().items()}},
        lambda net: {**net.state_dict(), "args": argparse.Namespace()},
        lambda net: {"model": {**net.state_dict(), "best": np.float64(0.9)}},
    ],
)
def test_what_is_told_of_objects_gives_the_weights(tmp_path, source, wrap):
    torch.save(wrap(source), tmp_path / "w")
    assert same_weights(mended(target(), tmp_path / "w"), source)


def test_what_is_told_of_a_network_in_an_old_file_gives_the_weights(tmp_path, source):
    torch.save(source, tmp_path / "w", _use_new_zipfile_serialization=False)
    assert same_weights(mended(target(), tmp_path / "w"), source)


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in net.state_dict().items()}


@pytest.mark.parametrize(
    "write",
    [
        lambda net, file: np.savez(file, **arrays(net)),
        lambda net, file: np.savez_compressed(file, *arrays(net).values()),  # as federated systems hand them over
        lambda net, file: torch.save(net.state_dict(), file, pickle_protocol=5),
        lambda net, file: pickle.dump(net.state_dict(), file),
        lambda net, file: pickle.dump(net.state_dict(), file, protocol=2),
    ],
)
def test_what_is_told_of_what_others_write_gives_the_weights(tmp_path, source, write):
    with (tmp_path / "w").open("wb") as file:
        write(source, file)
    assert same_weights(mended(target(), tmp_path / "w"), source)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["TorchScript", "torch.export"])
def test_archives_of_other_functions_are_named_with_what_reads_them(tmp_path, kind):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).eval()
    if kind == "TorchScript":
        torch.jit.script(net).save(tmp_path / "w.pt2")
    else:
        torch.export.save(torch.export.export(net, (torch.rand(2, 1, 4, 4),)), tmp_path / "w.pt2")
    with pytest.raises(ArtifactError, match=f"w.pt2: a {kind} file -- save its weights alone"):
        load_weights(net, tmp_path / "w.pt2")
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).eval()
    assert same_weights(mended(other, tmp_path / "w.pt2"), net)


class Spy:
    """Leaves a trace when its code is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __setstate__(self, state):
        state["path"].touch()


@pytest.mark.parametrize("zipped", [True, False])
def test_metadata_beside_the_weights_is_not_read(tmp_path, source, zipped):
    args = argparse.Namespace(lr=0.1, out=tmp_path, more=argparse.Namespace(names=["a"]))
    facts = {"args": args, "best": np.float64(0.9), "curve": np.ones(3), "epoch": np.int64(3), "day": date(2020, 1, 2)}
    facts["own"] = Spy(tmp_path / "ran")
    torch.save({"model": source.state_dict(), **facts}, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    (tmp_path / "ran").unlink()
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)
    assert not (tmp_path / "ran").exists()


class OwnDict(dict):
    """Has attributes too, once they are set, as configurations do."""


class OwnList(list):
    pass


def own_dict(items) -> OwnDict:
    made = OwnDict(items)
    made.frozen = True
    return made


KINDS = [
    OwnList([1]), collections.defaultdict(list, {"a": [1]}), collections.deque([1]), frozenset([1]), range(3), slice(1),
    int, own_dict({"b": OwnList([1])}), collections.UserDict(a=1), os.path.join,
]  # fmt: skip


@pytest.mark.parametrize("value", KINDS, ids=lambda value: getattr(value, "__name__", type(value).__name__))
@pytest.mark.parametrize("zipped", [True, False])
def test_classes_beside_the_weights_are_not_read(tmp_path, source, value, zipped):
    torch.save({"model": source.state_dict(), "x": value}, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)


@pytest.mark.parametrize("kind", [own_dict, lambda state: collections.defaultdict(int, state)])
def test_weights_in_a_dictionary_of_another_class(tmp_path, source, kind):
    torch.save({"model": kind(source.state_dict())}, tmp_path / "w")
    net = target()
    load_weights(net, tmp_path / "w")
    assert same_weights(net, source)


class Appending(Malicious):
    """Code whose result would be filled like a list and a dictionary."""

    def __reduce__(self):
        return (*super().__reduce__(), None, iter([1]), iter([(1, 2)]))


class Evaluating(Malicious):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",), None, iter([1])


@pytest.mark.parametrize("kind", [Appending, Evaluating])
def test_code_whose_result_takes_items_is_never_run(tmp_path, source, kind):
    torch.save({"model": source.state_dict(), "x": kind(tmp_path / "ran")}, tmp_path / "w")
    with contextlib.suppress(ArtifactError):
        load_weights(target(), tmp_path / "w")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_protocol_that_is_not_read_is_named_and_how_to_mend_it(tmp_path, source, zipped, recwarn):
    options = {"pickle_protocol": 4, "_use_new_zipfile_serialization": zipped}
    torch.save({"model": source.state_dict()}, tmp_path / "w", **options)
    with pytest.raises(ArtifactError, match=r"written with pickle_protocol=4.*torch\.save\(torch\.load\(FILE"):
        load_weights(target(), tmp_path / "w")
    assert not recwarn


def test_what_is_no_tensor_among_the_weights_is_refused(tmp_path, source):
    torch.save({**source.state_dict(), "args": argparse.Namespace()}, tmp_path / "w")
    with pytest.raises(ArtifactError, match=r"carries code \(argparse\.Namespace\).*save the state_dict alone"):
        load_weights(target(), tmp_path / "w")


def test_a_file_that_contains_itself_ends(tmp_path):
    loop: dict[str, object] = {}
    loop |= {f"key{i}": loop for i in range(50)}
    torch.save(loop, tmp_path / "w")
    with pytest.raises(ArtifactError, match="holds no state_dict"):
        load_weights(target(), tmp_path / "w")


@pytest.mark.parametrize("kind", ["tuples", "lists", "shared"])
def test_a_pickle_nested_beyond_reason_is_refused(tmp_path, kind):
    """Written by hand, opcode by opcode: 100,000 levels, or 60 levels of two references each."""
    body = {"tuples": b")" + b"\x85" * 100_000, "lists": b"]" * 100_000 + b"a" * 99_999,
            "shared": b"]" + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e"
                                      for i in range(60))}[kind]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
    with pytest.raises(ArtifactError):
        load_weights(target(), tmp_path / "w")
