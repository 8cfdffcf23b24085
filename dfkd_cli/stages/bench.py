"""Time a teacher on this device: seconds per image and inner step, by threads, arithmetic and layout.

Reads a teacher, writes nothing. An inner step is what every method that optimises images cannot avoid: images forward
through the teacher, the gradient back to them. Repeat it where the work will be done: the best setting is another one
on another machine, or beside other work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.data.seal import sealed
from dfkd_cli.errors import ArtifactError, machine_can_fail
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.names import locate
from dfkd_cli.options import ForeignModel
from dfkd_cli.report import evaluation
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import pick_device, real_data
from dfkd_cli.stages.measures import seconds
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(ForeignModel):
    """What is timed."""

    teacher: str = option("teacher", "teacher: model directory or SPEC", argument="TEACHER")
    batch_size: int = option(64, "images optimised together", low=1, rehearsal=2)
    compiled: bool = option(False, "time what torch.compile makes of the network, too: needs a compiler, takes minutes")
    min_time: float = option(0.5, "seconds that each setting is timed for, at least", above=0, high=3600)


def data_free(_: Inputs) -> bool:
    """No dataset may be opened."""
    return True


COMMAND = Command(
    position=52,
    examples=("dfkd bench teacher/ --min-time 0.1",),
    next="dfkd synthesize --method deepinversion --threads 1",
)

COLUMNS: list[evaluation.Column] = [
    ("THREADS", "threads", str),
    ("PRECISION", "precision", str),
    ("LAYOUT", "layout", str),
    ("COMPILED", "compiled", lambda compiled: "yes" if compiled else "no"),
    ("S PER IMAGE-STEP", "seconds", "{:.3g}".format),
    ("IMAGE-STEPS / S", "rate", "{:,.1f}".format),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Time every setting, print them from the fastest to the slowest, and what to type for the best that there is."""
    if dry_run:
        return rehearse(settings, run, terminal)
    location = locate(settings.inputs.teacher, settings.inputs)
    with sealed("bench is data-free", real_data(location)):
        teacher = location.open(settings.code).network().classifier
    device = pick_device(settings.run.device)
    results = sorted(timed(teacher.freeze().to(device), settings, device), key=lambda result: result["seconds"])
    terminal.answer(evaluation.rows(results, COLUMNS))
    # Commands choose the layout by the network and do not compile it: of their settings, the quickest.
    own = "channels last" if teacher.batch_norms() else "contiguous"
    best = next(result for result in results if result["layout"] == own and not result["compiled"])
    flags = {"threads": best["threads"], "precision": best["precision"]}
    terminal.answer(f"{device}: " + " ".join(f"--{name} {value}" for name, value in flags.items() if value != "-"))
    return {"metrics": {"best": flags, "device": str(device)}, "results": results}


def timed(teacher: Classifier, settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One result for each setting: ``seconds`` and ``rate`` per image and inner step.

    Raises:
        ArtifactError: The network cannot be compiled here.
        RunFailed: The device's memory does not hold the batch.
    """
    inputs, before = settings.inputs, torch.get_num_threads()
    most = settings.run.threads or before
    counts = (
        sorted({1, *(2**n for n in range(most.bit_length()) if 2**n <= most), most}) if device.type == "cpu" else [0]
    )
    ways = itertools.product(counts, ("32", "bf16"), LAYOUTS, (False, True) if inputs.compiled else (False,))
    images = torch.randn(inputs.batch_size, *teacher.info.input_size, device=device).requires_grad_()
    try:
        for threads, precision, layout, compiled in ways:
            teacher.to(memory_format=LAYOUTS[layout])
            shown = {"threads": threads or "-", "precision": precision, "layout": layout, "compiled": compiled}
            network = torch.compile(teacher.net) if compiled else teacher.net

            def step(network: Any = network, bfloat: bool = precision == "bf16") -> None:
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat):
                    logits = network(images)
                torch.autograd.grad(logits.float().square().sum(), images)

            with machine_can_fail():
                try:
                    took = seconds(step, threads or 1, min_run_time=inputs.min_time) / len(images)
                except torch._dynamo.exc.TorchDynamoException as error:
                    reason = str(error).strip().splitlines()[0]
                    raise ArtifactError(f"torch.compile: {reason:.200}", "leave out --compiled") from None
            yield {**shown, "seconds": took, "rate": 1 / took}
    finally:
        torch.set_num_threads(before)
