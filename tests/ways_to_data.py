"""A network of the user's whose factory tries every way to read a private file, and swallows what happens.

Environment: ``PRIVATE``, a directory that :func:`prepare` fills; ``OUTSIDE``, one beside it with copies and links;
``SERVER``, the port of one who tells; ``DESCRIPTOR``, the number of the file, open. Standard input is the file too.
The last line on stderr says of each way, in JSON, ``read`` or how it ended.
"""

# ruff: noqa: SIM115  # what is tried here ends with its process
from __future__ import annotations

import asyncio
import codecs
import contextlib
import ctypes
import fileinput
import gzip
import io
import json
import linecache
import lzma
import mmap
import multiprocessing
import os
import runpy
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import safetensors
import safetensors.torch
import torch
import torchvision.io
from torch import nn

MARK = b"private pixels of somebody"
PRIVATE, OUTSIDE = Path(os.environ.get("PRIVATE", "private")), Path(os.environ.get("OUTSIDE", "outside"))
FILE = PRIVATE / "images" / "one"
TRIED: dict[str, str] = {}


def prepare() -> None:
    """Make the private files in every format, and what lies outside."""
    FILE.parent.mkdir(parents=True)
    OUTSIDE.mkdir()
    pixels = np.frombuffer(MARK, np.uint8).reshape(2, 13)
    FILE.write_bytes(MARK)
    for copy in (FILE.with_name("moved"), FILE.with_name("moved-by-c"), OUTSIDE / "copy"):
        copy.write_bytes(MARK)
    np.save(f"{FILE}.npy", pixels)
    np.savez(f"{FILE}.npz", pixels=pixels)
    torch.save(torch.tensor(pixels), f"{FILE}.pt")
    safetensors.torch.save_file({"pixels": torch.tensor(pixels)}, f"{FILE}.safetensors")
    PIL.Image.fromarray(pixels).save(f"{FILE}.png")
    Path(f"{FILE}.py").write_text(f"pixels = {MARK!r}\n")
    with zipfile.ZipFile(f"{FILE}.zip", "w") as archive:
        archive.writestr("one", MARK)
    with tarfile.open(f"{FILE}.tar", "w") as archive:
        archive.add(FILE, "one")
    Path(f"{FILE}.gz").write_bytes(gzip.compress(MARK))
    Path(f"{FILE}.xz").write_bytes(lzma.compress(MARK))
    with contextlib.closing(sqlite3.connect(f"{FILE}.db")) as database, database:
        database.execute("create table images (pixels)")
        database.execute("insert into images values (?)", (MARK,))
    (OUTSIDE / "link").symlink_to(PRIVATE)
    os.link(FILE, OUTSIDE / "hard")


def _descend(start: str) -> bytes:
    directory = os.open(start, os.O_RDONLY | os.O_DIRECTORY)
    return os.read(os.open(os.path.relpath(FILE, start), os.O_RDONLY, dir_fd=directory), 99)


def _images() -> int:
    return os.open(FILE.parent, os.O_PATH)


def _in_thread() -> bytes:
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(FILE.read_bytes()))
    thread.start()
    thread.join()
    return read[0]


def _from_child(read: Callable[[], bytes]) -> bytes:
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.write(theirs, read())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    return os.read(ours, 99)


def _by_c() -> bytes:
    library, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(99)
    library.read(library.open(os.fsencode(FILE), os.O_RDONLY), buffer, 99)
    return buffer.raw


def _by_stdio() -> bytes:
    library, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(99)
    library.fopen.restype = ctypes.c_void_p
    file = library.fopen(os.fsencode(FILE), b"rb")
    if file:
        library.fread(buffer, 1, 99, ctypes.c_void_p(file))
    return buffer.raw


def _after_c(call: str, source: Path, target: Path) -> bytes:
    getattr(ctypes.CDLL(None), call)(os.fsencode(source), os.fsencode(target))
    try:
        return target.read_bytes()
    finally:
        getattr(ctypes.CDLL(None), call)(os.fsencode(target), os.fsencode(source))


def _moved() -> bytes:
    source, target = FILE.with_name("moved"), OUTSIDE / "moved"
    source.rename(target)
    try:
        return target.read_bytes()
    finally:
        target.rename(source)


def _linked() -> bytes:
    (OUTSIDE / "new").hardlink_to(FILE)
    return (OUTSIDE / "new").read_bytes()


def _copied() -> bytes:
    return Path(shutil.copyfile(FILE, OUTSIDE / "copied")).read_bytes()


def _from_within() -> bytes:
    with contextlib.chdir(FILE.parent):
        return Path("one").read_bytes()


def _spawned() -> bytes:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    code = f"pipe.send_bytes(open({str(FILE)!r}, 'rb').read())"
    process = context.Process(target=exec, args=(code, {"pipe": theirs}))
    process.start()
    theirs.close()
    try:
        return ours.recv_bytes()
    finally:
        process.join()


async def _awaited() -> bytes:
    return await asyncio.to_thread(FILE.read_bytes)


def _unsealed() -> bytes:
    from dfkd_cli.data import seal

    active, seal._active = seal._active, ()
    try:
        return FILE.read_bytes()
    finally:
        seal._active = active


def _mounted() -> bytes:
    (OUTSIDE / "mount").mkdir()
    ctypes.CDLL(None).mount(os.fsencode(PRIVATE), os.fsencode(OUTSIDE / "mount"), None, 4096, None)
    try:
        return (OUTSIDE / "mount" / "images" / "one").read_bytes()
    finally:
        ctypes.CDLL(None).umount(os.fsencode(OUTSIDE / "mount"))


def _fetched() -> bytes:
    with socket.create_connection(("127.0.0.1", int(os.environ["SERVER"])), timeout=30) as connection:
        return connection.recv(99)


def _lazily() -> bytes:
    with safetensors.safe_open(f"{FILE}.safetensors", "np") as file:
        return file.get_tensor("pixels").tobytes()


def _database() -> bytes:
    with contextlib.closing(sqlite3.connect(f"{FILE}.db")) as database:
        return database.execute("select pixels from images").fetchone()[0]


def _tar() -> bytes:
    with tarfile.open(f"{FILE}.tar") as archive:
        return archive.extractfile("one").read()


def _mapped() -> bytes:
    with FILE.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:]


def _lines() -> bytes:
    with fileinput.input(FILE, mode="rb") as lines:
        return b"".join(lines)


def _program(*words: str) -> Callable[[], bytes]:
    return lambda: subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True).stdout


PYTHON = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
WAYS: dict[str, Callable[[], bytes]] = {
    "open": lambda: open(FILE, "rb").read(),
    "open, a path of bytes": lambda: open(os.fsencode(FILE), "rb").read(),
    "FileIO": lambda: io.FileIO(FILE).readall(),
    "open_code": lambda: io.open_code(str(FILE)).read(),
    "Path": FILE.read_bytes,
    "codecs": lambda: codecs.open(str(FILE)).read().encode(),
    "linecache": lambda: linecache.getline(str(FILE), 1).encode(),
    "fileinput": _lines,
    "os.open": lambda: os.read(os.open(FILE, os.O_RDONLY), 99),
    "to read and write": lambda: os.read(os.open(FILE, os.O_RDWR), 99),
    "mmap": _mapped,
    "running it": lambda: runpy.run_path(f"{FILE}.py")["pixels"],
    "NumPy, memory-mapped": lambda: np.memmap(FILE, mode="r").tobytes(),
    "NumPy, raw": lambda: np.fromfile(FILE, np.uint8).tobytes(),
    "NumPy": lambda: np.load(f"{FILE}.npy").tobytes(),
    "NumPy, zipped": lambda: np.load(f"{FILE}.npz")["pixels"].tobytes(),
    "torch": lambda: torch.load(f"{FILE}.pt").numpy().tobytes(),
    "torch, memory-mapped": lambda: torch.load(f"{FILE}.pt", mmap=True).numpy().tobytes(),
    "a mapped tensor": lambda: torch.from_file(str(FILE), size=len(MARK), dtype=torch.uint8).numpy().tobytes(),
    "a mapped storage": lambda: bytes(torch.UntypedStorage.from_file(str(FILE), False, len(MARK))),
    "torchvision's reader": lambda: torchvision.io.read_file(str(FILE)).numpy().tobytes(),
    "an image by torchvision": lambda: torchvision.io.read_image(f"{FILE}.png").numpy().tobytes(),
    "an image": lambda: PIL.Image.open(f"{FILE}.png").tobytes(),
    "safetensors": lambda: safetensors.torch.load_file(f"{FILE}.safetensors")["pixels"].numpy().tobytes(),
    "safetensors, lazily": _lazily,
    "zip": lambda: zipfile.ZipFile(f"{FILE}.zip").read("one"),
    "tar by Python": _tar,
    "gzip": lambda: gzip.open(f"{FILE}.gz").read(),
    "lzma": lambda: lzma.open(f"{FILE}.xz").read(),
    "a database": _database,
    "a link to the directory": (OUTSIDE / "link" / "images" / "one").read_bytes,
    "a relative path": lambda: Path(os.path.relpath(FILE)).read_bytes(),
    "from within": _from_within,
    "the link to the working directory": lambda: Path(f"/proc/self/cwd/{os.path.relpath(FILE)}").read_bytes(),
    "the link to the root": lambda: Path(f"/proc/self/root{FILE}").read_bytes(),
    "the parent's root": lambda: Path(f"/proc/{os.getppid()}/root{FILE}").read_bytes(),
    "a directory's descriptor": lambda: _descend(str(PRIVATE.parent)),
    "the root's descriptor": lambda: _descend("/"),
    "an opener": lambda: open("one", "rb", opener=lambda name, flags: os.open(name, flags, dir_fd=_images())).read(),
    "a copy": _copied,
    "a copy elsewhere": (OUTSIDE / "copy").read_bytes,
    "a hard link": _linked,
    "a hard link that was there": (OUTSIDE / "hard").read_bytes,
    "a rename": _moved,
    "a rename by C": lambda: _after_c("rename", FILE.with_name("moved-by-c"), OUTSIDE / "moved-by-c"),
    "a thread": _in_thread,
    "a pool of threads": lambda: ThreadPoolExecutor(1).submit(FILE.read_bytes).result(),
    "asyncio": lambda: asyncio.run(_awaited()),
    "a forked process": lambda: _from_child(FILE.read_bytes),
    "a forked process without audit": lambda: _from_child(_by_c),
    "a spawned process": _spawned,
    "another program": _program("cat", str(FILE)),
    "dd": _program("dd", f"if={FILE}", "status=none"),
    "a shell": lambda: os.popen(f"cat {FILE}").read().encode(),
    "a script of the shell": _program("sh", "-c", f"exec < '{FILE}'; cat"),
    "another Python": _program(sys.executable, "-c", PYTHON, str(FILE)),
    "the C library": _by_c,
    "fopen of C": _by_stdio,
    "taking the seal off": _unsealed,
    "mounting it elsewhere": _mounted,
    "a socket": _fetched,
    "an inherited descriptor": lambda: os.pread(int(os.environ["DESCRIPTOR"]), 99, 0),
    "the path of a descriptor": lambda: Path(f"/proc/self/fd/{os.environ['DESCRIPTOR']}").read_bytes(),
    "standard input": lambda: os.pread(0, 99, 0),
    "names": lambda: MARK if os.listdir(PRIVATE) else b"",
    "names by scandir": lambda: MARK if list(os.scandir(PRIVATE)) else b"",
}


def outcome(way: Callable[[], bytes]) -> str:
    """What came of a way."""
    try:
        content = way()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read" if content.startswith(MARK) else f"{content!r}"


def build(num_classes: int) -> nn.Module:
    """A linear classifier, after every way was tried."""
    if not TRIED:
        TRIED.update({name: outcome(way) for name, way in WAYS.items()})
        sys.stderr.write(f"\n{json.dumps(TRIED)}\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, num_classes))
