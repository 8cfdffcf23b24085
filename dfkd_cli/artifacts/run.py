"""One command's output directory: claimed by one process, continued by the same command, refused to any other."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dfkd_cli import __version__
from dfkd_cli.artifacts.files import check_inside, remove, take_lock, write_text
from dfkd_cli.artifacts.integrity import HASHES, RUN, SCRATCH, hash_of, intact, read_run, runs_within, write_run
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.config import dump_yaml, options
from dfkd_cli.errors import ArtifactError, ConfigError, DfkdError, Interrupted
from dfkd_cli.options import MOST_THREADS, Run
from dfkd_cli.processes import writes_records
from dfkd_cli.settings import Settings
from dfkd_cli.spec import Spec
from dfkd_cli.trust import CONFIG
from dfkd_cli.ui import Terminal

LOCK = ".lock"
RECORDS_ONLY = (RUN, CONFIG, "metrics.csv")  # of a run that failed before its first round
AFRESH = "give --overwrite to start afresh"
UNSAID = {"judge": None, "unmade": 0}  # what a record means that does not have this fact; of others it may be the same
LOG = logging.getLogger(__name__)


class RunDirectory:
    """The directory that a command writes, and its ``run.json``.

    ``run.json`` has: the command, its identity (everything that decides the result: settings and the hashes of what
    was read), status, parents, seconds of work over all processes, those of runs ``within`` it included, versions,
    artifacts with hashes, metrics, concerns (what the reader is warned of), error; an ``id``, which checkpoints carry
    too, and the hashes of files that were ``kept``, from early rounds or for a continued run; and ``cut_at``, how much
    was done, where a deadline ended the work: the same command goes on then.

    Args:
        path: The directory.
        settings: The command's settings.
        parents: What the command reads: ``{"role": ..., "path": ..., "sha256": ...}`` each, some with the hash that it
            had ``formerly``, when earlier versions recorded it.
        facts: More for ``run.json`` that does not decide identity, e.g. ``{"data_free": True}``. A finished run with
            other facts is continued: the rows of a comparison may have become more.
        sealed: What keeps data out meanwhile, ``landlock`` or ``python``; None where nothing does.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        parents: list[dict[str, Any]],
        facts: Mapping[str, Any],
        sealed: str | None = None,
    ) -> None:
        self.path, self.settings, self.facts = path, settings, facts
        self.parents = parents
        self.before: dict[str, str] = {}  # by path, the hashes of what it had made when it was finished
        self.identity = {**_own(settings), "parents": [_own_facts(parent) for parent in parents]}
        self.record: dict[str, Any] = {
            "schema": 1,
            "command": settings.command,
            "status": "running",
            "identity": self.identity,
            "parents": [{k: v for k, v in parent.items() if k != "formerly"} for parent in parents],
            **facts,
            **({} if sealed is None else {"sealed": sealed}),
            "argv": ["dfkd", *sys.argv[1:]],
            "versions": _versions(),
            "started": _now(),
            "seconds": 0.0,
            "within": 0.0,  # of them those of runs within this one
            "artifacts": [],
            "metrics": {},
            "concerns": [],
            "error": None,
            "id": secrets.token_hex(8),
            "kept": {},
        }
        self._lock: BinaryIO | None = None
        self._end = contextlib.ExitStack()  # what is done when the work ends
        self._mark = time.monotonic()

    def claim(self) -> bool:
        """Take the directory. Returns True when it already holds this command's finished result.

        Raises:
            ArtifactError: Its ``run.json`` is damaged, or a link in it leads out of it.
            ConfigError: It holds something else, another process works in it, or it cannot be written.
        """
        afresh = self.settings.run.overwrite
        previous = _previous(self.path, afresh)
        if previous is not None and not afresh:
            recorded = previous.get("identity", {})
            parents = _as_recorded(self.parents, recorded.get("parents") or [])
            afresh = _is_another(self.path, recorded, self.settings, self.identity | {"parents": parents})
            same = not afresh and all(previous.get(n, UNSAID.get(n, fact)) == fact for n, fact in self.facts.items())
            finished = previous.get("status") == "done" and not previous.get("cut_at")
            if same and finished and _whole(self.path, previous):
                self.record = {"concerns": [], **previous}  # older records have none
                return True
            if not afresh:
                if "sealed" in self.record and previous.get("sealed") != self.record["sealed"]:
                    self.record["sealed"] = "python"  # the weaker one holds for the whole
                # Its identity too, which shards have in them: an older version knew fewer options.
                lasting = {"identity", "started", "seconds", "within", "concerns", "id", "kept", "device", "processes"}
                lasting -= {"concerns"} if previous.get("cut_at") else set()  # they were of the smaller set
                self.record |= {key: previous[key] for key in lasting if key in previous}
                self.before = {file["path"]: file["sha256"] for file in previous["artifacts"]}
                self._go_on_with_threads(previous.get("versions", {}).get("threads"))
        if not writes_records():
            return False
        self._take_lock()
        if afresh:
            self._spare_parents()
            for item in sorted(self.path.iterdir(), key=lambda item: item.name == RUN):  # last: it makes the rest ours
                ours = self.settings.run.overwrite or item.name in RECORDS_ONLY or item.name.startswith(HASHES)
                if ours and item.name not in (LOCK, SCRATCH):
                    remove(item)
        check_inside(self.path)
        for pattern in (".*.tmp", "*/.*.tmp", "*/*/.*.tmp"):
            for left_by_a_kill in self.path.glob(pattern):
                remove(left_by_a_kill)
        scratch = self.path / SCRATCH
        if self.settings.run.num_nodes == 1 and not scratch.is_symlink():  # else other machines may have theirs there
            for left_by_a_kill in scratch.glob("*"):
                if str(left_by_a_kill.absolute()) != tempfile.gettempdir():
                    remove(left_by_a_kill)
        groups: tuple[type, ...] = (Run, type(self.settings.inputs))
        only_typed = {name for group in groups for name, traits in options(group).items() if traits.get("typed")}
        replayable = {key: value for key, value in self.settings.plain().items() if key not in only_typed}
        self.save()  # first: what lies beside it is ours
        self.keep(self.path / CONFIG, write_text(self.path / CONFIG, dump_yaml(replayable)))
        self.save()
        return False

    def _go_on_with_threads(self, recorded: Any) -> None:
        """Compute with as many threads as the run began with, until the work ends: sums come out the same."""
        import torch

        chosen, number = self.settings.run.threads is not None, torch.get_num_threads()
        if chosen or recorded == number or not isinstance(recorded, int) or not 0 < recorded <= MOST_THREADS:
            return
        self._end.callback(torch.set_num_threads, number)
        torch.set_num_threads(recorded)
        self.record["versions"]["threads"] = recorded
        LOG.warning("%s goes on with %d threads, as it began; --threads %d changes that", self.path, recorded, number)

    def record_concern(self, what: str) -> bool:
        """Record what whoever reads the report is warned of. False where it is recorded already."""
        new = what not in self.record["concerns"]
        if new:
            self.record["concerns"].append(what)
        return new

    def warn(self, what: str, terminal: Terminal) -> None:
        """Record a concern, and say it where it is new."""
        if self.record_concern(what):
            terminal.say(f"warning: {what}")

    def say_complete(self, terminal: Terminal) -> None:
        """Say that the result is there already, and again what it was warned of."""
        terminal.say(f"{self.path} is already complete")
        for what in self.record["concerns"]:
            terminal.say(f"warning: {what}")

    def _spare_parents(self) -> None:
        """Refuse to clear the directory of what the command reads."""
        read = [Spec.read(parent["path"]).rest for parent in self.record["parents"] if "path" in parent]
        read += filter(None, [getattr(self.settings.inputs, "weights", None)])
        for path in read:
            if Path(path).resolve().is_relative_to(self.path.resolve()):
                raise ConfigError(f"{path} is read and would be overwritten", "choose another --out")

    def _take_lock(self) -> None:
        self._lock = take_lock(self.path / LOCK)
        if self._lock is None:
            raise ConfigError(f"{self.path}: another process is writing here", "wait for it, or choose another --out")

    def save(self) -> None:
        """Write ``run.json``, with the time worked so far."""
        if not writes_records():
            return
        now = time.monotonic()
        self.record["seconds"] = round(self.record["seconds"] + now - self._mark, 3)
        self._mark = now
        write_run(self.path, self.record)

    @contextlib.contextmanager
    def counting_runs_within(self) -> Iterator[None]:
        """What is done inside, runs in this directory do. Their seconds are as they record them, of all processes."""
        self.save()
        try:
            yield
        finally:
            within = sum(read_run(place).get("seconds", 0.0) for place in runs_within(self.path))
            self.record |= {"seconds": self.record["seconds"] + within - self.record["within"], "within": within}
            self._mark = time.monotonic()

    def metric(self, name: str) -> Any:
        """A number that the finished run has measured.

        Raises:
            ArtifactError: The record lacks it.
        """
        value = self.record["metrics"].get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArtifactError(f"{self.path / RUN} is damaged: metrics.{name} is {value!r:.40}, not a number", AFRESH)
        return value

    def keep(self, path: Path, sha256: str) -> None:
        """Note the hash of a file when it is written, for whoever reads it later or calls it a result."""
        self.record["kept"][path.relative_to(self.path).as_posix()] = sha256

    def kept(self, path: Path) -> Path | None:
        """A file that an earlier process of this run kept, None where it is gone or damaged."""
        try:
            return intact(path, self.record["kept"].get(path.relative_to(self.path).as_posix()))
        except ArtifactError:
            return None

    def finish(self, artifacts: list[Path], metrics: Mapping[str, Any]) -> None:
        """Record the result. From here on the same command changes nothing.

        Raises:
            ArtifactError: A file that was kept from an early round is damaged or gone.
        """
        self.record["artifacts"] = []
        for path in artifacts:
            name = path.relative_to(self.path).as_posix()
            sha256 = hash_of(path, self.record["kept"].get(name), AFRESH)
            self.record["artifacts"].append({"path": name, "sha256": sha256, "bytes": path.stat().st_size})
        self.record |= {"metrics": dict(metrics), "status": "done", "error": None, "ended": _now()}
        self.save()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Note in ``run.json`` how the work inside ended, when it did not finish."""
        try:
            yield
        except BaseException as error:
            self.record_failure(error)
            raise
        finally:
            self._end.close()
            if self._lock is not None:
                self._lock.close()

    def record_failure(self, error: BaseException) -> None:
        """Note how the work ended."""
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        self.record |= {"status": "interrupted" if stopped else "failed", "error": str(error) or type(error).__name__}
        if isinstance(error, DfkdError):
            self.record |= error.facts
        with contextlib.suppress(DfkdError):  # the disk may be what failed
            self.save()


def check_free(path: Path, settings: Settings, parents: Sequence[Mapping[str, Any]] = ()) -> None:
    """Raise :class:`ConfigError` where a directory cannot be this run's, whatever else than these parents it reads."""
    previous = _previous(path, settings.run.overwrite)
    if previous and not settings.run.overwrite:
        recorded, roles = previous.get("identity", {}), {parent["role"] for parent in parents}
        alike = [parent for parent in recorded.get("parents") or [] if parent.get("role") in roles]
        identity = _own(settings) | {"parents": _as_recorded(parents, alike)}
        _is_another(path, recorded | {"parents": alike}, settings, identity)


def _previous(path: Path, afresh: bool) -> dict[str, Any] | None:
    """The ``run.json`` of a directory, None where there is none."""
    try:
        present = [item for item in path.iterdir() if not item.name.startswith(".")] if path.exists() else []
    except NotADirectoryError:
        raise ConfigError(f"{path} is a file", "choose another --out") from None
    if (path / RUN).exists():
        try:
            if "identity" in read_json(path / RUN, dict[str, Any]):
                return read_run(path)
        except ArtifactError as error:
            if (path / CONFIG).exists():  # by a name alone nothing is ours, and may be removed
                if afresh:
                    return {}
                raise ArtifactError(error.message, AFRESH) from None
    if present:
        raise ConfigError(f"{path} is not empty and was not made by dfkd", "choose another --out")
    return None


def _own(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result. Names of parents are none of them: the parents' hashes are."""
    names = _of_parents(settings)
    return {key: value for key, value in settings.plain(volatile=False).items() if key not in names}


def _of_parents(settings: Settings) -> set[str]:
    inputs: type = type(settings.inputs)
    return {name for name, traits in options(inputs).items() if traits.get("parent")}


def _is_another(path: Path, recorded: Mapping[str, Any], settings: Settings, identity: Mapping[str, Any]) -> bool:
    """Whether the run that is recorded in a directory is another one, which failed before its first round.

    Raises:
        ConfigError: It is another one, and there is something to lose.
    """
    completed = settings.completed(recorded).items() if recorded else ()
    known = {key for key in (*recorded, *identity) if key not in _of_parents(settings)}  # names were on record once
    different = differences({key: value for key, value in completed if key in known}, identity)
    if different and begun(path):
        # Of another command or method everything differs.
        decisive = [change for change in different if change.startswith(("command:", "method:"))]
        hint = "choose another --out, or remove this directory, as --overwrite does"
        raise ConfigError(f"{path} holds another run: {'; '.join(decisive or different)}", hint)
    return bool(different)


def begun(path: Path) -> bool:
    """Whether a directory has more in it than the records of a run that failed before its first round."""
    return any(not item.name.startswith(".") and item.name not in RECORDS_ONLY for item in path.iterdir())


def _own_facts(parent: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parent stands for it in an identity."""
    return {key: value for key, value in parent.items() if key not in ("path", "formerly")}


def _as_recorded(parents: Sequence[Mapping[str, Any]], recorded: Sequence[Any]) -> list[dict[str, Any]]:
    """What stands for parents in an identity: what did in an earlier version's, where they are the same by that."""
    found, roles = [], {parent.get("role") for parent in recorded}
    for parent in parents:
        own = _own_facts(parent)
        before = own | {"sha256": parent["formerly"]} if "formerly" in parent else own
        if before.get("sha256", "") is None:  # nothing stood for what it holds
            before = {key: value for key, value in before.items() if key != "sha256"}
            if parent["role"] not in roles:
                continue
        found.append(before if before in recorded else own)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ, as ``key: old -> new``."""
    changes = []
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{prefix}{key}.")
        elif key == "parents":
            before, now = a or [], b or []
            changed = [f"another {p.get('role', 'input')}" for p in [*now, *before] if (p in before) != (p in now)]
            changes += dict.fromkeys(changed or ["inputs in another order"])
        else:
            changes.append(f"{prefix}{key}: {a} -> {b}")
    return changes


def _whole(path: Path, record: Mapping[str, Any]) -> bool:
    try:
        return all(intact(path / item["path"], item["sha256"]) for item in record["artifacts"])
    except ArtifactError:
        return False


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _versions() -> dict[str, Any]:
    import lightning
    import torch

    versions = {"dfkd": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    return {**versions, "threads": torch.get_num_threads()}  # sums come out in another order with other threads
