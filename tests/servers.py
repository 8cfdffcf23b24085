"""Real servers on this machine for tests of URLs, and what stands between them and a command."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KEY, SECRET = "a-key", "a-secret-of-s3"
USER, PASSWORD = "a-user", "a-secret-of-sftp"
OPTIONS = {"s3": ("--auth-key", f"{KEY},{SECRET}"), "sftp": ("--user", USER, "--pass", PASSWORD)}


class Serving:
    """A server of a directory, by rclone, in a process of its own.

    Args:
        protocol: ``s3``, where folders are buckets, or ``sftp``.
        root: What it serves.
        home: Where it keeps its keys.
    """

    def __init__(self, protocol: str, root: Path, home: Path) -> None:
        program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{_path()}")
        if program is None:
            pytest.fail("no rclone: pip install -e '.[dev]'")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # Names of files are not to be remembered: tests change what is there.
        options = ("--addr", f"127.0.0.1:{self.port}", "--dir-cache-time", "0s", "--config", str(home / "rclone.conf"))
        self.command = [program, "serve", protocol, str(root), *options, *OPTIONS[protocol]]
        self.variables = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PATH": _path()}
        self.start()

    def start(self) -> None:
        """Start it, for the first time or once more."""
        self.process = subprocess.Popen(self.command, env=self.variables, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
        raise RuntimeError(f"{' '.join(self.command)} ended")

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def _path() -> str:
    import os

    return os.environ.get("PATH", "")


@contextlib.contextmanager
def wire(server: Serving, most: int, then: Callable[[], None]) -> Iterator[int]:
    """A port that leads to a server: when so many bytes have come from there, something happens, and no more come.

    Args:
        server: Where it leads to.
        most: Bytes.
        then: What happens.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    lock, state = threading.Lock(), {"bytes": 0, "cut": False}

    def carry(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                with lock:
                    if counted:
                        state["bytes"] += len(data)
                    if state["bytes"] > most and not state["cut"]:
                        state["cut"] = True
                        then()
                if state["cut"]:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                try:
                    behind = socket.create_connection(("127.0.0.1", server.port))
                except OSError:
                    client.close()
                    continue
                for ends in ((client, behind, False), (behind, client, True)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()
