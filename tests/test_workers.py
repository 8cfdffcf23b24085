"""Processes that carry out calls: what each has to itself, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfkd_cli.workers import Workers


def note(file: str, until: str) -> None:
    """Write down the GPU that this process sees, and wait for another file."""
    Path(file).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while not Path(until).exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_a_call_has_the_gpu_that_nobody_has(tmp_path, monkeypatch):
    """Whatever has ended meanwhile. No GPU is needed to number them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    def submit(name: str) -> None:
        workers.submit(name, note, str(tmp_path / name), str(tmp_path / f"{name} may end"))

    with Workers(2) as workers:
        for name, ends in (("long", None), ("first", "first"), ("second", "second"), ("third", "long")):
            submit(name)
            if ends is not None:
                (tmp_path / f"{ends} may end").touch()
                assert workers.next() == (ends, None)
        (tmp_path / "third may end").touch()
        assert workers.next() == ("third", None)
    seen = {name: (tmp_path / name).read_text() for name in ("long", "first", "second", "third")}
    assert seen == {"long": "3", "first": "5", "second": "5", "third": "5"}


RACE = """
import os, signal
from dfkd_cli.processes import ignore_signals, stop_on_signals
from dfkd_cli.errors import Interrupted
stop_on_signals()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
    for _ in range(100000): pass
except Interrupted as error:
    print(error.signum)
ignore_signals()
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_two_signals_at_once_are_one(tmp_path):
    """As a terminal's Ctrl-C and a parent that ends its workers are."""
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.split("\n", 1)
    assert int(first) in (signal.SIGINT, signal.SIGTERM) and last == "goes on\n"
