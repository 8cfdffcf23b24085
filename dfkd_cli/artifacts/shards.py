"""Shard directories: data impressions on disk, with what the teacher says about them.

``manifest.json`` names every ``shard-00000.safetensors`` with its sha256. Shards are immutable and written whole; round
``i`` of a synthesizer writes shard ``i``, so the shards that exist are all the state a run needs to continue. Until all
are there, the manifest may lag behind them, as it says so much of every class that it costs more than many a shard;
their hashes stand in files ``.hashes-*`` until then, one of each process, with a line for each shard.
Fields of a shard: ``images`` (B, C, H, W), ``logits`` (B, K) of the teacher on the stored images, ``targets`` (B, K)
soft labels aimed at; only ``images`` and ``logits`` are always there.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NotRequired, TypedDict

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dfkd_cli.artifacts.files import digest, remove, sha256_file, write_atomic, write_json, writing
from dfkd_cli.artifacts.integrity import HASHES, check_finished, intact
from dfkd_cli.artifacts.records import Classes, Count, Hashed, ImageShape, read_json
from dfkd_cli.errors import ArtifactError, RunFailed

MANIFEST = "manifest.json"
METADATA = "dfkd"
REMAKE = "run the synthesize command again: it remakes what is damaged"


class Row(TypedDict):
    """What the manifest says of a shard."""

    file: str
    sha256: str
    count: Count
    range: NotRequired[list[float]]
    histogram: NotRequired[list[int]]
    terms: NotRequired[dict[str, float]]


class Manifest(TypedDict):
    """``manifest.json``."""

    schema: Literal[1]
    kind: Literal["shards"]
    method: str
    config: NotRequired[dict[str, Any]]
    seed: NotRequired[int]
    shape: ImageShape
    dtype: Literal["float16", "float32", "uint8"]
    num_classes: Classes
    classes: NotRequired[list[str] | None]
    teacher: Hashed
    data_free: NotRequired[bool]
    uses: NotRequired[list[str]]
    complete: bool
    count: Count
    range: NotRequired[list[float]]
    class_histogram: NotRequired[list[int]]
    shards: list[Row]


def as_pixels(stored: Tensor) -> Tensor:
    """Images as they are stored, of any device, as float32 in pixel space: uint8 stands for [0,255]."""
    if stored.dtype != torch.uint8:
        return stored.float()
    # By a tensor of the device: CUDA multiplies by 1 / 255 instead of dividing by a number, and answers are found by
    # the pixels' bits.
    return stored.float().div_(torch.full((), 255.0, device=stored.device))


def as_stored(pixels: Tensor, dtype: str, shard: int) -> Tensor:
    """The images of a shard in pixel space, of any device, as they are stored: the type's nearest values.

    Raises:
        RunFailed: The type does not hold them.
    """
    stored = pixels.mul(255).round_() if dtype == "uint8" else pixels.to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise RunFailed(f"shard {shard}: pixels are not finite as {dtype}", "lower --lr")
    if dtype == "uint8" and not (stored.amin() >= 0 and stored.amax() <= 255):
        raise RunFailed(f"shard {shard}: pixels leave [0,1], which uint8 does not hold", "give another --dtype")
    return stored.to(getattr(torch, dtype))


def shard_name(index: int) -> str:
    """``shard-00012.safetensors``."""
    return f"shard-{index:05d}.safetensors"


class ShardWriter:
    """Writes shards into a directory, and the manifest when asked: it takes over what an earlier process wrote there.

    Args:
        directory: The shard directory.
        head: What the manifest says about all shards: method, config, teacher, shape, classes.
        count: Shards in all.
        key: Written into each shard, so that a file from another run is never taken for one of ours; by default what
            stands for ``head``.
        before: Hashes of files that the directory had when it was finished, by their names.
    """

    def __init__(
        self,
        directory: Path,
        head: Mapping[str, Any],
        count: int,
        key: str | None = None,
        before: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.directory, self.head, self.count, self.before = directory, dict(head), count, before
        self.key = key or digest(self.head)
        self.rows: dict[int, dict[str, Any]] = {}
        self.confidences: dict[int, float] = {}  # by shard, summed over its images: the teacher's highest probability
        self._hashes: str | None = None  # the file of this process
        self.collect()

    def collect(self) -> None:
        """Take over the shards that other processes of this run have finished, earlier or beside this one.

        What is damaged, not of this run, or has another hash than the recorded one of its file is left to be remade.
        """
        recorded, noted = self._recorded(), any(self.directory.glob(f"{HASHES}*"))
        for index in self.missing():
            path = self.directory / shard_name(index)
            with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
                with safetensors.safe_open(path, framework="pt") as file:
                    facts = json.loads((file.metadata() or {})[METADATA])
                    tensors = {name: file.get_tensor(name) for name in ("images", "logits")}
                sha256, ours = sha256_file(path), (facts["key"], facts["index"]) == (self.key, index)
                if ours and recorded.get(path.name, None if noted else sha256) == sha256:
                    self._enter(index, tensors, facts["terms"], sha256)

    def _recorded(self) -> dict[str, str]:
        """The hashes on record, by file."""
        try:
            recorded = {row["file"]: row["sha256"] for row in read_json(self.directory / MANIFEST, Manifest)["shards"]}
        except ArtifactError:
            recorded = {}  # no manifest, or a damaged one: it is made anew from the shards
        recorded |= self.before
        for path in self.directory.glob(f"{HASHES}*"):
            with contextlib.suppress(OSError):
                lines = path.read_bytes().decode(errors="replace").splitlines()
                recorded |= {line[65:]: line[:64] for line in lines}  # a line that was cut names no file
        return recorded

    def _note(self, sha256: str, name: str) -> None:
        """Put a hash on record. The file is a new one: what a directory holds may be a link to somewhere else."""
        with writing(self.directory):
            if self._hashes is None:
                handle, self._hashes = tempfile.mkstemp(prefix=HASHES, dir=self.directory)
                os.close(handle)
            with open(self._hashes, "a", encoding="utf-8") as file:
                file.write(f"{sha256} {name}\n")

    def missing(self) -> list[int]:
        """The shards still to be made."""
        return [index for index in range(self.count) if index not in self.rows]

    def write(self, index: int, tensors: Mapping[str, Tensor], terms: Mapping[str, float]) -> None:
        """Write one shard. The manifest will name it when that is written next.

        Args:
            index: The shard's number.
            tensors: Its fields.
            terms: The loss terms it ended with.

        Raises:
            RunFailed: The teacher's answers are not finite.
        """
        if not tensors["logits"].isfinite().all():
            hint = "images may lie too far out: lower --lr; or the teacher answers so to images in range"
            raise RunFailed(f"shard {index}: the teacher's answers are not finite", hint)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # One entry only: safetensors writes several in random order, and equal work must give equal bytes.
        facts = json.dumps({"key": self.key, "index": index, "terms": dict(terms)})
        data = safetensors.torch.save(tensors, {METADATA: facts})
        sha256 = write_atomic(self.directory / shard_name(index), data)
        self._note(sha256, shard_name(index))
        self._enter(index, tensors, terms, sha256)

    def _enter(self, index: int, tensors: Mapping[str, Tensor], terms: Mapping[str, float], sha256: str) -> None:
        """Take a finished shard into the books, with all that is said of it."""
        images, logits = tensors["images"], tensors["logits"]
        histogram = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).tolist()
        low, high = images.float().aminmax() if images.is_floating_point() else images.aminmax()
        self.confidences[index] = float(logits.softmax(1).amax(1).sum())
        self.rows[index] = {
            "file": shard_name(index),
            "sha256": sha256,
            "count": len(images),
            "range": [float(low), float(high)],
            "histogram": histogram,
            "terms": dict(terms),
        }

    def cut(self) -> None:
        """Make do with the shards before the first missing one: from here on the set has no more."""
        self.count = min(self.missing(), default=self.count)
        self.rows = {index: row for index, row in self.rows.items() if index < self.count}

    def read(self, index: int) -> dict[str, Tensor]:
        """A finished shard's tensors, on the CPU."""
        return safetensors.torch.load((self.directory / shard_name(index)).read_bytes())

    def write_manifest(self) -> dict[str, Any]:
        """Write what is finished. The manifest carries no time and no path: equal work gives equal bytes."""
        rows = [self.rows[index] for index in sorted(self.rows)]
        manifest = {
            "schema": 1,
            "kind": "shards",
            **self.head,
            "complete": len(rows) == self.count,
            "count": sum(row["count"] for row in rows),
            "range": [min(row["range"][0] for row in rows), max(row["range"][1] for row in rows)],
            "class_histogram": [sum(column) for column in zip(*(row["histogram"] for row in rows), strict=True)],
            "shards": rows,
        }
        write_json(self.directory / MANIFEST, manifest)
        if manifest["complete"]:
            for path in self.directory.glob(f"{HASHES}*"):
                remove(path)
        return manifest


class ShardReader:
    """Reads a shard directory; every file is checked against its hash when it is first read.

    Raises:
        ArtifactError: No shard directory, unfinished, or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / MANIFEST).is_file():
            check_finished(directory)
            raise ArtifactError(
                f"{directory}: no shard directory (no {MANIFEST})", "make one: dfkd synthesize --method zskd"
            )
        self.manifest = manifest = read_json(intact(directory / MANIFEST, hint=REMAKE), Manifest, REMAKE)
        if not manifest["complete"]:
            raise ArtifactError(f"{directory}: the synthesis is not finished", "run the same synthesize command again")
        rows = manifest["shards"]
        self.sizes = [row["count"] for row in rows]
        channels, height, width = manifest["shape"]
        self.shape = channels, height, width
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self.num_classes: int = manifest["num_classes"]
        self.teacher: str = manifest["teacher"]["sha256"]
        # Images are drawn by their position: in another order they would be another set.
        if [row["file"] for row in rows] != [*map(shard_name, range(len(rows)))] or manifest["count"] != sum(
            self.sizes
        ):
            raise ArtifactError(f"{directory / MANIFEST} is damaged: it does not name shard after shard", REMAKE)
        for row in rows:
            if not (directory / row["file"]).is_file():
                raise ArtifactError(f"{directory / row['file']} is missing", REMAKE)
        self._checked: set[int] = set()

    @property
    def sha256(self) -> str:
        """The hash that stands for the whole set: the manifest names every shard by hash."""
        return sha256_file(self.directory / MANIFEST)

    def read(self, index: int) -> dict[str, Tensor]:
        """One shard's tensors, on the CPU."""
        row = self.manifest["shards"][index]
        path = self.directory / row["file"]
        if index not in self._checked:
            intact(path, row["sha256"], REMAKE)
            self._checked.add(index)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
        except (SafetensorError, OSError):
            raise ArtifactError(f"{path}: the shard is damaged", REMAKE) from None
        answers = (row["count"], self.num_classes)
        expected = {"images": (row["count"], *self.shape), "logits": answers, "targets": answers}
        shapes = {"targets": answers} | {name: tuple(tensor.shape) for name, tensor in tensors.items()}  # it may lack
        if any(shapes.get(name) != shape for name, shape in expected.items()) or tensors["images"].dtype != self.dtype:
            raise ArtifactError(f"{path}: the shard does not hold what the manifest says", REMAKE)
        return tensors

    def verify(self) -> set[str]:
        """Read every shard once. Returns the fields that all of them have."""
        return set.intersection(*(set(self.read(index)) for index in range(len(self.sizes))))
