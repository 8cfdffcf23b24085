"""What a round costs against the loop it cannot avoid: forward, gradient to the input, update.

    python tests/bench_synthesis.py [--rounds 5] [--iterations 50] [--batch-size 200] [--model lenet5]

Both sides in one process, in turn, same teacher, batch and optimiser. The bare loop has no loss terms to name, no
targets to draw, no Lightning, nothing to write; ours is the whole of ``fit`` with everything it does. Prints the
ratio of each pair and the median.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it, before torch loads

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.registry import build
from dfkd_cli.resolve import resolve
from dfkd_cli.rounds import fit
from dfkd_cli.ui import Terminal


def bare(teacher: Classifier, rounds: int, iterations: int, batch: int, lr: float, temperature: float) -> float:
    """Seconds of the loop that cannot be avoided."""
    targets = torch.full((batch, teacher.info.num_classes), 1 / teacher.info.num_classes)
    start = time.perf_counter()
    for _ in range(rounds):
        images = torch.rand(batch, *teacher.info.input_size, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=lr, fused=True)
        for _ in range(iterations):
            loss = F.cross_entropy(teacher(images) / temperature, targets)
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
    return time.perf_counter() - start


def ours(teacher: Classifier, rounds: int, iterations: int, batch: int) -> float:
    """Seconds of the same work as ``dfkd synthesize --method zskd`` does it, Trainer and shards included."""
    values = {"method": "zskd", "iterations": iterations, "batch_size": batch, "device": "cpu"}
    settings = resolve("synthesize", [("", values)])
    config = settings.method.config
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        run = RunDirectory(Path(directory), settings, [], {})
        head = {"shape": list(teacher.info.input_size), "dtype": config.dtype}
        writer = ShardWriter(Path(directory), head, rounds)
        fit(settings.method.entry.load()(teacher, config, rounds * batch, 0, writer), run, Terminal(silent=True))
        return time.perf_counter() - start


def main() -> None:
    """Print one JSON line a pair, then the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet5")
    for name, default in {"rounds": 5, "iterations": 50, "batch-size": 200, "pairs": 7, "channels": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    size = (a.channels, 32, 32)
    info = ModelInfo(a.model, 10, size, (0.0,) * a.channels, (1.0,) * a.channels)
    teacher = Classifier(build(a.model, 10, size), info).freeze()
    if a.channels > 1:
        teacher.to(memory_format=torch.channels_last)
    work = dataclasses.asdict(info) | vars(a) | {"threads": torch.get_num_threads()}
    print(json.dumps({"bench": "synthesis", "work": work}))  # noqa: T201 -- the answer of this script
    ours(teacher, 1, 2, a.batch_size)  # imports and first calls
    ratios = []
    for _ in range(a.pairs):
        floor = bare(teacher, a.rounds, a.iterations, a.batch_size, 0.1, 20.0)
        full = ours(teacher, a.rounds, a.iterations, a.batch_size)
        ratios.append(full / floor)
        print(json.dumps({"bare_s": round(floor, 3), "ours_s": round(full, 3), "ratio": round(ratios[-1], 3)}))  # noqa: T201
    print(json.dumps({"median_ratio": round(statistics.median(ratios), 3), "limit": 1.1}))  # noqa: T201


if __name__ == "__main__":
    main()
