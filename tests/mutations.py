"""Artifacts with random damage, and what the commands that read them make of it.

    python tests/mutations.py [COUNT] [--first N]

Each number stands for one damage of one file: bits, a truncation, a value of a record, two files swapped, one deleted
or emptied. A command that reads the artifact then either refuses it in one line (exit 2 or 3), or does what it does
with the intact one: the same numbers, the same bytes of weights and images.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import finish, kill_after_saving, run

from dfkd_cli.artifacts.files import sha256_file

MADE = [
    line.split()
    for line in (
        "train-teacher --steps 60 --batch-size 16 --device cpu",
        "synthesize --method zskd --num-images 12 --batch-size 4 --iterations 2 --device cpu",
        "synthesize --method zskt --student lenet5-half --steps 2 --num-images 8 --batch-size 4 --out streamed"
        " --device cpu",
        "collect-metadata --covariance-units 20 --device cpu",
        "distill --transfer-set shards --steps 6 --batch-size 4 --snapshots 2 --device cpu",
        "evaluate student --out evaluation --device cpu",
        "compare student --out comparison --device cpu",
    )
]
RESUMED = "distill --transfer-set shards --steps 401 --batch-size 2 --out unfinished --device cpu"
# By the artifact that is damaged: the commands that read it.
READERS = {
    "teacher": [
        "evaluate teacher --json",
        "info teacher --json",
        "synthesize --method zskd --num-images 2 --batch-size 2 --iterations 1 --out new --json",
        "distill --transfer-set noise:8 --steps 2 --batch-size 4 --out new --json",
    ],
    "shards": [
        "evaluate shards --json",
        "info shards --json",
        "distill --transfer-set shards --steps 2 --batch-size 4 --out new --json",
        " ".join(MADE[1]),
    ],
    "streamed": [
        "evaluate streamed/student --json",
        "distill --transfer-set streamed --steps 2 --batch-size 4 --out new --json",
    ],
    "metadata": [
        "synthesize --method lopes --metadata metadata --num-images 2 --batch-size 2 --iterations 1 --out new --json"
    ],
    "student": [
        "evaluate student --json",
        "info student --json",
        "compare student --out new --json",
        " ".join(MADE[4]),
    ],
    "evaluation": [" ".join(MADE[5])],
    "comparison": [" ".join(MADE[6])],
    "unfinished": [RESUMED],
}
# Where things lie, how long they took, when they were made: no part of a result.
PASSING = {"artifacts", "seconds", "latency_ms", "started", "ended", "mtime", "host", "path"}


def prepare(place: Path) -> None:
    """Make one artifact of each kind in a directory; one of them is a training that was killed."""
    for command in MADE:
        finish(command, place)
    kill_after_saving(RESUMED.split(), place, place / "unfinished" / "checkpoints" / "last.ckpt")


def damage(place: Path, chance: random.Random) -> tuple[str, str]:
    """Damage one file under a directory; the artifact that it belongs to, and what was done in words."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
    # Each kind of file as often as any other, however many there are of it.
    kinds = sorted({(path.relative_to(place).parts[0], path.suffix, path.stem.split("-")[0]) for path in files})
    artifact, suffix, stem = chance.choice(kinds)
    path = chance.choice([p for p in files if p.relative_to(place).parts[0] == artifact and p.suffix == suffix
                          and p.stem.split("-")[0] == stem])  # fmt: skip
    ways: list[Callable[[Path, random.Random], str]] = [_bits, _bits, _truncation, _deletion, _emptying, _swap]
    if suffix in (".json", ".yaml", ".csv"):
        ways += [_value] * 4
    return artifact, f"{path.relative_to(place)}: {chance.choice(ways)(path, chance)}"


def _bits(path: Path, chance: random.Random) -> str:
    content, flipped = bytearray(path.read_bytes()), []
    for _ in range(chance.choice((1, 1, 1, 8))):
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        content[at] ^= 1 << bit
        flipped.append(f"{at}.{bit}")
    path.write_bytes(content)
    return f"bits {' '.join(flipped)} flipped"


def _truncation(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    size = chance.randrange(len(content))
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


def _deletion(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "deleted"


def _emptying(path: Path, chance: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _swap(path: Path, chance: random.Random) -> str:
    other = chance.choice(sorted(p for p in path.parent.iterdir() if p.is_file() and p.name != ".lock"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped with {other.name}"


STRANGE: list[Any] = [
    None, True, -1, 0, 3, 10**12, 10**400, 1e308, 0.5, "", "30", "../../x", "\u202e", "<b>", [], [[]], {}, {"a": 1},
]  # fmt: skip


def _value(path: Path, chance: random.Random) -> str:
    """Another value somewhere in a record."""
    text, value = path.read_text(), chance.choice(STRANGE)
    if path.suffix != ".json":
        words = [word for word in text.replace(",", " ").replace(":", " ").split() if word not in "-[]{}"]
        word = chance.choice(words)
        at = chance.choice([i for i in range(len(text)) if text.startswith(word, i)])
        written = value if isinstance(value, str) else json.dumps(value)
        path.write_text(text[:at] + written + text[at + len(word) :])
        return f"{word!r} at {at} -> {written[:40]!r}"
    record = json.loads(text)
    where, key = chance.choice(list(_places(record)))
    before, where[key] = where[key], value
    path.write_text(json.dumps(record))
    return f"{key!r}: {str(before)[:40]!r} -> {str(value)[:40]!r}"


def _places(record: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a document that can be replaced: what it is in, and its key there."""
    for key in record if isinstance(record, dict) else range(len(record)):
        yield record, key
        if isinstance(record[key], (dict, list)):
            yield from _places(record[key])


def outcome(command: str, place: Path) -> tuple[int, Any, str]:
    """Exit code, result and stderr of a command: its JSON document, and the hashes of what it wrote."""
    words = command.split()
    done = run(words, place)
    out = (
        words[words.index("--out") + 1]
        if "--out" in words
        else {"synthesize": "shards", "distill": "student"}.get(words[0])
    )
    results = sorted((place / out).rglob("*")) if out else []
    written = {path.name: sha256_file(path) for path in results if path.suffix in (".safetensors", ".csv", ".png")}
    answer = json.loads(done.stdout, object_hook=lasting) if done.stdout.startswith("{") else None
    return done.returncode, (answer, written), done.stderr


def lasting(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a JSON document without what passes."""
    return {key: value for key, value in part.items() if key not in PASSING}


def faults(number: int, intact: Path, expected: dict[str, Any]) -> tuple[str, list[str], float]:
    """A name for how the damage of that number ended, what went wrong, and the seconds that the command took.

    Args:
        number: Which damage; the same one every time.
        intact: The directory of the artifacts.
        expected: The outcomes of commands with intact artifacts, which are filled in as they are needed.
    """
    chance = random.Random(number)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "work"
        shutil.copytree(intact, place)
        artifact, what = damage(place, chance)
        command = chance.choice(READERS[artifact])
        begin = time.monotonic()
        code, result, err = outcome(command, place)
        took = time.monotonic() - begin
    if command not in expected:
        with tempfile.TemporaryDirectory() as name:
            shutil.copytree(intact, Path(name) / "work")
            expected[command] = outcome(command, Path(name) / "work")
            assert expected[command][0] == 0, expected[command]
    about = f"{number}: {what}; {command} ({took:.1f} s): exit {code}"
    if code == 0:
        lines = {*err.splitlines()} - {*expected[command][2].splitlines()}
        said = any(line.startswith(("warning", "note")) or "damaged" in line or "again" in line for line in lines)
        said |= "unverified" in str(result[0])
        same = result == expected[command][1]
        ended = "the same" if same else "said"
        difference = _difference(result, expected[command][1])
        return ended, [] if same or said else [f"{about}, another result, and no word: {difference}"], took
    ended = f"exit {code}"
    problems = [] if code in (2, 3) else [f"{about}: {err[-2000:]}"]
    if "Traceback" in err or len([line for line in err.splitlines() if line.startswith("error")]) > 1:
        problems.append(f"{about}, not in one line: {err[-2000:]}")
    return ended, problems, took


def _difference(one: Any, other: Any) -> str:
    (answer, files), (wanted, hashes) = one, other
    changed = sorted(name for name in {*files, *hashes} if files.get(name) != hashes.get(name))
    return f"{changed} {str(answer)[:300]} / {str(wanted)[:300]}" if answer != wanted else str(changed)


def main() -> None:
    """All numbers from the first on; exit 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=1500)
    parser.add_argument("--first", type=int, default=0)
    a = parser.parse_args()
    ends: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        expected: dict[str, Any] = {}
        for number in range(a.first, a.first + a.count):
            ended, problems, took = faults(number, Path(name), expected)
            longest = max(longest, took)
            ends["wrong" if problems else ended] += 1
            for problem in problems:
                sys.stdout.write(problem + "\n")
                sys.stdout.flush()
    sys.stdout.write(", ".join(f"{ended}: {count}" for ended, count in ends.most_common()))
    sys.stdout.write(f"; the longest took {longest:.1f} s\n")
    sys.exit(bool(ends["wrong"]))


if __name__ == "__main__":
    main()
