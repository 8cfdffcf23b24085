"""A memory of features, first in, first out, that continued runs find on disk."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from dfkd_cli.artifacts.tensors import read_tensors, write_tensors
from dfkd_cli.errors import ArtifactError


class Memory:
    """The last rows that were pushed, first in, first out.

    They are in the CPU's memory, and those of each round on disk once, from where a continued run has them: a WRN-40-2
    has 886 MB of them, too much for each checkpoint.

    Args:
        directory: Where the rows of each round are kept.
        capacity: Rows at most.
        size: Numbers of a row.
    """

    def __init__(self, directory: Path, capacity: int, size: int) -> None:
        self.directory = directory
        self.rows = torch.zeros(capacity, size)
        self.pushed = 0  # rows so far

    def push(self, rows: Tensor) -> None:
        """Take rows (B, size); each overwrites the oldest."""
        kept = rows[-len(self.rows) :]
        first = self.pushed + len(rows) - len(kept)
        self.rows[(first + torch.arange(len(kept))) % len(self.rows)] = kept.to(self.rows)
        self.pushed += len(rows)

    def sample(self, count: int) -> Tensor:
        """Up to ``count`` different rows in random order."""
        return self.rows[torch.randperm(min(self.pushed, len(self.rows)))[:count]]

    def write(self, index: int, rows: Tensor) -> None:
        """Keep the rows (B, size) of a round."""
        write_tensors(self._file(index), {"rows": rows})

    def read(self, count: int, batch: int) -> bool:
        """Take the rows of the first ``count`` rounds, ``batch`` each, as far as they are not forgotten.

        Returns:
            Whether they were there, and whole.
        """
        first, found = self.first(count, batch), []
        for index in range(first, count):
            with contextlib.suppress(ArtifactError):
                found.append(read_tensors(self._file(index))["rows"])
        if len(found) < count - first:
            return False
        self.pushed = first * batch
        for rows in found:
            self.push(rows)
        return True

    def first(self, count: int, batch: int) -> int:
        """The first of so many rounds of which anything is remembered."""
        return max(count - -(-len(self.rows) // batch), 0)

    def drop(self, count: int) -> None:
        """Remove the files of the first ``count`` rounds."""
        for index in range(count):
            self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.directory / f"round-{index:05d}.safetensors"
