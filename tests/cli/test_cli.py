"""The command line as a user and a script meet it: help, errors, JSON, pipes, listings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import edit
from tiny_regimes import beside

from dfkd_cli import catalog
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.cli import listing
from dfkd_cli.config import defaults, hints, options
from dfkd_cli.options import Run

COMMANDS = [*catalog.commands(), "ls", "info"]
# Environments that make many tools believe in a colour terminal.
FORCED = {"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1", "PY_COLORS": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm"}
ESCAPE = "\x1b"


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.rstrip("\n")


def words(text: str) -> str:
    """Help without its frames and line breaks."""
    return " ".join(text.replace("│", " ").split())


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_and_listings_never_import_torch(tmp_path):
    """They answer at once: importing torch takes seconds."""
    argvs = [[], ["-h"], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    for command in catalog.commands().values():
        for choice in command.choices:
            argvs += [[command.name, f"--{choice.flag}", name, "--help"] for name in catalog.entries(choice.package)]
    argvs += [["ls", kind, *more] for kind in KINDS for more in ([], ["--json"])]
    argvs += [["cp", "zskd-digits", "my.yaml", "--dry-run"]]
    program = (
        "import sys, json\n"
        "from dfkd_cli.cli.app import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    assert main(argv) == 0, argv\n"
        "    assert 'torch' not in sys.modules, argv\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argvs)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", catalog.commands().values(), ids=lambda command: command.name)
def test_help_shows_every_flag_with_meaning_and_default(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    named = [(choice, entry) for choice in command.choices for entry in catalog.entries(choice.package).values()]
    for choice, entry in named or [(None, None)]:
        flag = [f"--{choice.flag}", entry.name] if choice else []
        code, out, _ = cli(command.name, *beside(command, choice), *flag, "--help")
        assert code == 0
        text = words(out)
        classes = [command.inputs, Run]
        if flag:
            classes.append(entry.config)
            assert f"{entry.name}: {entry.summary}" in text and entry.paper in text
        for cls in classes:
            keys = [key for key in hints(cls) if cls is not Run or key not in command.ignores]
            for key in keys:
                if "argument" not in options(cls)[key]:
                    assert f"--{key.replace('_', '-')} " in text
            for key, value in defaults(cls).items():
                if key in keys and isinstance(value, (int, float)) and not isinstance(value, bool):
                    line = next(part for part in out.splitlines() if f"--{key.replace('_', '-')} " in part)
                    assert f"(default: {value})" in line
        for other in command.choices:
            assert f"--{other.flag}: {', '.join(catalog.entries(other.package))}" in text


@pytest.mark.parametrize(
    "command", [command for command in catalog.commands().values() if command.ignores], ids=lambda command: command.name
)
def test_what_means_nothing_to_a_command_is_refused_wherever_it_is_said(command, cli, tmp_path):
    _, text, _ = cli(command.name, "--help")
    for key in command.ignores:
        name = f"--{key.replace('_', '-')}"
        assert name not in [word for line in text.splitlines() for word in line.replace("│", " ").split()[:1]]
        values = {
            "precision": "bf16",
            "logger": "tensorboard",
            "device": "cpu",
            "overwrite": "yes",
            "allow_code": "yes",
        }
        code, _, err = cli(command.name, name, values.get(key, "2"))
        assert code == 2 and one_line(err).startswith(f"error: No such option: {name} ")
        code, _, err = cli(command.name, "--set", f"{key}={values.get(key, '2')}")
        assert (code, one_line(err)) == (2, f"error: --set {key}: means nothing to {command.name} -- leave it out")
    record = tmp_path / "config.yaml"  # of an earlier version, which wrote all of them
    lines = [f"{key}: {json.dumps(defaults(Run)[key])}" for key in command.ignores]
    record.write_text("\n".join([*lines, "nothing: 1"]))
    code, _, err = cli(command.name, "--recipe", record)
    assert code == 2 and "nothing: unknown key" in one_line(err)


def test_help_in_a_pipe_has_no_escape_codes(dfkd, tmp_path):
    done = dfkd("synthesize", "--method", "zskd", "--help", cwd=tmp_path, env=FORCED)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("synthesise", "'synthesize'"),
        ("eval", "'evaluate'"),
        ("synthesize", "zskd"),
        ("synthesize --methd zskd", "--method"),
        ("synthesize --method zksd", "'zskd'"),
        ("synthesize --method zskd --tempratur 3", "--temperature"),
        ("synthesize --method noise --beta 3", "--beta"),
        ("distill --objective respnse", "'response'"),
        ("distill --method ofline", "'offline'"),
        ("distill --objctive response", "--objective"),
        ("distill --epoch 3", "--epochs"),
        ("distill --set epoch=3", "'epochs'"),
        ("distill --set epochs", "KEY=VALUE"),
        ("distill extra", "extra"),
        ("distill --epochs", "--epochs"),
        ("distill --epochs x", "'x'"),
        ("distill --epochs 0", "at least 1"),
        ("distill --holdout=-1", "at least 0"),
        ("distill --optimizer sdg", "'sgd'"),
        ("distill --threads 3000000000", "at most 4096"),
        ("distill --crop 1e12", "--crop"),
        ("distill --weight-decay 1e300", "within 3.4e+38"),
        ("train-teacher --model vit-1-0", "vit-1-0"),
        ("distill --objective response=", "'' is not a number"),
        ("distill --objective response response=2", "response has two weights"),
        ("distill --set objective=[response,att]", "'at'"),
        ("compare x --precision bf16", "--precision bf16: there is no grid"),
        ("compare x --devices 2", "--devices 2: there is no grid"),
        ("compare x --logger tensorboard", "--logger tensorboard: there is no grid"),
        ("compare x --seed 3", "--seed 3: there is no grid"),
        ("cp zskd-digits my", "call it my.yaml"),
        ("distill --recipe no-such", "no-such"),
        ("distill --recipe no-such.yaml", "no-such.yaml"),
        ("synthesize --method zskd --beta 1 -0.5", "above 0"),
        ("synthesize --method zskd --beta", "--beta"),
        ("train-teacher --dataset digts", "'digits'"),
        ("train-teacher --model lenet", "'lenet5'"),
        ("ls modls", "models"),
        ("cp no-such x.yaml", "no-such"),
        ("--versio", "--version"),
    ],
)
def test_usage_errors_are_one_line_with_the_closest_name(typed, named, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*typed.split())
    assert (code, out) == (2, "")
    line = one_line(err)
    assert line.startswith("error: ")
    assert named in line
    code, out, err = cli(*typed.split(), "--json")
    error = json.loads(out)
    assert (code, error["schema"], error["ok"]) == (2, 1, False)
    assert error["error"].keys() == {"code", "message", "hint"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("distill", "no teacher at teacher -- train one: dfkd train-teacher"),
        ("synthesize --method zskd --teacher absent", "no teacher at absent"),
        ("info absent", "no such directory"),
        ("info .", "no model, shard or metadata directory"),
    ],
)
def test_missing_artifacts(typed, message, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*typed.split())
    assert (code, out) == (3, "")
    assert message in one_line(err)
    code, out, _ = cli(*typed.split(), "--json")
    assert (code, json.loads(out)["error"]["code"]) == (3, "artifact")


@pytest.mark.parametrize("transfer_set", ["shards", "noise", "noise:x", "noise:0", "real:x"])
def test_transfer_sets_that_are_none(transfer_set, cli, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("distill", "--teacher", teacher, "--transfer-set", transfer_set)
    assert (code, out) == (3 if transfer_set == "shards" else 2, "")
    assert transfer_set.partition(":")[0] in one_line(err)


def test_an_artifact_may_have_the_name_of_a_command(cli, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "synthesize")
    code, _, err = cli("info", "synthesize")
    assert code == 0, err


def test_debug_shows_where_an_error_comes_from(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Traceback" in cli("distill", "--debug")[2]


# -- list-valued flags and precedence, through the whole command line -------------------------------------------------


FOREIGN = "--teacher lenet5 --weights TEACHER/model.safetensors --input-size 1 32 32 --num-classes 10"


@pytest.mark.parametrize(
    ("typed", "key", "expected"),
    [
        ("", "beta", [1.0, 0.1]),
        ("--beta 0.5", "beta", [0.5]),
        ("--beta 1 0.5 0.1", "beta", [1, 0.5, 0.1]),
        ("--beta=1", "beta", [1]),
        ("--beta 1.0 --beta 0.1", "beta", [1, 0.1]),
        ("--set beta=3", "beta", [3]),
        ("--set beta=3 temperature=5 --beta 4", "beta", [4]),
        ("--set beta=3 temperature=5 --beta 4", "temperature", 5),
        (f"{FOREIGN} --mean -0.5 --std 2", "mean", [-0.5]),
        ("--recipe r.yaml", "temperature", 7),
        ("--recipe r.yaml --set temperature=8", "temperature", 8),
        ("--recipe r.yaml --set temperature=8 --temperature 9", "temperature", 9),
        ("--recipe r.yaml --temperature 9", "iterations", 11),
        ("--num-images=1e3", "num_images", 1000),
        ("--overwrite", "overwrite", True),
        ("--set overwrite=yes --no-overwrite", "overwrite", False),
    ],
)
def test_what_is_typed_is_what_runs(typed, key, expected, cli, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("temperature: 7\niterations: 11\n")
    typed = typed.replace("TEACHER", str(teacher))
    args = ["synthesize", "--method", "zskd", "--teacher", teacher, *typed.split(), "--dry-run", "--json"]
    code, out, err = cli(*args)
    assert code == 0, err
    assert json.loads(out)["config"][key] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]  # a dry run writes nothing


# -- a command in a process of its own ---------------------------------------------------------------------------------


def test_paths_may_have_spaces_and_any_letters_and_stdout_is_one_document(dfkd, cli, teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / "mein Lehrer ß" / "教師")
    args = ["--method", "noise", "--teacher", "mein Lehrer ß/教師", "--num-images", "4", "--batch-size", "2"]
    done = dfkd("synthesize", *args, "--out", "aus gabe/ü 1", "--json", cwd=tmp_path, env=FORCED)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert answer["artifacts"] == {"shards": "aus gabe/ü 1"}
    assert (answer["schema"], answer["ok"], answer["command"]) == (1, True, "synthesize")
    assert (answer["metrics"]["count"], answer["seconds"] > 0) == (4, True)
    assert "synthesize 4/4" in done.stderr
    assert "images/s" in done.stderr
    assert ESCAPE not in done.stderr
    ShardReader(tmp_path / "aus gabe" / "ü 1").verify()
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("synthesize", *args, "--out", "aus gabe/ü 1")
    assert code == 0
    assert one_line(out).startswith("aus gabe/ü 1: 4 images")
    assert "already complete" in one_line(err)


@pytest.mark.parametrize("args", [["ls"], ["ls", "--json"], ["synthesize", "--help"], ["distill", "--objctive", "x"]])
def test_a_pipe_that_nobody_reads_is_no_crash(args, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dfkd_cli", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    process.stdout.close()
    with process.stderr:
        assert b"Traceback" not in process.stderr.read()
    assert process.wait() != 0


@pytest.mark.parametrize("args", [["ls"], ["ls", "--json"]])
def test_a_pipe_that_nobody_reads_ends_like_a_signal(args, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "dfkd_cli", *args], stdout=writer, cwd=tmp_path, check=False)
    os.close(writer)
    assert done.returncode == 141


@pytest.mark.parametrize("args", [["ls"], ["nonsense"], ["cp", "nonsense", "x"]])
def test_no_escape_codes_outside_a_terminal(args, dfkd, tmp_path):
    done = dfkd(*args, cwd=tmp_path, env=FORCED)
    assert done.returncode == (0 if args == ["ls"] else 2)
    assert ESCAPE not in done.stdout + done.stderr


# -- ls, cp, info ------------------------------------------------------------------------------------------------------

KINDS = {
    "methods": {name for package in ("synthesizers", "regimes") for name in catalog.entries(package)},
    "objectives": set(catalog.entries("objectives")),
    "models": {"lenet5", "lenet5-half", "resnet18", "vgg8"},
    "datasets": {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"},
    "recipes": set(catalog.recipes()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ls(kind, cli):
    code, out, err = cli("ls", kind, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["schema"], answer["ok"]) == (1, True)
    for item in answer["items"]:
        assert item.keys() == {"name", "kind", "needs", "paper", "summary"}
        assert isinstance(item["needs"], list)
        assert all(isinstance(item[key], str) for key in ("name", "kind", "paper", "summary"))
        assert item["summary"], item["name"]
    names = [item["name"] for item in answer["items"]]
    assert len(set(names)) == len(names)
    assert set(names) >= KINDS[kind]
    code, out, _ = cli("ls", kind)
    assert code == 0
    assert all(name in out for name in names)


def test_ls_is_about_methods_by_default(cli):
    assert cli("ls") == cli("ls", "methods")


def test_summaries_are_whole_sentences():
    items = [item for kind in ("methods", "objectives", "models") for item in listing.KINDS[kind]()]
    assert [item["name"] for item in items if item["summary"].count("(") != item["summary"].count(")")] == []


def test_cp_copies_a_recipe_that_can_be_changed_and_run(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, source = next(iter(catalog.recipes().items()))
    assert cli("cp", recipe, "mein rezept.yaml")[:2] == (0, "mein rezept.yaml\n")
    assert (tmp_path / "mein rezept.yaml").read_bytes() == source.read_bytes()
    code, out, err = cli("cp", recipe, "mein rezept.yaml")
    assert (code, out) == (2, "")
    assert "--overwrite" in one_line(err)
    assert cli("cp", recipe, "mein rezept.yaml", "--overwrite")[0] == 0
    (tmp_path / "dir").mkdir()
    code, out, _ = cli("cp", recipe, "dir", "--json")
    assert (code, json.loads(out)["artifacts"]) == (0, {"recipe": f"dir/{source.name}"})


@pytest.mark.parametrize(("flags", "said"), [("-q", False), ("-qv", False), ("-vq", False), ("-v", True), ("", True)])
def test_short_flags_may_stand_together(flags, said, cli, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("synthesize", "--method", "noise", "--teacher", teacher, "--dry-run", *flags.split())
    assert (code, bool(err)) == (0, said)


def test_info_names_versions_and_devices(cli):
    code, out, _ = cli("info", "--json")
    facts = json.loads(out)["info"]
    assert code == 0
    assert facts.keys() >= {"dfkd", "python", "torch", "lightning", "devices", "recipes"}
    assert facts["devices"][0].startswith("cpu")
    assert f"dfkd: {facts['dfkd']}\n" in cli("info")[1]
    assert cli("--version")[1] == facts["dfkd"] + "\n"


def test_info_of_an_artifact(cli, teacher):
    code, out, _ = cli("info", teacher, "--json")
    facts = json.loads(out)["info"]
    assert code == 0
    assert facts["model.json"]["spec"] == "lenet5"
    assert facts["model.json"]["provenance"] == {"dataset": "digits"}
    assert facts["lineage"] == []
    assert "lenet5" in cli("info", teacher)[1]


def test_lineage_tells_what_is_still_there(cli, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    assert cli("synthesize", "--method", "noise", "--num-images", "4")[0] == 0
    assert cli("distill", "--steps", "1", "--batch-size", "2")[0] == 0

    def lineage(path="student"):
        return json.loads(cli("info", str(path), "--json")[1])["info"]["lineage"]

    first, shards = lineage()
    made_from = {"role": "teacher", "path": "teacher", "sha256": first["sha256"], "found": "same", "lineage": []}
    assert first == made_from
    assert (shards["role"], shards["path"], shards["found"]) == ("transfer-set", "shards", "same")
    assert shards["lineage"] == [made_from]
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        assert lineage(tmp_path / "student") == [first, shards]
    weights = Path("teacher/model.safetensors").read_bytes()
    Path("teacher/model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert [parent["found"] for parent in lineage()] == ["another", "same"]
    Path("teacher/model.safetensors").write_bytes(weights)
    record = json.loads(Path("teacher/model.json").read_text())
    Path("teacher/model.json").write_text(json.dumps({**record, "mean": [0.9]}))
    shutil.rmtree("shards")
    assert [parent["found"] for parent in lineage()] == ["another", "gone"]


def test_a_document_is_json_whatever_records_hold(teacher, tmp_path, cli):
    """Older versions wrote NaN into them."""
    model = shutil.copytree(teacher, tmp_path / "model")
    edit(model / "model.json", metrics={"confidence": float("nan"), "top1": 0.5})
    code, out, err = cli("info", model, "--json")
    assert code == 0, err
    info = json.loads(out, parse_constant=lambda name: pytest.fail(name))["info"]
    assert info["model.json"]["metrics"] == {"confidence": None, "top1": 0.5}
