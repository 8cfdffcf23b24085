"""Commands that read at URLs, from real servers of S3 and SFTP on this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline import hashes
from servers import KEY, PASSWORD, SECRET, USER, Serving, wire

from dfkd_cli import urls
from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.data import landlock

LEARN = ["--steps", "4", "--batch-size", "4", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, session_cli) -> Path:
    """The teacher, shards of 60 files, and a student."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(teacher, place / "teacher")
    assert session_cli(place, "synthesize", "--method", "noise", "--num-images", "60", "--batch-size", "1") == 0
    assert session_cli(place, "distill", *LEARN) == 0
    return place


@pytest.fixture(scope="module")
def s3(place, tmp_path_factory, session_cli) -> Iterator[Serving]:
    """A server of S3 with the teacher and the shards in a bucket."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    server = Serving("s3", root, tmp_path_factory.mktemp("home"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            speak(patch, server.port)
            for name in ("teacher", "shards"):
                assert session_cli(place, "cp", name, f"s3://bucket/{name}") == 0
        yield server
    finally:
        server.kill()


# What would lead elsewhere, of the user's own.
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "http_proxy", "https_proxy")


def speak(patch: pytest.MonkeyPatch, port: int) -> None:
    """What s3fs asks of the environment."""
    for name in (*FOREIGN, *map(str.upper, FOREIGN)):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def elsewhere(s3, tmp_path, monkeypatch) -> Path:
    """An empty working directory with an empty cache, which datasets lie beside: a machine that knows the server."""
    speak(monkeypatch, s3.port)
    monkeypatch.setattr(urls, "_credentials", {})
    monkeypatch.delenv(urls.COPIES, raising=False)
    monkeypatch.delenv("DFKD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


FROM_S3 = ["distill", "--teacher", "s3://bucket/teacher", "--transfer-set", "s3://bucket/shards", *LEARN]


def test_a_student_from_s3_is_the_same_and_the_run_too(dfkd, cli, elsewhere, place):
    done = dfkd(*FROM_S3, cwd=elsewhere / "work")
    assert done.returncode == 0, done.stderr
    student = elsewhere / "work" / "student"
    wanted = {name: sha256 for name, sha256 in hashes(place / "student").items() if name != "config.yaml"}
    assert {name: sha256 for name, sha256 in hashes(student).items() if name != "config.yaml"} == wanted
    run, local = read_run(student), read_run(place / "student")
    assert run["parents"][:2] == [
        local["parents"][0] | {"path": "s3://bucket/teacher"}, local["parents"][1] | {"path": "s3://bucket/shards"},
    ]  # fmt: skip
    assert run["sealed"] == ("landlock" if landlock.version() else "python")
    config = (student / "config.yaml").read_text()
    assert "- s3://bucket/teacher\n" in config and str(elsewhere) not in config
    shutil.copytree(place / "student", elsewhere / "work" / "begun")  # with a local copy
    assert cli(*FROM_S3, "--out", "begun")[0] == 0
    assert hashes(elsewhere / "work" / "begun") == hashes(place / "student")


def test_models_and_comparisons_name_the_url(cli, elsewhere):
    few = ("distill", "--student", "w8a8:s3://bucket/teacher", "--steps", 0, "--transfer-set", "s3://bucket/shards")
    assert cli(*few, "--teacher", "s3://bucket/teacher", "--out", "few")[0] == 0
    assert "s3://bucket/teacher" in [parent["path"] for parent in read_run(Path("few"))["parents"]]
    code, out, _ = cli("compare", "s3://bucket/teacher", "few", "--json", "--out", "comparison")
    assert code == 0
    rows = {run["path"] for section in json.loads(out)["sections"] for row in section["rows"] for run in row["runs"]}
    assert rows == {"s3://bucket/teacher", "few"}
    assert cli("cp", "comparison", "s3://bucket/comparison")[0] == 0
    cached = str(urls.copies_directory()).encode()
    for path in (path for path in Path().rglob("*.*") if path.is_file()):
        assert cached not in path.read_bytes(), path


def test_a_flipped_byte_on_the_server(cli, elsewhere, s3):
    bucket = Path(s3.command[3]) / "bucket"
    shutil.copytree(bucket / "shards", bucket / "flipped")
    shard = bucket / "flipped" / "shard-00030.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    code, out, err = cli(*FROM_S3[:-5], "--transfer-set", "s3://bucket/flipped", *LEARN)
    assert (code, out) == (3, "")
    assert "s3://bucket/flipped/shard-00030.safetensors is damaged" in err
    assert not Path("student").exists()
    assert not [*urls.copies_directory().glob("*/manifest.json")]


def test_a_server_that_dies_in_the_middle(cli, elsewhere, s3, place, monkeypatch):
    # With the heads of all answers, which are half as large again, and the index, that is in the middle.
    size = sum(path.stat().st_size for path in (place / "shards").glob("shard-*"))
    command = ["distill", "--teacher", str(place / "teacher"), "--transfer-set", "s3://bucket/shards", *LEARN]
    with wire(s3, size, s3.kill) as port, monkeypatch.context() as patch:
        speak(patch, port)
        code, out, err = cli(*command)
    assert (code, out, err.count("error: s3://bucket/shards: ")) == (4, "", 1), err
    assert not Path("student").exists()
    begun = {path: path.stat().st_mtime_ns for path in urls.copies_directory().rglob("shard-*")}
    assert 0 < len(begun) < 60
    s3.start()
    code, _, err = cli(*command)
    assert code == 0, err
    assert begun.items() <= {p: p.stat().st_mtime_ns for p in urls.copies_directory().rglob("shard-*")}.items()
    assert sha256_file(Path("student/model.safetensors")) == sha256_file(place / "student" / "model.safetensors")


def test_credentials_are_nowhere(cli, elsewhere, s3, place, tmp_path_factory, caplog):
    root = tmp_path_factory.mktemp("sftp")
    server = Serving("sftp", root, tmp_path_factory.mktemp("home"))
    url = f"sftp://{USER}:{PASSWORD}@127.0.0.1:{server.port}/sets/shards"
    said = []
    try:
        said.append(cli("cp", place / "shards", url))
        Path("mine.yaml").write_text(f"transfer_set: [{url}]\nteacher: [s3://bucket/teacher]\n")
        said.append(cli("distill", "--recipe", "mine.yaml", *LEARN, "--debug"))
        assert [code for code, *_ in said] == [0, 0], said
        Path("mine.yaml").unlink()
        said.append(cli("cp", url.replace(PASSWORD, "a-wrong-secret"), "back", "--debug"))
        assert said[-1][0] == 3
    finally:
        server.kill()
    said.append(cli("cp", url, "back", "--debug", "--json"))
    assert said[-1][0] == 4
    shown = json.dumps(said) + caplog.text + os.environ[urls.COPIES]
    written = b"".join(path.read_bytes() for top in (elsewhere, root) for path in top.rglob("*") if path.is_file())
    for secret in (PASSWORD, USER, SECRET, "a-wrong-secret"):
        assert secret not in shown
        assert secret.encode() not in written
    assert read_run(Path("student"))["parents"][1]["path"] == f"sftp://127.0.0.1:{server.port}/sets/shards"
