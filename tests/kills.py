"""Commands that are killed (-9) at random moments and given again, until they end: the result of each is the same.

    python tests/kills.py [COUNT] [--first N]

Each number stands for one command of all stages and kinds of method, and for one to three kills of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mutations import lasting
from pipeline import finish, start

from dfkd_cli.artifacts.files import sha256_file

GRID = {
    "seeds": [0, 1],
    "teacher": "teacher",
    "student": {"steps": 100, "batch_size": 4},
    "rows": {
        "zskd": {"synthesize": {"method": "zskd", "num_images": 8, "batch_size": 4, "iterations": 2}},
        "noise": {"distill": {"transfer_set": ["noise:8"]}},
    },
}
POOLED = "--student resnet8 --num-images 40 --batch-size 8 --iterations 3 --student-steps 3 --student-batch-size 8"
# By what is written; each works with what those before it have written.
COMMANDS = {
    "teacher": "train-teacher --model resnet8 --steps 800 --batch-size 8 --holdout 0.05 --snapshots 2",
    "shards": "synthesize --method deepinversion --num-images 80 --batch-size 4 --iterations 3",
    "streamed": "synthesize --method zskt --student resnet8 --steps 80 --num-images 16 --batch-size 8 --width 0.25"
    " --student-steps 2 --snapshots 2",
    "contrasted": f"synthesize --method cmi {POOLED} --width 0.25 --memory 20 --negatives 8 --snapshots 2",
    "generated": f"synthesize --method fast-dfkd {POOLED} --width 0.25",
    "metadata": "collect-metadata",
    "student": "distill --transfer-set shards --steps 600 --batch-size 8 --snapshots 3",
    "followed": "distill --transfer-set shards --student resnet8 --objective response ofd crd --steps 200"
    " --batch-size 8",
    "climbed": "distill --transfer-set real:30 --method pseudo-examples --pseudo-images 8 --steps 150 --batch-size 8",
    "evaluation": "evaluate student followed",
    "comparison": "compare student streamed/student",
    "grid": "compare --recipe grid.yaml",
}


def command(name: str) -> list[str]:
    """What is typed to make it."""
    return [*COMMANDS[name].split(), "--device", "cpu", "--out", name]


def prepare(place: Path) -> dict[str, float]:
    """Make all of it without a kill. Returns the seconds that each took."""
    (place / "grid.yaml").write_text(json.dumps({"grid": GRID}))
    took = {}
    for name in COMMANDS:
        begin = time.monotonic()
        finish(command(name), place)
        took[name] = time.monotonic() - begin
    return took


def results(directory: Path) -> dict[str, Any]:
    """The hashes of all weights, images, records and curves in a directory, and what is measured in it."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in directory.rglob("[!.]*") if path.is_file()):
        name = str(path.relative_to(directory))
        if path.name in ("evaluation.json", "results.json", "measurements.json"):
            found[name] = json.loads(path.read_text(), object_hook=lasting)
        elif path.suffix in (".safetensors", ".csv", ".png") or path.name in ("manifest.json", "model.json"):
            found[name] = sha256_file(path)
    return found


def working_in(place: Path) -> bool:
    """Whether there is a process, as far as can be seen, whose working directory it is."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.readlink() == place:
                return True
    return False


def kill_again(number: int, source: Path, took: dict[str, float]) -> tuple[str, int, list[str]]:
    """What is made with the kills of that number, how many they were, and which results are others."""
    chance = random.Random(number)
    name, kills = chance.choices([*COMMANDS], [*took.values()])[0], 0
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for other in source.iterdir():
            if other.name != name:
                (place / other.name).symlink_to(other)
        for _ in range(chance.randint(1, 3)):
            process = start(command(name), place)
            try:
                process.communicate(timeout=chance.uniform(0, took[name]))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
            while working_in(place):
                time.sleep(0.05)  # processes that it has started end soon after it
        finish(command(name), place)
        expected, found = results(source / name), results(place / name)
        return name, kills, [file for file in {*expected, *found} if expected.get(file) != found.get(file)]


def main() -> None:
    """All numbers from the first on; exit 1 if any result was another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("--first", type=int, default=0)
    a = parser.parse_args()
    killed: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory)
        took = prepare(source)
        number = a.first
        while killed.total() < a.count:
            name, kills, others = kill_again(number, source, took)
            killed[name] += kills
            wrong += bool(others)
            if others:
                sys.stdout.write(f"{number}: {name}, {kills} kills: other {', '.join(sorted(others))}\n")
                sys.stdout.flush()
            number += 1
    sys.stdout.write(f"{killed.total()} kills, {wrong} other results: {dict(killed)}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
