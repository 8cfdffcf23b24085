"""Time a teacher on this device: seconds per image and inner step, by threads, arithmetic and layout.

Reads a teacher, writes nothing. An inner step is what every method that optimises images cannot avoid: images forward
through the teacher, the gradient back to them. Repeat it where the work will be done: the best setting is another one
on another machine, or beside other work.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_cli.catalog import UNTRAINED, Command
from dfkd_cli.config import option
from dfkd_cli.data.seal import sealed
from dfkd_cli.errors import machine_can_fail
from dfkd_cli.models.adapter import require_gradients
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
    min_time: float = option(0.5, "seconds that each setting is timed for, at least", above=0, high=3600)


def data_free(_: Inputs) -> bool:
    """No dataset may be opened."""
    return True


COMMAND = Command(
    position=52,
    ignores=("out", "overwrite", "seed", *UNTRAINED),
    examples=("dfkd bench teacher/ --min-time 0.1",),
    next="dfkd synthesize --method zskd --threads 1",
)

COLUMNS: list[evaluation.Column] = [
    ("THREADS", "threads", str),
    ("PRECISION", "precision", str),
    ("LAYOUT", "layout", str),
    ("S PER IMAGE-STEP", "seconds", "{:.3g}".format),
    ("IMAGE-STEPS / S", "rate", "{:,.1f}".format),
]
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Time every setting, print them from the fastest to the slowest, and what to type for the best that there is."""
    if dry_run:
        return rehearse(settings, run, terminal)
    location = locate(settings.inputs.teacher, settings.inputs)
    with sealed("bench is data-free", real_data(location)):
        teacher = location.open(settings.code).network().classifier
        require_gradients(teacher.net, teacher.info.spec, teacher.info.input_size)
    device = pick_device(settings.run.device)
    results = sorted(timed(teacher.freeze().to(device), settings, device), key=lambda result: result["seconds"])
    terminal.answer(evaluation.rows(results, COLUMNS))
    # Commands choose the layout by the network: of their settings, the quickest.
    own = teacher.layout()
    best = next(result for result in results if LAYOUTS[result["layout"]] == own)
    flags = {"threads": best["threads"], "precision": best["precision"]}
    terminal.answer(f"{device}: " + " ".join(f"--{name} {value}" for name, value in flags.items() if value != "-"))
    return {"metrics": {"best": flags, "device": str(device)}, "results": results}


def timed(teacher: Classifier, settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One result for each setting: ``seconds`` and ``rate`` per image and inner step.

    Raises:
        RunFailed: The device's memory does not hold the batch.
    """
    most = torch.get_num_threads()
    counts = sorted({1, *(2**n for n in range(most.bit_length())), most}) if device.type == "cpu" else [0]
    with machine_can_fail():
        images = torch.randn(settings.inputs.batch_size, *teacher.info.input_size, device=device).requires_grad_()
        layouts = [*LAYOUTS.items()] if teacher.takes_channels_last() else [*LAYOUTS.items()][:1]
        for threads, precision, (layout, memory_format) in itertools.product(counts, PRECISIONS, layouts):
            teacher.to(memory_format=memory_format)
            step = functools.partial(inner_step, teacher.net, images, PRECISIONS[precision])
            took = seconds(step, threads or 1, min_run_time=settings.inputs.min_time) / len(images)
            result = {"threads": threads or "-", "precision": precision, "layout": layout}
            yield {**result, "seconds": took, "rate": 1 / took}


def inner_step(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient to images (B, C, H, W) of a function of their logits, in the arithmetic of a type."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = network(images)
    return torch.autograd.grad(logits.float().square().sum(), images)[0]
