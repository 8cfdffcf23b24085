"""What the kernel lets data-free commands read, and what they say when code tries to read more."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import ways_to_data
from pipeline import edit
from ways_to_data import MARK, WAYS

import dfkd_cli
from dfkd_cli import urls
from dfkd_cli.data import landlock
from dfkd_cli.data.access import access
from dfkd_cli.settings import resolve

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
FOREIGN = ["--input-size", "1", "32", "32", "--num-classes", "10"]
NOISE = ["synthesize", "--method", "noise", "--num-images", "2", "--batch-size", "2"]
NETWORK = """
import contextlib, torch
def build(num_classes):
    {body}
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, num_classes))
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with weights of a linear network."""
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file({"1.weight": torch.zeros(10, 1024), "1.bias": torch.zeros(10)}, "net.safetensors")
    return tmp_path


def network(name: str, body: str) -> list[str]:
    """The flags of a teacher whose factory does something first."""
    Path(name).write_text(NETWORK.format(body=body.replace("\n", "\n    ")))
    return ["--teacher", f"./{name}:build", "--weights", "net.safetensors", *FOREIGN]


def swallowed(call: str) -> str:
    """Code that tries something and goes on whatever comes of it."""
    return f"with contextlib.suppress(Exception):\n    {call}"


def record(out: str) -> dict:
    return json.loads(Path(out, "run.json").read_text())


@contextlib.contextmanager
def teller() -> Iterator[int]:
    """The port of a server that tells everybody what is private."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def tell() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(MARK)

        threading.Thread(target=tell, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@needs_landlock
def test_no_way_leads_to_data_that_the_command_does_not_name(here, monkeypatch):
    """Python knows nothing of the private directory: the kernel alone refuses. Unsealed, every way leads there."""
    monkeypatch.setattr(ways_to_data, "PRIVATE", here / "private")
    monkeypatch.setattr(ways_to_data, "OUTSIDE", here / "outside")
    monkeypatch.setattr(ways_to_data, "FILE", here / "private" / "images" / "one")
    ways_to_data.prepare()
    (here / "work").mkdir()  # of directories of code, all names beneath can be listed
    shutil.copy("net.safetensors", "work")
    monkeypatch.chdir(here / "work")

    def outcomes(*command: str) -> dict[str, str]:
        with teller() as port, (here / "private" / "images" / "one").open("rb") as file:
            variables = {
                "PRIVATE": str(here / "private"), "OUTSIDE": str(here / "outside"),
                "SERVER": str(port), "DESCRIPTOR": str(file.fileno()),
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "dfkd_cli", *command], env=os.environ | variables, stdin=file,
                pass_fds=[file.fileno()], capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (told,) = (line for line in done.stderr.splitlines() if line.startswith('{"'))
        return json.loads(told)

    spec = f"{ways_to_data.__file__}:build"
    teacher = ["--teacher", spec, "--weights", "net.safetensors", *FOREIGN]
    sealed = outcomes(*NOISE, *teacher)
    assert sealed.keys() == WAYS.keys()
    assert [way for way, outcome in sealed.items() if outcome == "read"] == []
    assert {key: record("shards")[key] for key in ("data_free", "sealed")} == {"data_free": True, "sealed": "landlock"}
    free = outcomes("train-teacher", "--model", spec, "--steps", "1", "--batch-size", "2")
    assert {way for way, outcome in free.items() if outcome != "read"} <= {"mounting it elsewhere"}


@needs_landlock
@pytest.mark.parametrize("extra", [(), ("--devices", "2", "--logger", "tensorboard"), ("--dry-run",)])
def test_what_a_command_names_can_be_read(here, dfkd, extra):
    """Code with modules and packages beside it, links in a named directory, and only its output is written."""
    Path("layers").mkdir()
    Path("layers/flat.py").write_text("from torch.nn import Flatten")
    Path("more.py").write_text("from layers.flat import Flatten")
    teacher = network("net.py", "from more import Flatten")
    Path("private.txt").write_text("x")
    done = dfkd(*NOISE, "--num-images", "4", *teacher, "--out", "a/b", *extra, cwd=here)
    assert done.returncode == 0, done.stderr
    assert Path("a").exists() == ("--dry-run" not in extra)
    if Path("a").exists():
        again = dfkd(*NOISE, "--num-images", "4", *teacher, "--out", "a/b", "--dry-run", *extra, cwd=here)
        assert again.returncode == 0, again.stderr
        assert record("a/b")["sealed"] == "landlock"
        assert not Path("a/b/.scratch").exists()
    code = network("curious.py", "open('private.txt')")
    done = dfkd(*NOISE, *code, "--out", "c/d", cwd=here)
    assert (done.returncode, Path("c").exists()) == (4, False), done.stderr
    assert "private.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_landlock
def test_code_of_the_working_directory_can_be_imported_and_no_data_there_read(here, dfkd):
    """As ``dfkd`` is started: without the working directory among the places of modules."""
    for folder in ("models", "utils", "data", "plain", "src/parts"):
        Path(folder).mkdir(parents=True)
        Path(folder, "private.txt").write_text("x")
    Path("utils/layers.py").write_text("from torch.nn import Flatten")
    Path("src/parts/more.py").write_text("from torch.nn import Linear")
    Path("src/private.txt").write_text("x")
    Path("data/private.py").write_text("x = 1")
    Path("private.txt").write_text("x")
    Path("models/net.json").write_text("{}")
    Path("models/private.json").write_bytes(bytes(2**16))
    Path("models/link.json").symlink_to("../private.txt")
    env = {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(Path(dfkd_cli.__file__).parents[1]),
        "DFKD_DATA": str(here / "data"),
    }
    reads = """from utils.layers import Flatten
from src.parts.more import Linear
import os, dfkd_cli.data.seal as seal
open("models/net.json").close()  # small settings beside the code
seal._active = ()  # what Python keeps: the kernel alone is left
for way in (open, os.open):
    for name in ("private.txt", "plain/private.txt", "src/private.txt", "data/private.txt", "data/private.py",
                 "models/private.json", "models/link.json"):
        try:
            way(name, *([os.O_RDONLY] if way is os.open else []))
            raise RuntimeError(f"read {name}")
        except PermissionError:
            pass"""
    done = dfkd(*NOISE, *network("models/net.py", reads), cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    assert record("shards")["sealed"] == "landlock"


@needs_landlock
def test_a_named_directory_of_links_can_be_read(here, teacher, dfkd):
    Path("cache").mkdir()
    for number, file in enumerate(sorted(teacher.iterdir())):
        Path("cache", str(number)).write_bytes(file.read_bytes())
        Path("model").mkdir(exist_ok=True)
        Path("model", file.name).symlink_to(Path("..", "cache", str(number)))
    done = dfkd(*NOISE, "--teacher", "model", cwd=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kept", ["landlock", "python"])
def test_a_refusal_that_was_swallowed_ends_the_run(here, monkeypatch, dfkd, cli, kept):
    """In synthesis, in a student's code too, and in distillation, where images are answered as well."""
    if kept == "landlock" and not landlock.version():
        pytest.skip("this kernel has no Landlock")

    def command(*arguments: str) -> tuple[int, str]:
        if kept == "python":  # called in a process that goes on afterwards
            code, _, err = cli(*arguments)
            return code, err
        done = dfkd(*arguments, cwd=here)
        return done.returncode, done.stderr

    monkeypatch.setenv("DFKD_DATA", str(here / "data"))
    Path("data").mkdir()
    Path("data/x").write_bytes(b"x")
    plain = network("plain.py", "pass")
    assert command(*NOISE, *plain)[0] == 0
    assert record("shards")["sealed"] == kept
    code, err = command(*NOISE, *network("net.py", swallowed("open('data/x')")), "--out", "built")
    assert (code, "data/x was opened although synthesize is data-free" in err) == (4, True), err
    assert not Path("built").exists()
    student = ["--student", "./net.py:build", "--steps", "2", "--batch-size", "2", "--holdout", "0"]
    code, err = command("distill", *plain, *student)
    assert (code, "data/x was opened" in err, Path("student").exists()) == (4, True, False), err
    student[1] = "./late.py:build"
    network("late.py", "return Late(torch.nn.Flatten(), torch.nn.Linear(1024, num_classes))")
    with Path("late.py").open("a") as file:
        file.write(
            "class Late(torch.nn.Sequential):\n    calls = 0\n\n    def forward(self, x):\n        self.calls += 1\n"
            "        if self.calls > 20:  # not while the network is looked at before the work starts\n"
            "            with contextlib.suppress(Exception):\n                open('data/x')\n"
            "        return super().forward(x)\n"
        )
    student[3] = "40"
    code, err = command("distill", *plain, *student)
    assert (code, "data/x was opened" in err) == (4, True), err
    assert {key: record("student")[key] for key in ("status", "data_free")} == {"status": "failed", "data_free": False}
    assert not Path("student/model.json").exists()


@needs_landlock
@pytest.mark.slow
def test_a_second_start_leaves_the_first_its_temporary_files(here, dfkd):
    """It is refused, and ends while the first one, whose function writes such files, still runs."""
    Path("box.py").write_text(
        "import os, tempfile, time, torch\n"
        "def ask(pixels):\n"
        "    while not os.path.exists('student/go'):\n        time.sleep(0.1)\n"
        "    with tempfile.TemporaryFile():\n        return torch.full((len(pixels), 10), 0.1)\n"
    )
    command = [
        "distill",
        "--teacher",
        "./box.py:ask",
        "--answers",
        "probabilities",
        *FOREIGN,
        "--transfer-set",
        "noise:4",
    ]
    command += ["--student", "lenet5-half", "--steps", "1", "--batch-size", "4", "--holdout", "0"]
    first = subprocess.Popen([sys.executable, "-m", "dfkd_cli", *command], stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not Path("student/run.json").exists():
        time.sleep(0.1)
    second = dfkd(*command, cwd=here)
    Path("student/go").touch()
    _, err = first.communicate()
    assert (second.returncode, "another process is writing here" in second.stderr) == (2, True), second.stderr
    assert first.returncode == 0, err
    assert not Path("student/.scratch").exists()


@needs_landlock
def test_a_file_of_the_users_with_our_name_stays(here, dfkd):
    Path("mine").mkdir()
    Path("mine", ".scratch").write_text("mine")
    done = dfkd(*NOISE, *network("net.py", "pass"), "--out", "mine", cwd=here)
    assert (done.returncode, "mine/.scratch is a file" in done.stderr) == (2, True), done.stderr
    assert Path("mine", ".scratch").read_text() == "mine"


def test_a_student_cannot_read_the_dataset_of_its_teacher_while_it_is_built(here, make_teacher, cli):
    """The teacher's record says where that lies."""
    Path("pets").mkdir()
    Path("pets/cat.png").write_bytes(b"x")
    Path("teacher").mkdir()
    for file in make_teacher("resnet8").iterdir():
        Path("teacher", file.name).write_bytes(file.read_bytes())
    model = json.loads(Path("teacher/model.json").read_text())
    model["provenance"]["dataset"] = str(here / "pets")
    Path("teacher/model.json").write_text(json.dumps(model))
    network("net.py", "open('pets/cat.png')")
    command = ["synthesize", "--method", "dafl", "--teacher", "teacher", "--student", "./net.py:build", "--steps", "1"]
    code, _, err = cli(*command)
    assert (code, "pets/cat.png was opened although" in err) == (4, True), err


@needs_landlock
def test_what_was_begun_without_the_kernel_is_not_said_to_be_kept_by_it(here, cli, dfkd):
    command = [*NOISE, "--num-images", "4", *network("net.py", "pass")]
    assert cli(*command)[0] == 0
    assert "already complete" in dfkd(*command, cwd=here).stderr
    edit(Path("shards/run.json"), status="interrupted")
    assert dfkd(*command, cwd=here).returncode == 0
    assert record("shards")["sealed"] == "python"


def test_commands_that_need_data_are_not_confined():
    for command, inputs in [
        ("train-teacher", {}),
        ("distill", {"transfer_set": ["real:20"]}),
        ("evaluate", {}),
        ("compare", {}),
    ]:
        assert access(resolve(command, [("", inputs)])) is None


PLACES = (".cache", "fontconfig"), (".cache", "matplotlib"), (".config", "matplotlib")


@needs_landlock
@pytest.mark.parametrize(("home", "more"), [("new", ""), ("/dev/null", ""), ("~", ""), ("new", "private")])
def test_libraries_have_where_to_write_about_fonts(here, home, more):
    """Also where the user has none of their directories yet, or cannot have them, or names one that holds anything."""
    draws = """
from dfkd_cli.data.access import Access
with Access((), (), "out", False, False, False, ()).confined():
    import matplotlib, os, sys
    fontconfig = os.path.expanduser("~/.cache/fontconfig")
    places = [matplotlib.get_configdir(), matplotlib.get_cachedir(), *filter(os.path.isdir, [fontconfig])]
    for place in places:
        open(os.path.join(place, "written"), "w").close()
    for name in sys.argv[1:]:
        try:
            open(os.path.join(name, "one"))
        except PermissionError:
            continue
        sys.exit(f"{name} was read")
"""
    Path("private").mkdir()
    Path("private/one").write_text("one")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    variables["HOME"] = str(here / "new") if home == "new" else home  # ~ stays ~ for who has no home
    variables |= {"MPLCONFIGDIR": str(here / more)} if more else {}
    done = subprocess.run(
        [sys.executable, "-c", draws, str(here / "private")], env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and not Path("out").exists() and not Path("~").exists()
    assert home != "new" or more or all(Path("new", *place, "written").exists() for place in PLACES)


@needs_landlock
def test_copies_of_what_lies_at_urls_can_be_read_among_datasets_and_nothing_beside_them(here, monkeypatch):
    place = here / "data" / "urls"
    for name in ("one", "other"):
        (place / name).mkdir(parents=True)
        (place / name / "file").write_text(name)
    (here / "data" / "images").write_text("private")
    monkeypatch.setenv(urls.COPIES, json.dumps({"s3://bucket/one": str(place / "one")}))
    monkeypatch.setenv("DFKD_DATA", str(here / "data"))
    reads = f"""
import json, os, pathlib, sys
from dfkd_cli.data.access import Access
from dfkd_cli.data.seal import sealed, sealed_places
says = {{}}
def read():
    for name in ("urls/one/file", "urls/other/file", "images"):
        try:
            says.setdefault(name, []).append(pathlib.Path({str(here / "data")!r}, name).read_text())
        except Exception as error:
            says.setdefault(name, []).append(type(error).__name__)
with sealed("it is a test"):
    read()
with Access(({str(place / "one")!r},), (), "out", True, False, False, sealed_places()).confined():
    read()
    print(json.dumps(says))
"""
    done = subprocess.run([sys.executable, "-c", reads], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "urls/one/file": ["one", "one"],
        "urls/other/file": ["DataSealed", "PermissionError"],
        "images": ["DataSealed", "PermissionError"],
    }
