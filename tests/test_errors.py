"""Every row of the exit table: the code, one line on stderr that says what to do, nothing finished lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from pipeline import edit, start
from torchvision.utils import save_image

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.data import datasets, seal
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.directory import load_model
from dfkd_cli.rounds.trainer import fit
from dfkd_cli.settings import resolve
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.ui import Terminal

SMALL = ["--num-images", "20", "--batch-size", "10", "--iterations", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_teacher, dfkd) -> Path:
    """A directory with teacher/ and shards/ made from it."""
    directory = tmp_path_factory.mktemp("finished")
    shutil.copytree(make_teacher("lenet5"), directory / "teacher")
    done = dfkd("synthesize", "--method", "zskd", *SMALL, cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The exit code, empty stdout, and one line on stderr with these words."""
    exit_code, out, err = result
    assert exit_code == code, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["synthesise"], ["synthesize"]),
        (["synthesize"], ["--method", "zskd"]),
        (["synthesize", "--method", "zksd"], ["'zksd'", "'zskd'"]),
        (["synthesize", "--method", "zskd", "--betta", "1"], ["--betta", "--beta"]),
        (["synthesize", "--method", "zskd", "--beta", "much"], ["beta", "'much'", "number"]),
        (["synthesize", "--method", "zskd", "--beta", "0"], ["beta", "above 0"]),
        (["synthesize", "--method", "zskd", "--num-images", "1.5"], ["num-images", "1.5"]),
        (["synthesize", "--method", "noise", "--beta", "1"], ["--beta"]),
        (["synthesize", "--method", "zskd", "--set", "iteratons=3"], ["iteratons", "'iterations'"]),
        (["synthesize", "--method", "zskd", "--set", "iterations"], ["KEY=VALUE"]),
        (["synthesize", "--recipe", "zskd-digit"], ["'zskd-digits'"]),
        (["synthesize", "--recipe", "nowhere.yaml"], ["nowhere.yaml"]),
        (["distill", "--objective", "responce"], ["'response'"]),
        (["distill", "--student", "lenet5-haf"], ["lenet5-half"]),
        (["distill", "--transfer-set", "noise"], ["noise:1000"]),
        (["distill", "--transfer-set", "noise:many"], ["many"]),
        (["train-teacher", "--dataset", "mnits"], ["'mnist'"]),
        (["train-teacher", "--model", "lenet"], ["lenet5"]),
        (["train-teacher", "--device", "cuda", "--out", "x"], ["cuda"]),
        (["synthesize", "--method", "zskd", *SMALL, "--temperature", "3"], ["temperature: 20.0 -> 3.0", "--overwrite"]),
        (["synthesize", "--method", "zskd", "--out", "teacher/model.json"], ["--out"]),
    ],
)
def test_usage_errors(here: Path, cli, arguments: list[str], words: list[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    one_line(cli(*arguments), 2, *words)


def test_json_error_is_the_only_output(here: Path, cli) -> None:
    code, out, _ = cli("synthesize", "--method", "zksd", "--json")
    document = json.loads(out)
    assert code == 2
    assert document["ok"] is False
    assert document["schema"] == 1
    assert "zskd" in document["error"]["hint"]


def test_missing_teacher(tmp_path: Path, monkeypatch, cli) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(cli("synthesize", "--method", "zskd"), 3, "teacher", "dfkd train-teacher")


def test_missing_transfer_set(here: Path, cli) -> None:
    shutil.rmtree("shards")
    one_line(cli("distill"), 3, "shards", "dfkd synthesize")


def test_text_file_as_teacher(here: Path, cli) -> None:
    Path("notes.txt").write_text("not a model")
    one_line(cli("synthesize", "--method", "zskd", "--teacher", "notes.txt", "--out", "x"), 3, "notes.txt", "--weights")


def foreign(weights: str) -> list[str]:
    """A foreign LeNet-5 teacher."""
    return ["synthesize", "--method", "zskd", *SMALL, "--teacher", "lenet5", "--weights", weights,
            "--input-size", "1", "32", "32", "--num-classes", "10", "--out", "foreign"]  # fmt: skip


def test_pickle_with_code_is_never_run(here: Path, cli) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch run-by-pickle",)

    torch.save({"state_dict": Evil()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.pt", "plain.pt"):
        one_line(cli(*foreign(name)), 3, name)
    assert not Path("run-by-pickle").exists()


def test_foreign_teacher_from_a_wrapped_checkpoint(here: Path, cli) -> None:
    import safetensors.torch

    state = safetensors.torch.load_file("teacher/model.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, "user.pt")
    code, _, err = cli(*foreign("user.pt"))
    assert code == 0, err
    assert json.loads(Path("foreign/manifest.json").read_text())["count"] == 20


def test_foreign_teacher_that_says_too_little(here: Path, cli) -> None:
    torch.save({}, "user.pt")
    command = ["synthesize", "--method", "zskd", "--teacher", "torchvision:resnet18", "--weights", "user.pt"]
    one_line(cli(*command, "--out", "x"), 2, "--input-size", "--num-classes")


def test_code_in_a_strangers_artifact_is_not_run(here: Path, cli) -> None:
    Path("net.py").write_text("open('run-by-spec', 'w').close()\ndef build(): raise SystemExit\n")
    record = json.loads(Path("teacher/model.json").read_text())
    Path("teacher/model.json").write_text(json.dumps({**record, "spec": "./net.py:build"}))
    one_line(cli("synthesize", "--method", "zskd", "--out", "x"), 3, "net.py", "--allow-code")
    assert not Path("run-by-spec").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "text"])
def test_damaged_shards(here: Path, cli, damage: str) -> None:
    shard = Path("shards/shard-00001.safetensors")
    data = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        data[-5] ^= 1
        shard.write_bytes({"truncate": bytes(data[:-100]), "flip": bytes(data), "text": b"hello"}[damage])
    one_line(cli("distill", "--steps", "1"), 3, "shard-00001.safetensors", "synthesize")


def test_damaged_teacher(here: Path, cli) -> None:
    weights = Path("teacher/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    one_line(cli("distill", "--steps", "1"), 3, "model.safetensors")


def test_shards_of_another_teacher(here: Path, cli, dfkd) -> None:
    assert dfkd("train-teacher", "--steps", "1", "--seed", "5", "--out", "other", cwd=here).returncode == 0
    one_line(cli("distill", "--teacher", "other", "--steps", "1"), 3, "another teacher", "--teacher")


def test_class_count_mismatch(here: Path, cli) -> None:
    edit(Path("shards/manifest.json"), num_classes=7)
    one_line(cli("distill", "--steps", "1"), 3, "does not hold what the manifest says")


def test_unfinished_shards(here: Path, cli) -> None:
    edit(Path("shards/manifest.json"), complete=False)
    one_line(cli("distill", "--steps", "1"), 3, "not finished", "synthesize")


def test_output_that_holds_something_else(here: Path, cli) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        one_line(cli("synthesize", "--method", "zskd", *SMALL, "--out", "mine", *more), 2, "not made by dfkd")
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_two_processes_one_output(here: Path, cli, dfkd) -> None:
    command = ["synthesize", "--method", "zskd", "--iterations", "1000000", "--out", "busy"]
    slow = start(command, here)
    try:
        while not Path("busy/run.json").exists():
            assert slow.poll() is None
            time.sleep(0.01)
        one_line(cli(*command), 2, "another process")
    finally:
        slow.kill()
        slow.communicate()


def test_a_file_system_without_locks_is_written_with_a_warning(here: Path, cli, monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    code, _, err = cli("synthesize", "--method", "noise", "--num-images", "4", "--out", "network")
    assert (code, err.count("this file system has no locks")) == (0, 1), err


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_read_only_output(here: Path, dfkd) -> None:
    """A directory on a read-only place; root may write anywhere, so /proc stands for it."""
    result = dfkd("synthesize", "--method", "zskd", *SMALL, "--out", "/proc/impressions", cwd=here)
    one_line((result.returncode, result.stdout, result.stderr), 2, "/proc/impressions", "--out")


def test_full_disk_keeps_what_is_finished(here: Path, cli) -> None:
    """A limit on file size fails the write as a full disk does; what was written is kept and the run continues."""
    command = ["synthesize", "--method", "zskd", "--num-images", "20", "--iterations", "1", "--batch-size"]

    small, large = [*command, "4", "--out", "full4"], [*command, "20", "--out", "full"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # Python ignores SIGXFSZ: write() fails with EFBIG
    try:
        result = cli(*large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(result, 4, "disk is full", "same command")
    assert json.loads(Path("full/run.json").read_text())["status"] == "failed"
    assert not list(Path("full").glob("*.tmp")) + list(Path("full").glob(".*.tmp"))
    assert cli(*large)[0] == 0
    assert cli(*small)[0] == 0


def test_non_finite_loss(here: Path, cli) -> None:
    one_line(cli("distill", "--lr", "1e30", "--steps", "50", "-q"), 4, "not finite", "--lr")
    assert json.loads(Path("student/run.json").read_text())["status"] == "failed"


def test_too_little_memory(here: Path, cli) -> None:
    command = ["synthesize", "--method", "dfad", "--latent", "10000000000000", "--out", "huge"]
    one_line(cli(*command, "--student", "lenet5-half"), 4, "out of memory", "--batch-size")


def test_no_network(here: Path, dfkd, monkeypatch) -> None:
    """A dataset that is nowhere and cannot be downloaded; a proxy that refuses stands for a missing network."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        network = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy) | {"no_proxy": ""}
        places = {"DFKD_DATA": str(here / "nothing"), "XDG_CACHE_HOME": str(here / "cache")}
        for name, value in (network | places).items():
            monkeypatch.setenv(name, value)
        result = dfkd("train-teacher", "--dataset", "cifar100", "--out", "x", cwd=here)
    one_line((result.returncode, result.stdout, result.stderr), 3, "cifar100", "DFKD_DATA")


def test_dry_run_writes_nothing_and_finds_errors(here: Path, cli) -> None:
    before = sorted(here.rglob("*"))
    code, out, err = cli("distill", "--transfer-set", "shards", "--dry-run")
    assert code == 0, err
    assert "temperature: 20.0" in out
    assert sorted(here.rglob("*")) == before
    one_line(cli("distill", "--teacher", "nowhere", "--dry-run"), 3, "nowhere")
    one_line(cli("distill", "--out", "teacher", "--dry-run"), 2, "teacher is not empty and was not made by dfkd")
    one_line(cli("distill", "--out", "shards", "--dry-run"), 2, "shards holds another run: command: synthesize ->")


# -- the data-free promise --------------------------------------------------------------------------------------------


def test_data_free_commands_cannot_open_a_dataset(here: Path, cli) -> None:
    """A student whose factory opens the dataset, by our loader or around it, stops the run."""
    for name, body in {
        "ours": "from dfkd_cli.data.datasets import load; load('digits', 'train')",
        "library": "from sklearn.datasets import load_digits; load_digits()",
        "file": "open('private/train/0/a.png', 'rb')",
    }.items():
        Path("private/train/0").mkdir(parents=True, exist_ok=True)
        Path("private/train/0/a.png").write_bytes(b"x")
        Path(f"{name}.py").write_text(
            f"import torch\ndef build(num_classes):\n    {body}\n"
            "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, num_classes))\n"
        )
        os.environ["DFKD_DATA"] = str(here / "private")
        try:
            arguments = ["distill", "--student", f"./{name}.py:build", "--steps", "1", "--out", name]
            code, _, err = cli(*arguments)
            assert code != 0, name
            assert "data-free" in err, name
            # The same factory is welcome where real data is part of the command.
            code, _, err = cli(*arguments, "--transfer-set", "real:20", "--out", f"{name}-real")
            assert code == 0, err
        finally:
            del os.environ["DFKD_DATA"]


def test_seal_is_on_while_synthesizing_and_off_afterwards(here: Path, cli, monkeypatch) -> None:
    """The teacher's own code tries; afterwards the same process may open data again."""
    Path("net.py").write_text(
        "import torch\nfrom dfkd_cli.data.datasets import load\nclass Net(torch.nn.Sequential):\n"
        "    def forward(self, x):\n        load('digits', 'test')\n        return super().forward(x)\n"
        "def build(num_classes):\n    return Net(torch.nn.Flatten(), torch.nn.Linear(1024, num_classes))\n"
    )
    torch.save({"1.weight": torch.zeros(10, 1024), "1.bias": torch.zeros(10)}, "net.pt")
    code, _, err = cli("synthesize", "--method", "noise", "--teacher", "./net.py:build", "--weights", "net.pt",
                       "--input-size", "1", "32", "32", "--num-classes", "10", "--out", "x")  # fmt: skip
    assert code != 0
    assert "data-free" in err
    seal.check("afterwards")
    assert len(datasets.load("digits", "test")) == 360


# -- what a record must not hide --------------------------------------------------------------------------------------


def test_a_folder_of_images_is_not_called_data_free(here: Path, cli) -> None:
    Path("pictures").mkdir()
    for i in range(4):
        save_image(torch.rand(1, 32, 32), f"pictures/{i}.png")
    command = ["distill", "--transfer-set", "pictures", "--steps", "1"]
    code, _, err = cli(*command)
    assert code == 0, err
    assert json.loads(Path("student/run.json").read_text())["data_free"] is False
    save_image(torch.rand(1, 32, 32), "pictures/3.png")
    one_line(cli(*command), 2, "another transfer-set")


def test_a_teacher_is_its_weights_and_how_they_are_used(here: Path, cli) -> None:
    record = json.loads(Path("teacher/model.json").read_text())
    Path("teacher/model.json").write_text(json.dumps({**record, "mean": [0.9]}))
    one_line(cli("distill", "--steps", "1"), 3, "another teacher")


def test_numbers_of_other_launchers_mean_nothing(here: Path, dfkd) -> None:
    """Eight commands under one launcher are eight commands."""
    others = {"SLURM_PROCID": "1", "RANK": "1", "NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    result = dfkd("ls", "--json", cwd=here, env=others)
    assert json.loads(result.stdout)["ok"] is True
    others = {"RANK": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "many", "SLURM_JOB_ID": "4"}
    result = dfkd("distill", "--steps", "1", "--out", "beside", cwd=here, env=others)
    assert result.returncode == 0, result.stderr
    assert Path("beside/metrics.csv").read_text().count("\n") == 2
    others = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "1", "GROUP_RANK": "1"}
    result = dfkd("distill", "--steps", "1", "--devices", "2", "--out", "under", cwd=here, env=others)
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("under/run.json").read_text())["status"] == "done"


def test_what_is_read_is_not_overwritten(here: Path, cli) -> None:
    assert cli("distill", "--steps", "1")[0] == 0
    kept = Path("student/model.safetensors").read_bytes()
    again = ["distill", "--teacher", "student", "--transfer-set", "noise:8", "--steps", "1", "--overwrite"]
    one_line(cli(*again, "--out", "student/"), 2, "student is read and would be overwritten", "choose another --out")
    one_line(cli("evaluate", "student", "--out", "./student", "--overwrite"), 2, "student is read")
    assert Path("student/model.safetensors").read_bytes() == kept
    shutil.copy("teacher/model.safetensors", "student/own.safetensors")
    own = ("--teacher", "lenet5", "--weights", "student/own.safetensors", "--input-size", "1", "32", "32")
    command = ["distill", *own, "--num-classes", "10", "--transfer-set", "noise:8", "--steps", "1", "--overwrite"]
    one_line(cli(*command, "--out", "student"), 2, "student/own.safetensors is read and would be overwritten")
    Path("student/net.py").write_text(
        "from dfkd_cli.models.registry import build as make\ndef build(): return make('lenet5', 10, (1, 32, 32))\n"
    )
    command[2], command[4] = "student/net.py:build", "teacher/model.safetensors"
    one_line(cli(*command, "--out", "student"), 2, "student/net.py:build is read and would be overwritten")
    assert cli(*again, "--out", "student/next")[0] == 0
    Path("student/next/left").touch()
    assert cli(*again, "--out", "student/next")[0] == 0  # inside of what is read, not the other way round
    assert not Path("student/next/left").exists()


def test_half_precision_is_for_accelerators(here: Path, cli) -> None:
    one_line(cli("distill", "--precision", "16", "--device", "cpu"), 2, "--precision 16", "bf16")
    half = ("", {"method": "zskd", "precision": "16", "device": "cpu", "num_images": 2, "iterations": 1})
    settings = resolve("synthesize", [half])
    teacher, _ = load_model(Path("teacher"))
    writer = ShardWriter(Path("half"), {"shape": [1, 32, 32], "dtype": "float16"}, 1)
    learner = settings.method.entry.load()(SynthesisTask(teacher, 2, 0, writer), settings.method.config)
    with pytest.raises(ConfigError, match="gradients of images would vanish"):
        fit(learner, RunDirectory(Path("half"), settings, [], {}), Terminal(silent=True))


def test_an_optimiser_needs_betas_below_one(here: Path, cli) -> None:
    for method in ("dafl", "cmi", "deepinversion"):
        one_line(cli("synthesize", "--method", method, "--betas", "0.5", "1", "--out", "b"), 2, "--betas", "0.99999")


def test_a_damaged_checkpoint_says_so(here: Path, cli) -> None:
    command = ["distill", "--steps", "400", "--batch-size", "2"]
    assert cli(*command)[0] == 0
    edit(Path("student/run.json"), status="interrupted")
    checkpoint = Path("student/checkpoints/last.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    code, _, err = cli(*command, "-q")
    assert code == 3
    assert "last.ckpt" in err
    assert "--overwrite" in err


def test_a_replayed_configuration_does_not_overwrite(here: Path, cli) -> None:
    assert cli("distill", "--steps", "1", "--overwrite")[0] == 0
    code, _, err = cli("distill", "--recipe", "student/config.yaml")
    assert code == 0, err
    assert "already complete" in err


def test_student_without_a_loop(here: Path, cli) -> None:
    one_line(
        cli("synthesize", "--method", "zskd", "--student", "lenet5-half", "--out", "x"), 2, "no student in the loop"
    )


def test_a_directory_called_like_the_dataset_is_no_dataset(here: Path, cli) -> None:
    (here / "digits").mkdir()
    code, _, err = cli("synthesize", "--method", "noise", "--num-images", "2", "--out", "digits/shards")
    assert code == 0, err


def test_a_run_of_a_version_that_knew_fewer_settings_is_taken_for_what_it_is(here: Path, cli) -> None:
    record = json.loads((here / "shards" / "run.json").read_text())
    del record["identity"]["total_variation"]  # its default is what that version did
    edit(here / "shards" / "run.json", identity=record["identity"])
    again = ["synthesize", "--method", "zskd", *SMALL]
    code, _, err = cli(*again)
    assert code == 0, err
    assert "already complete" in err
    one_line(cli(*again, "--total-variation", "1"), 2, "total_variation: 0.0 -> 1.0")


def test_what_a_directory_says_is_not_said_again(here: Path, cli) -> None:
    for command in (["distill"], ["synthesize", "--method", "zskd"], ["collect-metadata"]):
        one_line(cli(*command, "--input-size", "3", "8", "8", "--mean", "0"), 2, "leave out --input-size, --mean")


def test_a_run_that_failed_before_its_first_round_occupies_nothing(here: Path, cli) -> None:
    Path("photos").mkdir()
    Path("photos/0.png").write_bytes(b"no image")
    assert cli("distill", "--transfer-set", "photos", "--out", "s", "--device", "cpu")[0] == 3
    assert cli("distill", "--steps", "1", "--out", "s")[0] == 0
    one_line(cli("distill", "--steps", "2", "--out", "s"), 2, "holds another run", "steps: 1 -> 2")


def test_of_another_method_only_that_is_said(here: Path, cli) -> None:
    code, _, err = cli("synthesize", "--method", "noise", "--out", "shards")
    assert code == 2
    assert "holds another run: method: zskd -> noise --" in err


def test_a_device_that_is_not_there_leaves_nothing(here: Path, cli) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    one_line(cli("synthesize", "--method", "noise", "--device", "cuda", "--out", "s"), 2, "--device cuda", "info")
    assert not Path("s").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "--objective", "at=-5"], ["at", "below 0"]),
        (["synthesize", "--method", "dafl"], ["needs a student", "--student SPEC"]),
        (["synthesize", "--method", "zskd", "--student", "lenet5"], ["no student in the loop", "leave out --student"]),
        (["synthesize", "--method", "zsdk"], ["'zskd'", "'zskt'"]),
        (["distill", "--recipe", "zskd-digits"], ["recipe for synthesize"]),
        (["distill", "--student", "resnet50"], ["torchvision:NAME"]),
        (["distill", "--transfer-set", "real:abc"], ["real:abc: 'abc'", "real:200"]),
    ],
)
def test_hints_name_what_is_meant(arguments: list[str], words: list[str], here: Path, cli) -> None:
    one_line(cli(*arguments), 2, *words)


NET = """
from torch import nn
def build(num_classes, input_size):
    return nn.Sequential(nn.AvgPool2d(WIDTH), nn.Flatten(), nn.Linear(FEATURES, num_classes))
"""


def own_net(width: int) -> None:
    Path("net.py").write_text(NET.replace("WIDTH", str(width)).replace("FEATURES", str((32 // width) ** 2)))


def test_what_a_network_is_decides_and_not_how_it_is_called(here: Path, cli) -> None:
    """Code that changed is another run; a directory that is called like a built-in network is none."""
    own_net(4)
    command = ["distill", "--steps", "1", "--out", "s"]
    assert cli(*command, "--student", "./net.py:build")[0] == 0
    assert "already complete" in cli(*command, "--student", "./net.py:build")[2]
    own_net(8)
    one_line(cli(*command, "--student", "./net.py:build"), 2, "holds another run: another architecture")
    # Its architecture, which is code, is a directory's word and not the user's.
    again = ["distill", "--steps", "1", "--out", "again", "--student", "s"]
    one_line(cli(*again), 3, "--allow-code")
    assert cli(*again, "--allow-code")[0] == 0
    Path("lenet5-half").mkdir()
    assert cli("distill", "--steps", "1", "--out", "lenet5-half", "--student", "lenet5-half")[0] == 0


def test_a_dataset_that_changed_is_another_one(here: Path, cli) -> None:
    for place in ("train/a", "train/b", "test/a", "test/b"):
        Path("photos", place).mkdir(parents=True)
        save_image(torch.rand(1, 32, 32), f"photos/{place}/0.png")
    command = ["train-teacher", "--dataset", "photos", "--steps", "1", "--out", "of-photos"]
    learn = ["distill", "--teacher", "of-photos", "--transfer-set", "real", "--steps", "1", "--out", "s"]
    assert (cli(*command)[0], cli(*learn)[0]) == (0, 0)
    assert "already complete" in cli(*command)[2]
    save_image(torch.rand(1, 32, 32), "photos/train/a/1.png")
    one_line(cli(*command), 2, "holds another run: another dataset")
    one_line(cli(*learn), 2, "holds another run: another transfer-set")


def test_another_teacher_needs_nothing_that_a_recipe_says_of_its_own(here: Path, cli) -> None:
    Path("net.yaml").write_text("teacher: ./net.py:build\nweights: net.safetensors\ninput_size: [1, 4, 4]\n")
    command = ["distill", "--recipe", "net.yaml", "--teacher", "teacher", "--steps", "1"]
    assert cli(*command)[0] == 0
    one_line(cli(*command, "--input-size", "1", "4", "4"), 2, "leave out --input-size")


def test_no_recipe_allows_code(here: Path, cli) -> None:
    assert cli("distill", "--steps", "1", "--allow-code")[0] == 0
    assert "allow_code" not in Path("student/config.yaml").read_text()
    Path("stranger.yaml").write_text("student: lenet5\nallow_code: true\n")
    one_line(
        cli("distill", "--recipe", "stranger.yaml"), 2, "stranger.yaml: no recipe may say --allow-code", "--allow-code"
    )


def test_artifacts_among_datasets_are_refused_and_no_bug(here: Path, cli) -> None:
    one_line(cli("distill", "--data-dir", "."), 2, "where datasets are looked for", "work outside of it")


@pytest.mark.parametrize(
    "change",
    [{"dtype": "nn"}, {"shards": []}, {"num_classes": "10"}, {"shape": [1, 32]}, {"shape": [1, 32, -1]}],
    ids=str,
)
def test_a_strange_manifest_is_damaged(here: Path, cli, change: dict) -> None:
    edit(Path("shards/manifest.json"), **change)
    (key,) = change
    one_line(cli("distill"), 3, f"manifest.json is damaged: {key if change[key] else 'it does not name'}")


def test_strange_records_and_files_are_one_line(here: Path, cli) -> None:
    Path("photos").mkdir()
    Path("photos/folder.png").mkdir()
    Path("photos/gone.png").symlink_to("nowhere.png")
    one_line(cli("distill", "--transfer-set", "photos"), 3, "no image files")
    one_line(cli("distill", "--transfer-set", "noise:²"), 2, "'²' is not a number of images")
    record = json.loads(Path("teacher/model.json").read_text())
    Path("teacher/model.json").write_text(json.dumps({**record, "provenance": []}))
    one_line(cli("distill"), 3, "model.json is damaged: provenance is [], not a mapping")


def test_merge_keys_are_named(here: Path, cli) -> None:
    Path("own.yaml").write_text("base: &base {steps: 1}\n<<: *base\n")
    one_line(cli("distill", "--recipe", "own.yaml"), 2, "no merge keys (<<): write them out")


@pytest.mark.parametrize("number", ["1000000000000", "0", "-3", "9" * 30, "1e9"])
def test_a_number_of_images_beyond_reason(number, here: Path, cli) -> None:
    for name in ("noise", "real"):
        one_line(cli("distill", "--transfer-set", f"{name}:{number}"), 2, "is not a number of images")


def test_an_artifact_that_is_its_own_parent(here: Path, cli) -> None:
    assert cli("distill", "--steps", "1")[0] == 0
    run = json.loads(Path("student/run.json").read_text())
    sha256 = json.loads(cli("info", "shards", "--json")[1])["info"]["lineage"][0]["sha256"]
    own = next(parent for parent in run["parents"] if parent["path"] == "shards")
    edit(Path("shards/run.json"), parents=[own])
    (parent,) = json.loads(cli("info", "shards", "--json")[1])["info"]["lineage"]
    assert (parent["found"], parent["lineage"], len(sha256)) == ("same", [], 64)
    for parents in ({}, ["x"], [{"path": "shards"}], [{"role": "teacher", "path": 3}]):
        edit(Path("student/run.json"), parents=parents)
        one_line(cli("info", "student"), 3, "run.json is damaged: parents")
        one_line(cli("compare", "student", "--out", "c"), 3, "run.json is damaged: parents")


def test_images_of_four_channels(here: Path, cli) -> None:
    """Multispectral images, and a network for them: impressions of it, and files with as many channels, no others."""
    Path("net.py").write_text(NET.replace("WIDTH", "4").replace("FEATURES", "16"))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    torch.save(net.state_dict(), "net.pth")
    foreign = ["--teacher", "net.py:build", "--weights", "net.pth", "--num-classes", "3", "--input-size", "4", "8", "8"]
    small = ["--num-images", "4", "--iterations", "1"]
    code, _, err = cli("synthesize", "--method", "class-impressions", *foreign, *small, "--out", "made")
    assert code == 0, err
    spelled = ["--teacher", "./net.py:build", *foreign[2:]]
    assert cli("distill", *spelled, "--student", "net.py:build", "--transfer-set", "made", "--steps", "1")[0] == 0
    assert Path("made/preview.png").is_file()
    Path("photos").mkdir()
    save_image(torch.rand(3, 8, 8), "photos/0.png")
    command = ["distill", *foreign, "--student", "./net.py:build", "--transfer-set", "photos"]
    one_line(cli(*command, "--steps", "1", "--out", "rgb"), 3, "photos/0.png", "no fourth channel")
    save_image(torch.rand(4, 8, 8), "photos/0.png")
    assert cli(*command, "--steps", "1", "--out", "four")[0] == 0


@pytest.mark.parametrize("left", ["", "[1]", "{"])
def test_a_damaged_record_of_a_run_is_an_artifact(left, here, cli):
    Path("shards/run.json").write_text(left)
    one_line(cli("synthesize", "--method", "zskd", *SMALL), 3, "run.json is damaged", "--overwrite")
