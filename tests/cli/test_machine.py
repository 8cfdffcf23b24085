"""What a machine and a terminal do to a command: streams, signals, lost processes, names, places that are gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Fork
from pipeline import HANGS, finish, run
from torchvision.io import write_png

from dfkd_cli.errors import ArtifactError, RunFailed, machine_can_fail

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX streams and signals")
FULL = "error: the answer cannot be written to stdout (No space left on device)"
DISTILL = ["--transfer-set", "noise:32", "--steps", "4", "--batch-size", "8", "--device", "cpu", "--out", "student"]


def shell(line: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A line of shell in which ``dfkd`` is the command."""
    function = f'dfkd() {{ {sys.executable} -m dfkd_cli "$@"; }}; {line}'
    command = ["bash", "-c", function, "bash", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=HANGS)


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("command", "code"), [("--version", 0), ("ls", 0), ("ls --json", 0), ("cp nothing x --json", 2), ("--nothing", 2)]
)
def test_no_stream_has_to_be_there(command: str, code: int, tmp_path: Path) -> None:
    """Only an answer that does not arrive is a failure; an error's code stays its own."""
    whole = shell(f"dfkd {command}", tmp_path)
    assert whole.returncode == code
    for closed in ("<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"):
        done = shell(f"dfkd {command} {closed}", tmp_path)
        assert done.returncode == code, closed + done.stderr
        assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else whole.stdout)
        assert done.stderr == ("" if "2>" in closed else whole.stderr)
    full = shell(f"dfkd {command} >/dev/full", tmp_path)
    assert (full.returncode, full.stderr[: len(FULL)]) == (
        (4, FULL) if code == 0 else (code, whole.stderr[: len(FULL)])
    )
    assert full.stderr.count("\n") == 1
    assert shell(f"dfkd {command} >/dev/full 2>/dev/full", tmp_path).returncode == full.returncode
    unread = shell(f"exec 3> >(exec true); wait $!; dfkd {command} >&3; echo $? >&2", tmp_path)
    assert unread.stderr.splitlines()[-1] == str(code or 141)
    assert "Traceback" not in unread.stderr


def test_a_file_does_not_take_the_place_of_a_stream(tmp_path: Path) -> None:
    """What libraries write to a stream that is closed must not end in an artifact."""
    show = "import os; print(os.readlink('/proc/self/fd/1'), os.readlink('/proc/self/fd/2'))"
    script = "from dfkd_cli.streams import open_streams; open_streams(False); import subprocess, sys; "
    script += f"subprocess.run([sys.executable, '-c', {show!r}], stdout=open('seen', 'w'))"
    assert shell(f'{sys.executable} -c "$1" >&- 2>&-', tmp_path, script).returncode == 0
    assert (tmp_path / "seen").read_text().split()[1] == os.devnull


def test_work_is_kept_where_its_answer_does_not_arrive(teacher: Path, tmp_path: Path) -> None:
    process = Fork(["distill", "--teacher", str(teacher), *DISTILL], tmp_path, stdout=Path("/dev/full"))
    _, err = process.communicate(timeout=HANGS)
    assert (process.returncode, err.splitlines()[-1][: len(FULL)]) == (4, FULL)
    assert json.loads((tmp_path / "student" / "run.json").read_text())["status"] == "done"


# -- signals and processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_modules_are_imported(signum: signal.Signals, tmp_path: Path) -> None:
    """An exception would be lost there. The torch of this test is the moment at which the signal comes."""
    (tmp_path / "torch.py").write_text(
        f"import os, sys\ntry:\n    os.kill(os.getpid(), {int(signum)})\nexcept BaseException:\n    pass\nos._exit(7)"
    )
    done = shell("dfkd train-teacher --json", tmp_path)
    assert done.returncode == 128 + signum
    assert done.stderr == "error: stopped; what was finished is kept -- the same command continues\n"
    assert json.loads(done.stdout)["error"]["code"] == "interrupted"
    if signum == signal.SIGHUP:
        assert shell("trap '' HUP; dfkd train-teacher", tmp_path).returncode == 7  # as under nohup


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="finds processes in /proc")
def test_a_killed_process_fails_the_run(teacher: Path, tmp_path: Path) -> None:
    """--devices 2: exit 4, one line, and what is recorded; not SIGKILL for all of them."""
    command = ["distill", "--teacher", str(teacher), *DISTILL]
    process = Fork([*command, "--devices", "2"], tmp_path)
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
    while not children.read_text():
        assert process.poll() is None
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 4
    assert err == "error: a process was killed -- out of memory? let fewer work at a time; the same command continues\n"
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert (record["status"], record["error"].split(" --")[0]) == ("failed", "a process was killed")
    finish(command, tmp_path)


# -- places and names --------------------------------------------------------------------------------------------------


def test_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell('cd gone; rmdir "$PWD"; dfkd train-teacher', tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory was removed -- change into one that exists\n"


def test_what_the_machine_refuses_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Is a directory"), machine_can_fail():
        tmp_path.read_bytes()
    with pytest.raises(ArtifactError, match="File name too long"), machine_can_fail():
        (tmp_path / ("x" * 999)).stat()
    if Path("/dev/full").exists():
        with pytest.raises(RunFailed, match="No space left"), machine_can_fail(), open("/dev/full", "wb", 0) as full:
            full.write(b"x")
    with pytest.raises(RunFailed, match="libtorch_cuda: failed to map"), machine_can_fail():  # as under ulimit -v
        raise ImportError("libtorch_cuda: failed to map segment from shared object")
    with pytest.raises(ModuleNotFoundError), machine_can_fail():
        raise ModuleNotFoundError("No module named 'torch'")
    with pytest.raises(OSError, match="truncated"), machine_can_fail():  # no system call said so
        raise OSError("image file is truncated")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """As inputs, outputs and classes; in JSON an escape stands for what no text can hold, and gives the name back."""
    home, strange = tmp_path / os.fsdecode(b"n\xff"), os.fsdecode(b"caf\xe9")
    try:
        (home / "data").mkdir(parents=True)
    except OSError:
        pytest.skip("the file system has no such names")
    for split in ("train", "test"):
        for label in (strange, "b"):
            (home / "data" / split / label).mkdir(parents=True)
            for index in range(4):
                image = home / "data" / split / label / os.fsdecode(b"\xfe%d.png" % index)
                write_png(torch.randint(256, (1, 32, 32), dtype=torch.uint8), str(tmp_path / "image.png"))
                (tmp_path / "image.png").rename(image)
    small = ["--batch-size", "4", "--steps", "2"]
    finish(["train-teacher", "--dataset", str(home / "data"), *small, "--out", str(home / "t")], tmp_path)
    shards = ["--num-images", "4", "--batch-size", "4", "--iterations", "2"]
    teacher = ["--teacher", str(home / "t")]
    finish(["synthesize", "--method", "zskd", *teacher, *shards, "--out", str(home / "sh")], tmp_path)
    sets = ["--transfer-set", str(home / "sh"), str(home / "data" / "train")]
    finish(["distill", *teacher, *sets, *small, "--out", str(home / "s")], tmp_path)
    done = run(["evaluate", str(home / "s"), "--json"], tmp_path)
    (result,) = json.loads(done.stdout)["results"]
    assert (result["path"], strange in result["per_class"]) == (str(home / "s"), True)
    assert result["agreement"] is not None
    finish(["compare", str(home / "s"), "--out", str(home / "c")], tmp_path)
    assert "caf" in (home / "c" / "results.json").read_text()
    assert run(["info", str(home / "s")], tmp_path).returncode == 0
