"""URLs: told from other names, freed of credentials, and named in place of their copies."""

import pytest

from dfkd_cli import urls
from dfkd_cli.settings import resolve


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    monkeypatch.setattr(urls, "_credentials", {})
    monkeypatch.delenv(urls.COPIES, raising=False)


@pytest.mark.parametrize(
    ("name", "url"),
    [("s3://bucket/shards", True), ("hf://user/model", True), ("simplecache::s3://bucket/x", True),
     ("shards/", False), (r"C:\shards", False), ("C:/shards", False), ("timm:resnet18", False), ("real:100", False),
     ("./net.py:build", False), ("noise:100", False)],
)  # fmt: skip
def test_what_a_url_is(name, url):
    assert urls.is_url(name) == url


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("sftp://me:p@ss@host:22/a/b", "sftp://host:22/a/b"),
        ("w4a8:sftp://me:pass@host/a", "w4a8:sftp://host/a"),
        ("teacher: https://token@host/x\nstudent: sftp://me:pass@other/y", "teacher: https://host/x\nstudent: sftp://other/y"),
        ("hf://user/model@revision", "hf://user/model@revision"),
        ("me@host", "me@host"),
    ],
)  # fmt: skip
def test_credentials_are_taken_out_and_known_to_who_opens_the_url(typed, clean):
    assert urls.take_credentials(typed) == clean
    for line, cleaned in zip(typed.splitlines(), clean.splitlines(), strict=True):
        start = max(cleaned.find(protocol) for protocol in ("sftp:", "https:", "hf:", "me@"))
        assert line.endswith(urls.with_credentials(cleaned[start:]))


def test_credentials_are_those_of_their_host():
    urls.take_credentials("sftp://me:pass@host/a")
    assert urls.with_credentials("sftp://host/b/c") == "sftp://me:pass@host/b/c"
    for other in ("sftp://hosts/b", "sftp://host:22/b", "https://host/b"):
        assert urls.with_credentials(other) == other


def test_what_others_say_has_no_credentials():
    urls.take_credentials("sftp://me:p4ss@host/a")
    said = "cannot log in to sftp://me:p4ss@host/a with 'p4ss', https://you:word@there/"
    assert urls.without_secrets(said) == "cannot log in to sftp://host/a with '***', https://there/"


def test_copies_are_named_by_their_url_in_all_values():
    value = {"a": ["w4a8:/c/urls/12", 3, None], "b": "/c/urls/34/model.json", "/c/urls/12": "x"}
    assert urls.named(value) is value
    urls.know_copies({"s3://b/x": "/c/urls/12"})
    urls.know_copies({"s3://b/y": "/c/urls/34"})
    assert urls.named(value) == {"a": ["w4a8:s3://b/x", 3, None], "b": "s3://b/y/model.json", "s3://b/x": "x"}
    urls.know_copies({"s3://b/x": "/c/urls/56"}, anew=True)
    assert urls.copies() == {"s3://b/x": "/c/urls/56"}


def test_where_copies_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DFKD_CACHE", raising=False)
    assert urls.copies_directory() == tmp_path / "dfkd" / "urls"
    monkeypatch.setenv("DFKD_CACHE", str(tmp_path / "elsewhere"))
    assert urls.copies_directory() == tmp_path / "elsewhere" / "urls"


def test_only_what_is_read_is_looked_for_at_a_url():
    """A recipe's head may have links, and an address is none."""
    about = {"paper": "https://arxiv.org/abs/1", "summary": "see http://x/y"}
    grid = {"teachers": {"a": {"path": "s3://b/teacher"}, "c": "s3://b/other"}, "rows": {"real": {"distill": {}}}}
    row = {"distill": {"transfer_set": ["s3://b/set"], "student": "w4a8:s3://b/small"}}
    settings = resolve("compare", [("", {"about": about, "grid": grid | {"rows": {"few": row}}})])
    seen: list[str] = []
    settings.each_read(lambda text: (seen.append(text), text)[1])
    assert [text for text in seen if "://" in text] == [
        "s3://b/teacher",
        "s3://b/other",
        "s3://b/set",
        "w4a8:s3://b/small",
    ]


@pytest.mark.parametrize("url", ["abfs://container@account/x", "hf://user/model@main", "s3://bucket/a@b"])
def test_what_stands_before_an_at_is_a_login_only_where_there_are_logins(url):
    assert urls.take_credentials(url) == url
