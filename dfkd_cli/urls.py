"""URLs where the name of a directory may stand: without credentials, and what stands for their copies on this machine.

What a user types is freed of ``user:password@`` before anything else sees it; only who opens a URL asks for it again. A
command works on copies (:mod:`dfkd_cli.artifacts.copies`); whatever it writes or says of one, it names the URL.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

COPIES = "DFKD_COPIES"  # the variable with which the processes of a command know of its copies
SHORT = 12  # characters that the name of a user has at most; what is longer and stands alone is a token
# Where directories lie. fsspec also speaks protocols that lead on to what some file says, also on this machine.
PROTOCOLS = (
    "s3", "s3a", "hf", "sftp", "ssh", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "ftp", "smb", "webdav",
    "hdfs", "oss", "oci", "file",
)  # fmt: skip
_URL = re.compile(r"[A-Za-z][\w+.-]+(://|::)")
_USER = re.compile(r"\b((?:sftp|ssh|ftp|https?|smb|webdav)://)([^/\s]*@)([^/\s]*)")  # elsewhere it is no login
_credentials: dict[str, str] = {}  # by protocol and host


def is_url(name: str) -> bool:
    """Whether a name is a URL. A Windows drive is none, nor is ``timm:resnet18``."""
    return _URL.match(name) is not None


def take_credentials(text: str) -> str:
    """Text without the ``user:password@`` of the URLs in it, which this process keeps in mind."""

    def take(match: re.Match[str]) -> str:
        protocol, user, host = match.groups()
        _credentials[protocol + host] = user
        return protocol + host

    return _USER.sub(take, text)


def with_credentials(url: str) -> str:
    """A URL as it was typed."""
    for place, user in _credentials.items():
        protocol, _, host = place.partition("://")
        if url == place or url.startswith(place + "/"):
            return url.replace(place, f"{protocol}://{user}{host}", 1)
    return url


def without_secrets(text: str) -> str:
    """What somebody else says of a URL, without credentials however they stand in it."""
    text = _USER.sub(r"\1\3", text)
    for user in _credentials.values():
        name, _, password = user.removesuffix("@").partition(":")
        secret = password or (name if len(name) > SHORT else "")
        text = text.replace(secret, "***") if secret else text
    return text


def copies_directory() -> Path:
    """Where copies of what lies at URLs are kept: in ``$DFKD_CACHE``, or the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("DFKD_CACHE") or os.path.join(cache, "dfkd")), "urls").absolute()


def copies() -> Mapping[str, str]:
    """The directories that stand for URLs in this command, by URL."""
    return _parsed(os.environ.get(COPIES, "{}"))


def know_copies(directories: Mapping[str, str], anew: bool = False) -> None:
    """Say which directories stand for URLs from now on, these alone or also those that are known.

    That holds here and in all processes that are started.
    """
    os.environ[COPIES] = json.dumps({**({} if anew else copies()), **directories})


@functools.lru_cache(8)
def _parsed(text: str) -> Mapping[str, str]:
    return {str(url): str(directory) for url, directory in json.loads(text).items()}


def named(value: Value) -> Value:
    """Text, or plain values, in which the URLs stand for their copies."""
    known = copies()

    def name(text: str) -> str:
        for url, directory in known.items():
            text = text.replace(directory, url)
        return text

    return each_text(value, name) if known else value


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with every text in them changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {each_text(key, change): each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(each_text(inner, change) for inner in value)
    return value
