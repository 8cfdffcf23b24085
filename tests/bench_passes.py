"""What torch.compile, bfloat16 and memory layouts are worth to the passes of a generator against a student.

    python tests/bench_passes.py [--model SPEC] [--width 0.25] [--batch-size 64] [--repeats 9] [--device cpu]

An iteration is a step of the generator through teacher and student, and one of the student on new images. Every way of
doing it has networks of its own and takes its turn in each repeat. Prints the median of each, and as a ratio to what
the methods do: float32, channels last where there is BatchNorm, not compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_synthesis import fresh, say
from torch import Tensor, nn

from dfkd_cli.models.generators import Generator

LATENT = 100


def iteration(networks: list[nn.Module], batch_size: int, device: str, bf16: bool) -> Callable[[], None]:
    """The passes of one iteration of teacher, student and generator."""
    teacher, student, generator = networks
    trained = list(generator.parameters())

    def images() -> Tensor:
        return generator(torch.randn(batch_size, LATENT, device=device))

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            pixels = images()
            loss = (teacher(pixels) - student(pixels)).abs().mean()
        torch.autograd.grad(loss, trained)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                pixels = images()
                answers = teacher(pixels)
            loss = (student(pixels) - answers).abs().mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """One JSON line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=float, default=0.25, help="of the generator")
    for name, default in {"batch-size": 64, "repeats": 9, "channels": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()

    def networks(layout: torch.memory_format | None = None) -> list[nn.Module]:
        teacher, student = fresh(a.model, a.channels), fresh(a.model, a.channels).requires_grad_(True).train()
        torch.manual_seed(0)
        generator = Generator(teacher.info, LATENT, "sigmoid", a.width).to(memory_format=torch.channels_last)
        made = [teacher, student, generator]
        return [
            network.to(a.device) if layout is None else network.to(a.device, memory_format=layout) for network in made
        ]

    ways = {
        "float32": iteration(networks(), a.batch_size, a.device, False),
        "channels last": iteration(networks(torch.channels_last), a.batch_size, a.device, False),
        "contiguous": iteration(networks(torch.contiguous_format), a.batch_size, a.device, False),
        "bfloat16": iteration(networks(), a.batch_size, a.device, True),
        "compiled": iteration([torch.compile(n) for n in networks()], a.batch_size, a.device, False),
    }
    once, seconds = {}, {name: list[float]() for name in ways}
    for repeat in range(-2, a.repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            if repeat == -2:
                once[name] = took  # compiled here
            elif repeat >= 0:
                seconds[name].append(took)
    usual = statistics.median(seconds["float32"])
    say({"bench": "passes", "work": vars(a), "threads": torch.get_num_threads()})
    for name, values in seconds.items():
        median = statistics.median(values)
        say({name: round(median, 4), "ratio": round(median / usual, 2), "first_s": round(once[name], 1)})


if __name__ == "__main__":
    main()
