"""Export a model to ONNX, in float or with integers, and check it on images.

Reads a model and a transfer set, writes an export directory (export/): model.onnx and export.json, which says how to
call it. Of a student with few bits (distill --student w8a8:teacher/) the integers are those that it was trained with;
--bits 8 calibrates any other model on the images. What the checks do not pass is not written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_cli.artifacts.files import write_atomic, write_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.catalog import UNTRAINED, Command
from dfkd_cli.config import option
from dfkd_cli.data.seal import check_kept, kept, kept_by, sealed
from dfkd_cli.data.sources import Source
from dfkd_cli.errors import ConfigError, GateNotMet, RunFailed
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.exported import EXACT, FILE, RECORD, OnnxNetwork
from dfkd_cli.models.names import LoadedModel, locate
from dfkd_cli.models.quantized import computed_in_float, find_ranges, quantisers, quantize
from dfkd_cli.options import ForeignModel
from dfkd_cli.settings import Settings
from dfkd_cli.spec import Spec
from dfkd_cli.stages.inputs import TransferSet, may_be_real, open_transfer_set, real_data
from dfkd_cli.stages.measures import cost, share
from dfkd_cli.stages.onnx_graph import WITH_INT4, opset, to_onnx
from dfkd_cli.stages.quantization import calibration, shown
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(ForeignModel):
    """What is read, and how."""

    model: str = option("student", "model directory, or a SPEC with --weights", argument="MODEL", parent=True)
    bits: int | None = option(
        None, "32, or 8: integers, calibrated on the images (default: as the model has)", low=8, high=32
    )
    calibrate: str = option("shards", "transfer set for the ranges, as of distill --transfer-set", parent=True)
    check: str | None = option(
        None, "transfer set that the checks are made on (default: that of --calibrate)", parent=True
    )
    images: int = option(500, "images of each that are looked at, evenly spaced", low=2, rehearsal=2)
    min_agreement: float | None = option(
        None, "gate: exit 5 when agreement with the float model is below (0 to 1)", low=0, high=1, volatile=True
    )
    data_dir: str | None = option(None, "where datasets lie, for real images", volatile=True)


def data_free(inputs: Inputs) -> bool:
    """Unless the images may be real, no dataset may be opened."""
    return not any(map(may_be_real, _sets(inputs)))


def _sets(inputs: Inputs) -> list[str]:
    """What the images are taken from: for the ranges, for the checks."""
    return [inputs.calibrate, inputs.check or inputs.calibrate]


COMMAND = Command(
    position=55,
    out="export",
    ignores=UNTRAINED,
    examples=("dfkd export", "dfkd export student/ --bits 8 --calibrate shards/ --min-agreement 0.98"),
    next="dfkd evaluate student/ export/",
)
NEAR = 1e-4  # the largest difference of a logit from the network's own, relative to the largest logit
# Integers may be as far from their simulation as that is from the float model: a bias is a whole number too, which
# moves some activations by one bit. Measured: 0.05 to 0.44 times as far for a ResNet-8, 0.28 for EfficientNet-Lite0.
FAINT = 1e-3  # of the largest logit: as far at least, where rounding changes next to nothing
WARM, TIMED = 5, 50  # runs of one image, before the clock runs and with it


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Export a model. Unless the images are real, no dataset can be opened meanwhile."""
    if dry_run:
        return rehearse(settings, run, terminal)
    inputs = settings.inputs
    if inputs.bits not in (None, 8, 32):
        raise ConfigError(
            f"--bits {inputs.bits}: either 32 or 8", "other widths are trained: distill --student w4a4:DIR"
        )
    with opened(settings) as (model, images, checked):
        parents = [model.parent("model"), images.parent, *([] if checked is images else [checked.parent])]
        free = not (may_be_real(inputs.calibrate) or images.real)
        facts = {"data_free": free, "uses": _united(model.provenance, images.uses)}
        directory = RunDirectory(settings.out, settings, parents, facts, kept_by() if data_free(inputs) else None)
        if directory.claim():
            directory.say_complete(terminal)
            _check_gate(directory, directory.record["metrics"], "it was exported without this gate")
        else:
            with directory.guard(), kept():
                _make(directory, model, images, checked, parents)
    metrics = directory.record["metrics"]
    for line in _shown(metrics):
        terminal.answer(f"{directory.path}: {line}")
    return {"artifacts": {"export": str(directory.path)}, "metrics": metrics}


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[tuple[LoadedModel, TransferSet, TransferSet]]:
    """Open the model, and the images for the ranges and for the checks.

    Unless images may be real, no dataset can be opened inside the ``with`` block.

    Raises:
        ConfigError: Only answers are seen of the model, such as of an export.
    """
    inputs = settings.inputs
    location = locate(inputs.model, inputs)
    with contextlib.ExitStack() as seals:
        if data_free(inputs):
            seals.enter_context(sealed("the transfer set is data-free", real_data(location, inputs.data_dir)))
            seals.enter_context(kept())
        model = location.open(settings.code).network()
        sets = {name: open_transfer_set(name, model, inputs.data_dir, settings.run.seed) for name in _sets(inputs)}
        first, second = map(sets.__getitem__, _sets(inputs))
        yield model, first, second


def _make(
    directory: RunDirectory,
    model: LoadedModel,
    images: TransferSet,
    checked: TransferSet,
    parents: list[dict[str, Any]],
) -> None:
    """Export, check, write."""
    inputs = directory.settings.inputs
    simulated = _simulation(model.classifier, calibration(images.source, inputs.images), inputs.bits)
    info, plain = simulated.info, _in_float(simulated)
    looked_at = calibration(checked.source, inputs.images)
    facts = {"classes": info.classes and list(info.classes), "spec": info.spec, "model_sha256": model.sha256}
    made = {"float": to_onnx(plain, facts)}
    rounds = bool(quantisers(simulated.net))
    if rounds:
        made["integers"] = to_onnx(simulated, facts)
    metrics = _checked(made, simulated, plain, looked_at) | _latencies(made, next(shown(looked_at))[:1])
    name = next(reversed(made))
    version = opset(made[name])
    metrics["bytes"] = len(made[name])
    _check_gate(directory, metrics, "nothing is written")
    check_kept()
    counted = cost(plain.cpu(), torch.device("cpu"))
    record = {
        "schema": 1,
        "kind": "export",
        **dataclasses.asdict(info) | {"spec": f"onnx:{info.spec}"},
        "weights": {"file": FILE, "sha256": write_atomic(directory.path / FILE, made[name])},
        "opset": version,
        "rounded": rounds,
        "computed_in_float": computed_in_float(simulated.net, info.input_size) if rounds else [],
        "parents": parents,
        "metrics": metrics,
        **{key: counted[key] for key in ("parameters", "macs")},
        "use": _use(rounds, version),
        "provenance": _provenance(model, directory.record if info.spec != model.classifier.info.spec else {}),
    }
    write_json(directory.path / RECORD, record)
    directory.record["device"] = "cpu"
    directory.finish([directory.path / FILE, directory.path / RECORD], metrics)


def _check_gate(directory: RunDirectory, metrics: Mapping[str, Any], then: str) -> None:
    least, reached = directory.settings.inputs.min_agreement, metrics["agreement"]
    if least is not None and reached < least:
        what = f"agreement with the float model is {reached:.4f}, below {least:g}"
        raise GateNotMet(f"{directory.path}: {what}: {then}", "see --bits, --calibrate", answer={"metrics": metrics})


def _provenance(model: LoadedModel, calibrated: Mapping[str, Any]) -> dict[str, Any]:
    """Where an export comes from: its model's origins, a teacher's being itself, and what ``calibrated`` says.

    The latter are the facts of this run where ranges are found in it, on its images.
    """
    of = model.provenance
    free = of.get("data_free", "teacher" not in of) and calibrated.get("data_free", True)
    uses = _united(of, calibrated.get("uses", ()))
    return {"teacher": model.sha256, **of, "data_free": free, "uses": uses, "line": list(model.ancestry)}


def _united(provenance: Mapping[str, Any], uses: Iterable[str]) -> list[str]:
    return sorted({*provenance.get("uses", ()), *uses})


def _simulation(classifier: Classifier, images: Source, bits: int | None) -> Classifier:
    """The classifier that is exported: the model itself, or a copy with quantisers of 8 bits.

    Raises:
        ConfigError: The model has quantisers of its own, and other bits are wanted; or nothing in it can be quantised.
    """
    info, has_own = classifier.info, bool(quantisers(classifier.net))
    if has_own and bits is not None:
        raise ConfigError(
            f"{info.spec} has few bits already", f"leave out --bits {bits}, or export the model it was copied from"
        )
    simulated = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format).eval()
    if bits == 8:
        quantize(simulated.net, 8, 8, info.input_size, info.spec)
        find_ranges(simulated, shown(images))
        simulated.info = dataclasses.replace(info, spec=f"w8a8:{info.spec}")
    return simulated


def _in_float(simulated: Classifier) -> Classifier:
    """The same weights without rounding."""
    plain = copy.deepcopy(simulated)
    for module in quantisers(plain.net):
        module.calibrated = False
    plain.info = dataclasses.replace(plain.info, spec=Spec.read(plain.info.spec).rest)
    return plain


@torch.no_grad()
def _checked(made: dict[str, bytes], simulated: Classifier, plain: Classifier, images: Source) -> dict[str, Any]:
    """How far what was made is from what it is made of, on images.

    Raises:
        RunFailed: Further than arithmetic explains.
    """
    spec = plain.info.spec
    asked: dict[str, nn.Module] = {"torch": plain, "float": OnnxNetwork(made["float"], spec)}
    if "integers" in made:
        exactly, usually = (OnnxNetwork(made["integers"], simulated.info.spec, way) for way in (True, False))
        asked |= {"simulation": simulated, "exact": exactly, "usual": usually}
    parts = [{name: network(pixels).float() for name, network in asked.items()} for pixels in shown(images)]
    logits = {name: torch.cat([part[name] for part in parts]) for name in asked}
    floats, answered = logits["torch"], logits["float"]
    largest = floats.abs().max()
    difference = float((answered - floats).abs().max() / largest)
    if not difference <= NEAR:
        raise RunFailed(
            f"{spec}: onnxruntime's logits differ by {difference:.2g} of the largest, not {NEAR:g}: nothing is written"
        )
    metrics: dict[str, Any] = {"images": len(images), "float_difference": difference}
    if "integers" not in made:
        return metrics | {"agreement": _agreement(answered, floats)}
    rounded, exact, usual = (logits[name] for name in ("simulation", "exact", "usual"))
    metrics |= {
        "agreement": _agreement(exact, floats),
        "agreement_with_simulation": _agreement(exact, rounded),
        "agreement_inexact": _agreement(usual, floats),
        "logit_error": float((exact - rounded).abs().mean() / largest),
        "rounding_error": float((rounded - floats).abs().mean() / largest),
    }
    if not metrics["logit_error"] <= max(metrics["rounding_error"], FAINT):
        raise RunFailed(
            f"{simulated.info.spec}: integers differ from their simulation by {metrics['logit_error']:.2g} of the "
            f"largest logit, that one from the float model by {metrics['rounding_error']:.2g}: nothing is written"
        )
    return metrics


def _agreement(logits: Tensor, others: Tensor) -> float:
    return share(logits.argmax(1) == others.argmax(1))


def _latencies(made: dict[str, bytes], image: Tensor) -> dict[str, float]:
    """The median time of one image (1, C, H, W) in onnxruntime, in ms, with one thread and with all; all take turns."""
    ways = {name: (model, True) for name, model in made.items()}
    if "integers" in made:
        ways["inexact"] = made["integers"], False
    threads, times = torch.get_num_threads(), dict[str, float]()
    try:
        for label, count in (("one_thread", 1), ("all_threads", threads)):
            torch.set_num_threads(count)
            networks = {name: OnnxNetwork(model, name, exact) for name, (model, exact) in ways.items()}
            seconds: dict[str, list[float]] = {name: [] for name in networks}
            for _ in range(WARM + TIMED):
                for name, network in networks.items():
                    start = time.perf_counter()
                    network(image)
                    seconds[name].append(time.perf_counter() - start)
            times |= {f"latency_ms_{name}_{label}": 1000 * median(taken[WARM:]) for name, taken in seconds.items()}
    finally:
        torch.set_num_threads(threads)
    return times


def _use(rounds: bool, version: int) -> list[str]:
    """How the model is called in Python, without torch or dfkd."""
    since = "  # 1.23 or later, for weights of 4 bits" if version == WITH_INT4 else ""
    options = [f"options.add_session_config_entry({json.dumps(EXACT[0])}, {json.dumps(EXACT[1])})"] if rounds else []
    return [
        f"import onnxruntime; options = onnxruntime.SessionOptions(){since}",
        *options,
        f"session = onnxruntime.InferenceSession({FILE!r}, options)",
        "logits = session.run(None, {'pixels': pixels})[0]  # float32 (B, C, H, W) in [0,1] to (B, K)",
    ]


def _shown(metrics: dict[str, Any]) -> list[str]:
    """What was measured, in lines."""
    lines = [f"float: {metrics['float_difference']:.2g} of the largest logit from torch, on {metrics['images']} images"]
    names = {"float": "float"}
    if "agreement_with_simulation" in metrics:
        lines.append(
            f"integers: agree with torch's simulation on {metrics['agreement_with_simulation']:.2%}, with the float "
            f"model on {metrics['agreement']:.2%}; without {EXACT[0]} on {metrics['agreement_inexact']:.2%} on this CPU"
        )
        names |= {"integers": "integers", "inexact": f"without {EXACT[0]}"}
    for key, name in names.items():
        one, several = (metrics[f"latency_ms_{key}_{threads}"] for threads in ("one_thread", "all_threads"))
        lines.append(f"{name}: {one:.3f} ms for an image with one thread, {several:.3f} with all")
    return lines
