"""What ``torch.save`` wrote, read without running code from it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def read_pickle(path: Path, device: str) -> Any:
    """Tensors, on a device, and plain values around them.

    Raises:
        Exception: Of any kind: the file is damaged, holds code, or was not written by PyTorch.
    """
    check_sums(path)
    return torch.load(path, map_location=device, weights_only=True)


def check_sums(path: Path) -> None:
    """Check what ``torch.load`` does not.

    It looks at no checksum, and unpacks what is packed. ``torch.save`` packs nothing: what comes to more than the file
    is none of its.

    Raises:
        Exception: Of any kind: the file is damaged.
    """
    if zipfile.is_zipfile(path):  # or of a format from before PyTorch 1.6, without checksums
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            if size > path.stat().st_size or file.testzip() is not None:
                raise ValueError(f"{path}: checksums or sizes do not agree")
