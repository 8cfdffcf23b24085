"""Image files: which there are in a folder, and what is in them as tensors."""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from dfkd_cli.errors import ArtifactError, DfkdError, some

LOG = logging.getLogger(__name__)
T = TypeVar("T")
Shape = tuple[int, int, int]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
# Pillow would tell more formats by their content, whatever a file is called, and hand some to other programs.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".pnm")
SUPPORTED = f"images are {', '.join(FORMATS)}: files named {' '.join(EXTENSIONS)}"
# What lies beside images and is no image: not worth a word.
_BESIDE = {".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".pdf", ".py", ".toml", ".tsv", ".txt"}
_BESIDE |= {".xml", ".yaml", ".yml", "license", "notice", "readme"}
_HIDDEN = (".", "__MACOSX", "__pycache__", "@eaDir")  # the last holds previews, on Synology's servers
_BLOCK = 16 << 10  # bytes of a large file that are looked at in one place
_PLAIN = (".bmp", ".pgm", ".pnm", ".ppm", ".tif", ".tiff")  # pixels lie in them as they are, or may do so
_LOOKED_AT = 1000  # files whose headers say of which shape a set is


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that are decoded when indexed, like a uint8 tensor (N, C, H, W) that lies on disk."""

    paths: list[str]
    shape: Shape  # of one image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at ``indices`` (n,) to uint8 (n, C, H, W)."""
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)

        def decode(slot: int) -> None:
            images[slot] = _decode(self.paths[indices[slot]], self.shape)

        with ThreadPoolExecutor() as pool:  # Pillow decodes outside of the interpreter lock
            list(pool.map(decode, range(len(indices))))
        return images


def image_files(folder: Path, shape: Shape) -> ImageFiles:
    """Every image file below ``folder``. What is left out of files of other kinds is told.

    Raises:
        ArtifactError: There is none, or images cannot have that shape.
    """
    check_channels(str(folder), shape)
    others = Counter[str]()
    paths = sorted(image_paths(folder, others))
    if not paths:
        raise ArtifactError(f"{folder}: no image files in it", f"give a folder of images or shards; {SUPPORTED}")
    _tell(folder, others)
    return ImageFiles(mixed(paths), shape)


def class_names(folder: Path) -> list[str]:
    """The folders in ``folder``, each of which holds the images of a class: sorted."""
    with _readable(str(folder)):
        return sorted(entry.name for entry in _entries(str(folder)) if os.path.isdir(entry))


def holds_images(folder: Path) -> bool:
    """Whether image files lie in ``folder`` itself."""
    with _readable(str(folder)):
        return any(_is_image(entry) for entry in _entries(str(folder)))


def common_folders(folder: Path, classes: Sequence[str]) -> list[str]:
    """The folders of images in each class's folder, where these are several, the same in all, and all that they hold.

    Then those are likely the classes. One alone may well be in each: Tiny ImageNet has ``images/`` in every class.
    """
    common: list[str] = []
    for name in classes:
        place = folder / name
        if holds_images(place):
            return []
        inner = [entry for entry in class_names(place) if any(True for _ in image_paths(place / entry))]
        if len(inner) < 2 or (common and inner != common):
            return []
        common = inner
    return common


def labelled_files(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The image files of each class, with its number: class by class. What is left out of other files is told.

    Raises:
        ArtifactError: A class has none.
    """
    files, others = [], Counter[str]()
    for label, name in enumerate(classes):
        paths = sorted(image_paths(folder / name, others), key=os.path.split)
        if not paths:
            raise ArtifactError(f"{folder}: no image files of class {name}", SUPPORTED)
        files += [(path, label) for path in paths]
    _tell(folder, others)
    return files


def mixed(files: Sequence[T]) -> list[T]:
    """The files in an order that looks random and is always the same.

    On disk they lie class by class, and sets that are too large for the memory are read in stretches.
    """
    return [files[index] for index in np.random.default_rng(0).permutation(len(files))]


def common_shape(paths: Sequence[str]) -> tuple[Shape, str]:
    """The shape that suits image files: the median height and width, with colour where any has it.

    At most 1,000 of them are looked at, evenly chosen.

    Returns:
        The shape, and what is to be said of it, nothing where all have it.
    """
    count = min(len(paths), _LOOKED_AT)
    with ThreadPoolExecutor() as pool:
        shapes = list(pool.map(_shape, (paths[index * len(paths) // count] for index in range(count))))
    channels, heights, widths = zip(*shapes, strict=True)
    shape = max(channels), statistics.median_low(heights), statistics.median_low(widths)
    if set(shapes) == {shape}:
        return shape, ""
    taken = f"all are taken as {' x '.join(map(str, shape))} (channels, height, width)"
    return shape, f"images of several sizes or colours: {taken}, the middle of {count:,}; --input-size says otherwise"


def check_channels(name: str, shape: Shape, files: bool = True) -> None:
    """Raise :class:`ArtifactError` where no image has so many channels: of files, or of what is grey or RGB."""
    if shape[0] not in MODES or (shape[0] == 4 and not files):
        raise ArtifactError(f"{name}: images can have {'1, 3 or 4' if files else '1 or 3'} channels, not {shape[0]}")


def image_paths(folder: Path, others: Counter[str] | None = None) -> Iterator[str]:
    """Every image file below a folder. Links are followed, but to no folder twice, nor to one that it lies in.

    Args:
        folder: Where to begin.
        others: Where files that are passed over are counted, by their extensions.
    """
    start = folder.resolve()
    seen, folders = {*start.parents}, [str(folder)]
    while folders:
        place = folders.pop()
        if (real := Path(place).resolve()) not in seen:
            seen.add(real)
            with _readable(place):
                for entry in sorted(_entries(place), key=lambda entry: entry.name, reverse=True):
                    if _is_image(entry):
                        yield entry.path
                    elif os.path.isdir(entry):
                        folders.append(entry.path)
                    elif others is not None and os.path.isfile(entry):
                        others[os.path.splitext(entry.name)[1].lower() or _unnamed(entry.name)] += 1


def _unnamed(name: str) -> str:
    return name.lower() if name.lower() in _BESIDE else "no extension"


def _tell(folder: Path, others: Counter[str]) -> None:
    """Say which files of a folder are no images that are read: what is worth a word, the most frequent first."""
    counts = sorted(
        ((count, kind) for kind, count in others.items() if kind not in _BESIDE), key=lambda c: (-c[0], c[1])
    )
    if counts:
        first, kind = counts[0]
        files = f"{first:,} file{'s' if first > 1 else ''} of {kind}"
        LOG.warning("%s: left out: %s", folder, some([files, *(f"{count:,} of {kind}" for count, kind in counts[1:])]))


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether it is called like an image, and is a file: a pipe or a device would never end."""
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS and os.path.isfile(entry)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, without what is hidden, as copies and indices of systems and editors are."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(_HIDDEN)]


def fingerprint(path: str) -> tuple[int, str]:
    """The size of a file, and the sha256 of what is in it.

    Of more than 64 KiB only the first, the middle and the last 16 count, so that a large set takes seconds: in formats
    that compress, other pixels make another file there too, or one of another size. Of others all counts.
    """
    with _readable(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= 4 * _BLOCK or path.lower().endswith(_PLAIN):
            return size, sha256(file.read()).hexdigest()
        digest = sha256()
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
            file.seek(start)
            digest.update(file.read(_BLOCK))
        return size, digest.hexdigest()


@contextlib.contextmanager
def _open(path: str) -> Iterator[Image.Image]:
    # Not by its path: Pillow would map TIFF files into memory, and turn those upright in the wrong way.
    with _readable(path), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _shape(path: str) -> Shape:
    """As the image is to be seen; of its header alone, for most formats."""
    with _open(path) as image:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        return 1 if Image.getmodebase(image.mode) == "L" else 3, height, width


def _decode(path: str, shape: Shape) -> Tensor:
    """Read one image file to uint8 ``shape``: upright, its shortest side is resized and its centre kept."""
    channels, height, width = shape
    with _open(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        image = _eight_bits(file)
        if channels == 4 and "A" not in image.getbands() and "transparency" not in image.info:
            raise ValueError("it has no fourth channel")  # of whatever kind: nobody says that it is opacity
        image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image whose pixels are 0 to 255. Pillow itself would cut off what is larger."""
    # PNG has no more than 16 bits; of PPM and its kin, Pillow makes 0 to 65,535 of whatever the file's maximum is.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert them to 8 or 16 bits")
    return image


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Make whatever the system or a decoder says of a file or folder one line."""
    try:
        yield
    except (DfkdError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ArtifactError(f"{path}: not readable ({error.strerror})", "replace or remove it") from None
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ArtifactError(f"{path}: not readable as an image{reason}", f"replace or remove it; {SUPPORTED}") from None
