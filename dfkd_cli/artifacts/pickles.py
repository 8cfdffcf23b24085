"""What ``torch.save`` wrote, read without running code from it."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

from dfkd_cli.errors import ArtifactError, some

PROTOCOL = 2  # of pickle, in which torch.save writes: the only one that PyTorch reads without running code
LOADED = "torch.load(FILE, weights_only=False)"
# What other functions than torch.save wrote, by a name in the archive that only they give, and what reads it.
_ARCHIVES = {
    "constants.pkl": ("a TorchScript file", "torch.jit.load(FILE).state_dict()"),
    "archive_format": ("a torch.export file", "torch.export.load(FILE).state_dict"),
    "serialized_exported_program.json": ("a torch.export file", "torch.export.load(FILE).state_dict"),  # until 2.7
}
# What files of other kinds begin with, what they are, and how one gets to the weights.
_OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS", "`git lfs pull` fetches the file that it stands for"),
    b"<": ("a web page", "download the file itself"),
    b"\x1f\x8b": ("compressed by gzip", "unpack it"),
    b"\x89HDF": ("an HDF5 file, as Keras has", "only weights of PyTorch can be read"),
    b"GGUF": ("a GGUF file", "only weights of PyTorch can be read"),
}
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in what torch.save wrote before PyTorch 1.6
_CLASSES = 100  # of metadata, that a file may have
# Of what the items of a class that is not PyTorch's own are put in, by the word for it in the error. An OrderedDict can
# have attributes too.
_FILLED = {"SETITEM": OrderedDict, "lists": list}


class Unread:
    """Stands for what a file has of a class that is not PyTorch's own: nothing of that class is run, or imported."""

    name: str
    network: bool = False  # whether it has what every torch.nn.Module has

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.network = isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys()

    def __setitem__(self, *_: Any) -> None:
        raise TypeError(f"Can only SETITEM for dict, but got {type(self)}")  # as newer versions of PyTorch say first

    @property
    def array(self) -> bool:
        """Whether it is an array of NumPy's."""
        return self.name.startswith("numpy.") and self.name.endswith("._reconstruct")


def read_pickle(path: Path, device: str) -> Any:
    """Tensors, on a device, and plain values around them.

    Raises:
        Exception: Of any kind: the file is damaged, holds code, or was not written by PyTorch.
    """
    check_sums(path)
    return torch.load(path, map_location=device, weights_only=True)


def read_foreign(path: Path) -> Any:
    """Tensors, on the CPU, and what is around them. Objects are :class:`Unread`; what holds items is a dict or a list.

    Raises:
        ArtifactError: It is damaged, is none of PyTorch's, or cannot be read without running code.
    """
    _refuse_archive(path)
    unread: dict[str, type[Unread]] = {}
    while True:
        try:
            if not unread:
                check_sums(path)
            allowed: list[Any] = [(stand_in, name) for name, stand_in in unread.items()]
            with path.open("rb") as stream, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of protocols and layouts, which are refused with words of our own
                return torch.load(stream, map_location="cpu", weights_only=True)  # of a path, it looks at the name
        except Exception as error:  # a damaged pickle can raise anything
            if not _learn(str(error), unread):
                _refuse(error, list(unread), path)


def _learn(error: str, unread: dict[str, type[Unread]]) -> bool:
    """Take from an error how the file can be read further: what class it has, or how it fills one. Whether it said."""
    if name := next(iter(re.findall(r"Unsupported global: GLOBAL (\S+)", error)), None):
        name = name if "." in name else f"builtins.{name}"  # which the message leaves out
        if name in unread or len(unread) == _CLASSES:
            return False
        unread[name] = _stand_in(name, len(unread))
        return True
    for what, index in re.findall(r"Can only .*?(SETITEM|lists).* but got .*Unread(\d+)'>", error):
        name = next((name for name, stand_in in unread.items() if stand_in.__name__ == f"Unread{index}"), None)
        if name is None or "__new__" in vars(unread[name]):
            return False
        unread[name] = _stand_in(name, int(index), _FILLED[what])
        return True
    return False


def _stand_in(name: str, index: int, kind: type | None = None) -> type[Unread]:
    """A class in the place of one: calls give an object of nothing or, where items are put into it, an empty holder."""
    made = {} if kind is None else {"__new__": lambda *_: kind()}
    return type(f"Unread{index}", (Unread,), {"name": name, **made})


def _refuse(error: Exception, unread: list[str], path: Path) -> NoReturn:
    """Say what is the matter with a file that cannot be read, perhaps for what it holds beside tensors."""
    name = next(iter(re.findall(r"GLOBAL (\S+)", str(error))), None)
    protocol = _protocol(path)
    if protocol is not None and not _is_ours(path):
        what = "a pickle that torch.save did not write, which is never read: it would run code"
        raise ArtifactError(f"{path}: {what}", alone('pickle.load(open(FILE, "rb"))')) from None
    if protocol not in (None, PROTOCOL):
        what = f"written with pickle_protocol={protocol}, which is never read: it would run code"
        raise ArtifactError(f"{path}: {what}", alone(LOADED)) from None
    if name or unread or "TorchScript" in str(error):
        # Files from before PyTorch 1.6 name the source code of networks, and of nothing else, where storages are named.
        network = "Only persistent_load of storage" in str(error)
        refuse_code([name] if name else unread or ["TorchScript"], path, f"{LOADED}.state_dict()" if network else None)
    with path.open("rb") as stream:
        start = stream.read(100).lstrip()
    unknown = "not readable as weights of PyTorch or safetensors", "damaged, or another type of file"
    what, hint = next((said for magic, said in _OTHERS.items() if start.startswith(magic)), unknown)
    raise ArtifactError(f"{path}: {what}", hint) from None


def _refuse_archive(path: Path) -> None:
    """Refuse what is an archive of PyTorch's, with weights in it, and none of ``torch.save``'s."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:  # no archive, or a damaged one
        names = [name.split("/", 1)[-1] for name in file.namelist()]  # all lies in one directory
    for name in names:
        if name in _ARCHIVES:
            what, weights = _ARCHIVES[name]
            raise ArtifactError(f"{path}: {what}", f"save its weights alone: torch.save({weights}, NEW)")
    if names and all(name.endswith(".npy") for name in names):
        weights = "{k: torch.as_tensor(v) for k, v in numpy.load(FILE).items()}"
        if names[0].startswith("arr_"):  # which says in what order they were given, and no name
            weights = "dict(zip(net.state_dict(), map(torch.as_tensor, numpy.load(FILE).values())))"
        raise ArtifactError(f"{path}: arrays of NumPy", f"save them as tensors: torch.save({weights}, NEW)")


def _is_ours(path: Path) -> bool:
    """Whether a file looks like one of ``torch.save``'s."""
    with path.open("rb") as stream:
        start = stream.read(100)
        return _MAGIC in start or zipfile.is_zipfile(stream)


def refuse_code(names: Iterable[str], path: Path, weights: str | None = None) -> NoReturn:
    """Refuse a file for the classes, by their names, that it has where weights should be.

    Args:
        names: The classes.
        path: The file.
        weights: What in Python gives the weights, where that is known.
    """
    raise ArtifactError(
        f"{path}: carries code ({some(dict.fromkeys(names))}), which is never run", alone(weights)
    ) from None


def alone(weights: str | None = None) -> str:
    """A hint how weights are got out of a file, by what in Python gives them."""
    weights = weights or f'{LOADED}["state_dict"]'
    how = f"torch.save({weights}, NEW)"
    return f"save the state_dict alone, best as .safetensors, such as, where you trust the file, {how}"


def _protocol(path: Path) -> int | None:
    """The version of pickle in which a file is written; None where it is damaged, or no pickle."""
    with contextlib.suppress(Exception), path.open("rb") as stream:  # a damaged archive can raise anything
        start = stream.read(2)
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as file:
                start = file.open(next(name for name in file.namelist() if name.endswith("data.pkl"))).read(2)
        return start[1] if start[:1] == b"\x80" else None
    return None


def check_sums(path: Path) -> None:
    """Check what ``torch.load`` does not.

    It looks at no checksum, and unpacks what is packed. ``torch.save`` packs nothing: what comes to more than the file
    is none of its. Told to compute no checksums, it writes zeros.

    Raises:
        Exception: Of any kind: the file is damaged.
    """
    if zipfile.is_zipfile(path):  # or of a format from before PyTorch 1.6, without checksums
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            summed = any(entry.CRC for entry in entries)
            if sum(entry.file_size for entry in entries) > path.stat().st_size or (summed and file.testzip()):
                raise ValueError(f"{path}: checksums or sizes do not agree")
