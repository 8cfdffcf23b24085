"""Processes that carry out calls: what each has to itself, and how they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipeline import HANGS

from dfkd_cli import processes
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


def note_threads(file: str) -> None:
    """Write down with how many threads this process computes."""
    Path(file).write_text(str(torch.get_num_threads()))


@pytest.mark.slow
@pytest.mark.parametrize(("said", "each"), [(3, 3), (None, 2)])
def test_a_process_has_the_threads_that_are_said_or_its_share(said, each, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Workers(2, threads=said) as workers:
            for name in ("first", "second"):
                workers.submit(name, note_threads, str(tmp_path / name))
            assert {workers.next() for _ in range(2)} == {("first", None), ("second", None)}
    finally:
        torch.set_num_threads(before)
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == [str(each)] * 2


PARENT = """
import contextlib, time
from pathlib import Path
from dfkd_cli.errors import Interrupted
from dfkd_cli.processes import stop_on_signals
from dfkd_cli.workers import Workers

def live():
    Path("lives").touch()
    try:
        while Path("lives").exists():
            time.sleep(0.01)
    finally:
        Path("tidied").touch()

if __name__ == "__main__":
    stop_on_signals()
    with contextlib.suppress(Interrupted), Workers(2) as workers:
        workers.submit("call", live)
        workers.next()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(("signum", "tidied"), [(signal.SIGKILL, False), (signal.SIGTERM, True)])
def test_a_worker_ends_with_its_parent(signum, tidied, tmp_path):
    """At once where that was killed; where it was stopped, as a command that is stopped. Its stdout is the parent's."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        while not (tmp_path / "lives").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        parent.send_signal(signum)
        parent.communicate(timeout=HANGS)  # until nobody has it open any more
        assert (parent.returncode, (tmp_path / "tidied").exists()) == (0 if tidied else -signum, tidied)
    finally:
        (tmp_path / "lives").unlink(missing_ok=True)  # a worker that goes on ends
        parent.kill()


STARTING = PARENT.replace(
    "    stop_on_signals()\n",
    """    stop_on_signals()
    from multiprocessing import forkserver
    connect = forkserver._forkserver.connect_to_new_process

    def stop_when_connected(files):
        ends = connect(files)
        os.kill(os.getpid(), signal.SIGTERM)
        return ends

    forkserver.connect_to_new_process = stop_when_connected
""",
).replace("import contextlib, time", "import contextlib, os, signal, time")


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_worker_that_is_being_started_ends_without_a_word(tmp_path):
    """It waits for what it shall do at that time, and Python says of one whose parent has gone that its input ended."""
    (tmp_path / "parent.py").write_text(STARTING)
    done = subprocess.run([sys.executable, "parent.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


@pytest.mark.parametrize("dedicated", [True, False])
def test_what_a_command_imports_is_looked_through_once_it_ends(dedicated, monkeypatch):
    """In a process that is the command's alone."""
    monkeypatch.setattr(processes, "_dedicated", dedicated)
    frozen, ends = gc.get_freeze_count(), []
    monkeypatch.setattr(processes.atexit, "register", ends.append)
    with pytest.raises(ImportError), processes.lasting_imports():
        assert gc.isenabled() != dedicated
        raise ImportError
    assert gc.isenabled()
    assert (gc.get_freeze_count() > frozen, ends) == (dedicated, [gc.unfreeze] * dedicated)
