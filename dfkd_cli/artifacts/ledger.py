"""What somebody has answered about images, found by their content: nobody is asked twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfkd_cli.artifacts.tensors import read_tensors, write_tensors
from dfkd_cli.errors import RunFailed

AT_ONCE = 200  # images asked about together: what a kill in the middle of a question loses


class Ledger:
    """Answers by the content of images: in memory, and once it is opened on disk, before anything is made of them.

    Args:
        budget: How many images may be asked about; None for any number.

    Attributes:
        asked: How many have been, in all processes of the run.
        files: Where the answers are.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.asked = budget, 0
        self.directory: Path | None = None
        self.files: list[Path] = []
        self._known: dict[bytes, np.ndarray] = {}

    def open(self, directory: Path) -> bool:
        """Keep what is answered from now on in a directory, and take what earlier processes kept there.

        Returns:
            Whether it does: False where another directory was opened before.

        Raises:
            ArtifactError: A file there is damaged.
        """
        if self.directory is not None:
            return False
        self.directory = directory
        for path in sorted(directory.glob("asked-*.safetensors")):
            tensors = read_tensors(path, "delete it: what is in it is asked about again")
            self.files.append(path)
            self._note([bytes(key) for key in tensors["keys"].numpy()], tensors["answers"])
            self.asked += len(tensors["keys"])
        return True

    def know(self, pixels: Tensor, answers: Tensor) -> None:
        """Take answers (B, K) to images (B, C, H, W) that were given elsewhere."""
        self._note(_keys(pixels), answers)

    def answer(self, pixels: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """The answers (B, K) to images (B, C, H, W), on their device; those that are not known are asked for.

        Raises:
            RunFailed: The budget is spent.
        """
        keys = _keys(pixels)
        new = list({key: row for row, key in reversed([*enumerate(keys)]) if key not in self._known}.values())[::-1]
        if self.budget is not None and self.asked + len(new) > self.budget:
            raise RunFailed(
                f"--queries {self.budget}: {self.asked} are made, and {len(new)} more images are to be asked about",
                "raise it: the same command asks on",
            )
        for start in range(0, len(new), AT_ONCE):
            rows = new[start : start + AT_ONCE]
            self._keep([keys[row] for row in rows], ask(pixels[rows]).float().cpu())
        return torch.from_numpy(np.stack([self._known[key] for key in keys])).to(pixels.device)

    def _keep(self, keys: list[bytes], answers: Tensor) -> None:
        if self.directory is not None:
            number = int(self.files[-1].stem.rpartition("-")[2]) + 1 if self.files else 0
            self.files.append(self.directory / f"asked-{number:05d}.safetensors")
            hashes = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1).copy())
            write_tensors(self.files[-1], {"keys": hashes, "answers": answers})
        self.asked += len(keys)
        self._note(keys, answers)

    def _note(self, keys: list[bytes], answers: Tensor) -> None:
        self._known.update(zip(keys, answers.float().cpu().numpy(), strict=True))


def _keys(pixels: Tensor) -> list[bytes]:
    """What stands for each image: a hash of its float32 pixels."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels.float().cpu().numpy()]
