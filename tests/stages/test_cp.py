"""``dfkd cp`` between directories and URLs: what is copied, in which order, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from pipeline import edit

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.integrity import read_run, write_run
from dfkd_cli.artifacts.server import INDEX, Part, Server, _in_order, index_of
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.names import ModelDirectory
from dfkd_cli.report.card import model_card
from dfkd_cli.report.table import escape
from dfkd_cli.stages.bundle import _content, _of_pages, portable
from dfkd_cli.trust import Code


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, session_cli) -> Path:
    """Shards and a student of the teacher, made by commands that name it by its absolute path."""
    place = tmp_path_factory.mktemp("place")
    noise = ("--method", "noise", "--num-images", "40", "--batch-size", "2")
    learn = ("--transfer-set", str(place / "shards"), "--steps", "2", "--batch-size", "4")
    assert session_cli(place, "synthesize", "--teacher", str(teacher), *noise) == 0
    assert session_cli(place, "distill", "--teacher", str(teacher), *learn) == 0
    return place


@pytest.fixture
def shards(place, tmp_path) -> Path:
    """The shards, to be changed."""
    return Path(shutil.copytree(place / "shards", tmp_path / "shards"))


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/server/shards"


def files(directory: Path) -> dict[str, str]:
    """The hash of every file that is not hidden."""
    found = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in found}


def test_there_and_back_again(cli, shards, url, tmp_path):
    there, back = tmp_path / "server" / "shards", tmp_path / "back"
    (shards / "notes.txt").write_text("nobody's")
    assert cli("cp", shards, url, "--json")[0] == 0
    index = json.loads((there / INDEX).read_text())
    sent = files(there)
    assert {row["path"]: row["sha256"] for row in index["files"]} == {n: h for n, h in sent.items() if n != INDEX}
    assert {*files(shards)} - {"notes.txt"} == {*sent} - {INDEX}
    assert cli("cp", url, back)[0] == 0
    assert files(back) == {name: sha256 for name, sha256 in sent.items() if name != INDEX}
    assert ShardReader(back).sha256 == ShardReader(shards).sha256
    before = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    for again in (shards, back):  # equal directories are equal bytes
        code, out, _ = cli("cp", again, url, "--json")
        assert (code, json.loads(out)["metrics"]["copied"]) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == before
    assert json.loads(cli("cp", url, back, "--json")[1])["metrics"]["copied"] == 0


def test_paths_of_this_machine_stay_here(cli, place, teacher, tmp_path):
    for name in ("shards", "student"):
        assert cli("cp", place / name, f"file://{tmp_path}/server/{name}")[0] == 0
        assert cli("cp", f"file://{tmp_path}/server/{name}", tmp_path / "home" / name)[0] == 0
    for path in (tmp_path / "server").rglob("*.*"):
        assert not any(str(secret).encode() in path.read_bytes() for secret in (place, teacher.parent)), path
    student = tmp_path / "home" / "student"
    assert [parent["path"] for parent in read_run(student)["parents"][:2]] == ["teacher", "shards"]
    opened = [ModelDirectory(str(path)).open(Code()).sha256 for path in (student, place / "student")]
    assert opened[0] == opened[1]
    shutil.copytree(teacher, tmp_path / "home" / "teacher")
    lineage = json.loads(cli("info", student, "--json")[1])["info"]["lineage"]
    assert [parent["found"] for parent in lineage] == ["same", "same"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("/home/me/x/teacher/", "teacher"), ("~/teacher", "teacher"), ("../x/teacher", "teacher"),
     ("w4a8:/home/me/teacher", "w4a8:teacher"), ("--out=/home/me/x", "--out=x"), (r"C:\data\x", "x"),
     ("/home/me/net.py:build", "net.py:build"), ("teacher", "teacher"), ("shards/student", "shards/student"),
     ("s3://bucket/x", "s3://bucket/x"), ("./net.py:build", "./net.py:build"), ("a/b c", "a/b c"), ("", "")],
)  # fmt: skip
def test_a_path_elsewhere_becomes_its_name(text, name):
    assert portable(text) == name


def test_a_path_inside_is_told_from_others_of_its_name(tmp_path):
    home = tmp_path / "grid"
    assert portable(f"--out={home}/runs/zskd/seed1/student", home) == "--out=grid/runs/zskd/seed1/student"
    assert portable(f"{home}s/student", home) == "student"


def test_records_come_after_what_they_name():
    names = ["run.json", "shard-1.safetensors", "a/run.json", "manifest.json", "config.yaml", "a/model.json"]
    batches = [*_in_order(names)]
    assert batches == [
        ["config.yaml", "shard-1.safetensors"],
        ["a/model.json", "manifest.json"],
        ["a/run.json", "run.json"],
    ]


def test_nothing_is_there_until_all_is(cli, shards, url, tmp_path, monkeypatch):
    there = tmp_path / "server" / "shards"
    write = Server._send

    def fail_late(self, names, parts):
        if "manifest.json" in names:
            raise KeyboardInterrupt
        write(self, names, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Server, "_send", fail_late)
        assert cli("cp", shards, url)[0] == 130
    assert {*files(shards)} - {*files(there)} == {"manifest.json", "run.json"}
    assert cli("cp", url, tmp_path / "back")[:2] == (3, "")
    half = there / "shard-00003.safetensors"
    half.write_bytes(half.read_bytes()[:100])  # as a server without whole files leaves it
    code, out, _ = cli("cp", shards, url, "--json")
    assert (code, json.loads(out)["metrics"]["copied"]) == (0, 3)


def test_what_is_there_already_is_spared(cli, shards, place, url, tmp_path):
    there, back = tmp_path / "server" / "shards", tmp_path / "back"
    there.mkdir(parents=True)
    (there / "config.yaml").write_text("mine: 1\n")
    code, _, err = cli("cp", shards, url)
    assert code == 2 and "config.yaml is there and is another one" in err
    assert (there / "config.yaml").read_text() == "mine: 1\n"
    assert cli("cp", shards, url, "--overwrite")[0] == 0
    code, _, err = cli("cp", place / "student", url)
    assert code == 2 and "holds another directory" in err
    back.mkdir()
    (back / "mine").write_text("1")
    code, _, err = cli("cp", url, back)
    assert code == 2 and "holds something else: mine" in err
    code, _, err = cli("cp", url, back, "--overwrite")  # it is not ours to remove
    assert code == 2 and "holds something else: mine" in err
    assert (back / "mine").read_text() == "1"
    (back / "mine").unlink()
    assert cli("cp", url, back)[0] == 0
    (back / "config.yaml").write_text("mine: 1\n")
    code, _, err = cli("cp", url, back)
    assert code == 2 and "holds another config.yaml" in err
    assert cli("cp", url, back, "--overwrite")[0] == 0
    assert (back / "config.yaml").read_bytes() == (there / "config.yaml").read_bytes()
    assert cli("cp", place / "student", url, "--overwrite")[0] == 0
    assert cli("cp", url, tmp_path / "student")[0] == 0
    assert {*files(tmp_path / "student")} == {*files(place / "student")} - {"checkpoints/last.ckpt"}


def one_line(said: tuple[int, str, str], code: int, words: str) -> None:
    assert said[0] == code
    assert said[2].count("error: ") == 1 and said[2].strip().count("\n") == 0
    assert words in said[2]


def test_what_is_no_finished_directory(cli, shards, url, tmp_path):
    one_line(cli("cp", tmp_path / "nothing", url), 3, "no such directory")
    (tmp_path / "folder").mkdir()
    one_line(cli("cp", tmp_path / "folder", url), 3, "nothing that dfkd knows")
    one_line(cli("cp", shards, tmp_path / "x"), 2, "no URL")
    one_line(cli("cp", url, url), 2, "both are URLs")
    one_line(cli("cp", url, tmp_path / "x"), 3, "no finished directory of dfkd")
    shard = shards / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    one_line(cli("cp", shards, url), 3, "shard-00001.safetensors is damaged")
    edit(shards / "run.json", status="running")
    one_line(cli("cp", shards, url), 3, "is not finished")
    assert not (tmp_path / "server").exists()


def test_nothing_is_written_through_a_linked_directory(cli, place, url, tmp_path):
    assert cli("cp", place, url)[0] == 3  # no artifact, but what lies in it may be
    assert cli("cp", place / "student", url)[0] == 0
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "checkpoints").symlink_to(victim)
    one_line(cli("cp", url, tmp_path / "home"), 3, "is a link out of")
    assert not any(victim.iterdir())


def test_an_index_of_a_later_version_is_named_by_its_url(cli, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"schema": 2, "kind": "files", "files": []}))
    one_line(cli("cp", f"file://{tmp_path}", tmp_path / "x"), 3, f"error: file://{tmp_path}: files schema 2")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".hidden", "a\\b", "C:x", ""])
def test_a_stranger_names_no_file_outside(cli, shards, url, name, tmp_path):
    (tmp_path / "secret").write_text("x")
    record = read_run(shards)
    write_run(shards, {**record, "artifacts": [{"path": name, "sha256": sha256_file(tmp_path / "secret")}]})
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / INDEX).write_bytes(index_of({name: Part("0" * 64, 1, b"x")}))
    assert cli("cp", shards, url)[0] == 3
    one_line(cli("cp", f"file://{tmp_path}/stranger", tmp_path / "x"), 3, "is damaged")
    assert not (tmp_path / "x").exists()


def test_a_flipped_byte_is_found_before_anything_is_used(cli, shards, url, tmp_path):
    assert cli("cp", shards, url)[0] == 0
    there = tmp_path / "server" / "shards"
    for name in ("run.json", "manifest.json", "shard-00019.safetensors", INDEX):
        content = bytearray((there / name).read_bytes())
        content[len(content) // 2] ^= 1
        shutil.copytree(there, tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        code, _, err = cli("cp", f"file://{tmp_path}/{name}", tmp_path / "back")
        assert code == 3 and err.count("error:") == 1, name
        assert not (tmp_path / "back" / "run.json").exists()
        shutil.rmtree(tmp_path / "back", ignore_errors=True)


def test_protocols_and_packages_that_are_missing(cli, shards, monkeypatch):
    for url in ("foo://bucket/x", "simplecache::s3://bucket/x", "reference://refs.json", "zip://x::file:///y.zip"):
        one_line(cli("cp", shards, url), 2, "no protocol that dfkd reads")
    for package, url in (("s3fs", "s3a://bucket/x"), ("paramiko", "ssh://host/x")):
        with monkeypatch.context() as patch:
            for name in [*sys.modules]:
                if name.split(".")[0] in (package, "fsspec.implementations.sftp"):
                    patch.delitem(sys.modules, name)
            patch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
            patch.setitem(sys.modules, package, None)
            one_line(cli("cp", shards, url), 2, package)
    with pytest.raises(ConfigError, match="https://host/x: names no directory"):
        Server("https://host/x?token=abc")


def test_the_card_of_a_model(place, monkeypatch):
    server = Server("hf://user/model")
    assert (type(server.fs).__name__, server.root) == ("HfFileSystem", "user/model")
    card = model_card(place / "student", server.url, portable)
    record, run = json.loads((place / "student" / "model.json").read_text()), read_run(place / "student")
    teacher, transfer_set = run["parents"][:2]
    assert card is not None and card.startswith("---\nlibrary_name: dfkd\n")
    for words in (
        f"teacher, sha256 `{teacher['sha256']}`", transfer_set["sha256"], "never seen the data**: digits",
        f"| agreement_on_transfer_set | {record['metrics']['agreement_on_transfer_set']:.6g} |", record["spec"],
        "dfkd distill --teacher hf://user/model", 'load_model(Path("model"))', record["weights"]["sha256"], "data-free",
    ):  # fmt: skip
        assert words in card, words
    assert str(place) not in card
    assert model_card(place / "shards", server.url, portable) is None


def test_a_card_names_no_place_of_this_machine(place, tmp_path):
    model = Path(shutil.copytree(place / "student", tmp_path / "student"))
    record = json.loads((model / "model.json").read_text())
    provenance = record["provenance"] | {"dataset": "/home/anna/clinic/patients"}
    edit(model / "model.json", provenance=provenance, spec="/home/anna/net.py:build")
    card = model_card(model, "hf://user/model", portable)
    assert card is not None and "anna" not in card and "clinic" not in card
    assert "never seen the data**: patients." in card and "`net.py:build`: a classifier" in card


def test_pages_name_no_place_of_this_machine(tmp_path):
    model = "/home/anna/my_project/net.py:build"
    (tmp_path / "results.json").write_text(json.dumps({"model": model}))
    (tmp_path / "table.md").write_text(f"| {escape(model)} | {model} |")
    results = _content(json.dumps({"model": portable(model)}).encode())
    parts = {"results.json": results, "table.md": Part("", 0, tmp_path / "table.md")}
    assert _of_pages(tmp_path, parts, portable)["table.md"].content == b"| net.py:build | net.py:build |"


def test_a_model_on_the_hub_has_its_card(cli, place, tmp_path, monkeypatch):
    import fsspec

    class Hub(fsspec.implementations.local.LocalFileSystem):  # what is sent to the hub goes through the same calls
        protocol = "hf"

        def __init__(self) -> None:
            super().__init__(auto_mkdir=True)

        @classmethod
        def _strip_protocol(cls, path):
            return path.replace("hf://", f"{tmp_path}/hub/")

    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        assert cli("cp", place / "student", "hf://user/model")[0] == 0
        card = tmp_path / "hub" / "user" / "model" / "README.md"
        card.write_text("written by hand")
        assert cli("cp", place / "student", "hf://user/model")[0] == 0
        assert card.read_text() == "written by hand"
        assert cli("cp", place / "student", "hf://user/model", "--overwrite")[0] == 0
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)
    hub = tmp_path / "hub" / "user" / "model"
    assert (hub / "README.md").read_text() == model_card(place / "student", "hf://user/model", portable)
    assert "README.md" not in (hub / INDEX).read_text()
