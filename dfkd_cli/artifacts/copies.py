"""What a command reads at URLs, copied to this machine before it begins.

The one place where a URL becomes a directory. A copy lies in ``$DFKD_CACHE/urls``, under the hash of its index, so that
it is made once, and what was changed at the URL is another one; its files are checked whenever a command begins. From
there on it is a directory as any other: the command reads nothing else, and a data-free one is sealed as always.

fsspec starts threads, and a process with several cannot be confined (:mod:`dfkd_cli.data.access`). So copies are made
by a process of their own.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.server import Server
from dfkd_cli.errors import ArtifactError, ConfigError, DfkdError, RunFailed, machine_can_fail
from dfkd_cli.processes import end_with_parent
from dfkd_cli.settings import Settings
from dfkd_cli.spec import Spec
from dfkd_cli.ui import Progress, Terminal
from dfkd_cli.urls import copies, copies_directory, is_url, know_copies, take_credentials, with_credentials

KINDS: dict[str, type[DfkdError]] = {error.code: error for error in (ConfigError, ArtifactError, RunFailed)}


def on_this_machine(settings: Settings, terminal: Terminal, known: bool = False) -> Settings:
    """The settings with directories for URLs, which are copied where they are not here yet.

    Args:
        settings: Of a command.
        terminal: Where progress goes.
        known: Whether to take what another process of the same command has copied, as it is.

    Raises:
        ConfigError: A protocol that is not known, or a package is missing.
        ArtifactError: What lies there is no finished directory, or damaged.
        RunFailed: A server fails.
    """
    urls: dict[str, str] = {}

    def collect(text: str) -> str:
        if is_url(url := Spec.read(text).rest):
            urls[text] = url
        return text

    settings.each_read(collect)
    wanted = {url for url in urls.values() if not (known and os.path.isdir(copies().get(url, "")))}
    know_copies(fetch(wanted, terminal) if wanted else {}, anew=not known)  # not what the environment says
    return settings.each_read(lambda text: Spec.read(text).bits + copies()[urls[text]] if text in urls else text)


def fetch(urls: Collection[str], terminal: Terminal) -> dict[str, str]:
    """The directories with copies of what lies at URLs.

    Raises:
        DfkdError: As :func:`on_this_machine`.
    """
    wanted = {url: with_credentials(url) for url in sorted(urls)}
    # The same modules as here, and none of the working directory; what is secret is in no argument.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-P", "-c", code], **pipes, text=True, encoding="utf-8")
    assert process.stdin is not None and process.stdout is not None
    found: dict[str, str] = {}
    progress: dict[str, Progress] = {}
    try:
        with process.stdin as ask:
            json.dump([wanted, str(copies_directory())], ask)
        for line in process.stdout:
            kind, url, *said = json.loads(line)
            if kind == "is in":
                found[url] = said[0]
            elif kind == "has":
                done, total = said
                if url not in progress and done < total:
                    progress[url] = Progress(terminal, f"fetch {url}", "files", total, done)
                if url in progress:
                    progress[url].update(done)
            else:
                raise KINDS[kind](*said)
        if found.keys() != wanted.keys():
            raise RunFailed("the process that fetches was killed", "the same command goes on")
    finally:
        for bar in progress.values():
            bar.close()
        process.kill()
        process.wait()
        process.stdout.close()
    return found


def main() -> None:
    """The life of the process that copies: each line that it writes is JSON."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is said to all: the parent decides
    urls, place = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever else writes something says it to the user

    def say(kind: str, url: str, *said: object) -> None:
        answer.write(json.dumps([kind, url, *said]) + "\n")

    for url, typed in urls.items():
        take_credentials(typed)
        try:
            with machine_can_fail():
                server = Server(url)
                sha256, rows = server.rows()
                server.receive(rows, directory := Path(place, sha256), functools.partial(say, "has", url))
                say("is in", url, str(directory))
        except DfkdError as error:
            say(error.code, url, error.message, error.hint)
            break
    answer.close()
    os._exit(0)  # file systems may have threads that nobody has to wait for
