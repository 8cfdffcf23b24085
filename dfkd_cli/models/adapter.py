"""Networks as their authors wrote them: images in, logits out is made of whatever they take and return.

A network is run once in each mode. Where it writes to its input, or returns anything but logits, hooks of its own make
up for that in every later pass. It is not wrapped in another module, which would rename its layers and weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import noise, undisturbed

LOG = logging.getLogger(__name__)
NO_GRADIENTS = "torch.no_grad(), inference_mode(), detach()"
_ONE_LOGIT, _TWO = "a network with one logit z has two classes", "the logits (0, z)"


@dataclass(frozen=True)
class Habits:
    """What a network was seen to do.

    Attributes:
        writes: Whether it changes its input.
        outputs: What it returns for two images, by whether it is in training mode. Not every network can be trained.
        alone: What it returns for the first of them by itself, in evaluation mode.
        bounded: Whether all that it returns is from 0 to 1, whatever the images.
    """

    writes: bool
    outputs: Mapping[bool, Any]
    alone: Any
    bounded: bool


def watch(net: nn.Module, input_size: tuple[int, int, int]) -> Habits:
    """Run a network on two images (C, H, W), in evaluation mode and, where that does not fail, in training mode."""
    images, writes, outputs = noise(net, input_size, 2), False, dict[bool, Any]()
    for training in (False, True):
        passed = images.clone()
        try:
            with undisturbed(net, training):
                outputs[training] = net(passed)
        except Exception:  # foreign code can raise anything
            if not training:
                raise
        writes |= passed._version > 0 or not torch.equal(passed, images)
    with undisturbed(net):
        torch.manual_seed(1)  # other numbers than before
        alone = net(images[:1].clone())
        bounded = _bounded(outputs[False]) and _bounded(net(1e3 * images))
    return Habits(writes, outputs, alone, bounded)


def _bounded(output: Any) -> bool:
    """Whether the logits are what a sigmoid or a softmax gives, and not all alike, as of a head that begins with 0."""
    values = logits_in(output)
    within = isinstance(values, Tensor) and bool(((values >= 0) & (values <= 1)).all())
    return within and bool((values != values.flatten()[0]).any())


def adapt(net: nn.Module, spec: str, num_classes: int, habits: Habits) -> None:
    """Make every pass of a network leave its input alone and give logits (B, K); say what is made of its outputs.

    Args:
        net: The network; it gets hooks where it needs them.
        spec: What it is called.
        num_classes: K.
        habits: What :func:`watch` saw.

    Raises:
        ConfigError: There is one class.
        ArtifactError: Evaluation does not give logits.
    """
    if num_classes < 2:
        raise ConfigError(
            f"{spec}: of one class there is nothing to learn", f"{_ONE_LOGIT}: give it --num-classes 2 and {_TWO}"
        )
    logits = {training: logits_in(output) for training, output in habits.outputs.items()}
    if _size(logits[False]) != (1, num_classes):
        raise ArtifactError(
            f"{spec}: gives {_shown(habits.outputs[False])} for an image instead of logits {(1, num_classes)}",
            _how_logits(habits.outputs[False], num_classes),
        )
    if _size(alone := logits_in(habits.alone)) != (1, num_classes):
        raise ArtifactError(
            f"{spec}: gives {_shown(habits.alone)} for one image by itself instead of logits {(1, num_classes)}",
            "keep the dimension of the batch: flatten(1) instead of squeeze()",
        )
    probable = {training for training, values in logits.items() if _sums_to_one(values, num_classes)}
    packed = [training for training, output in habits.outputs.items() if not isinstance(output, Tensor)]
    if packed:
        when = "" if False in packed else " in training"
        LOG.warning("%s: returns %s%s; the logits are `logits` or the first tensor", spec,
                    _shown(habits.outputs[packed[0]]), when)  # fmt: skip
    if probable:
        LOG.warning("%s: ends in probabilities; their logarithms are taken as the logits", spec)
    elif habits.bounded:
        LOG.warning("%s: all outputs are from 0 to 1, whatever the image: leave out a sigmoid at its end", spec)
    one, first = (values[0].float().nan_to_num() for values in (alone, logits[False]))
    if not torch.allclose(one, first, rtol=0.01, atol=0.01 * float(one.abs().max())):
        LOG.warning("%s: answers change with chance or with the other images of a batch, in evaluation too", spec)
    if habits.writes:
        net.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
    if packed or probable:

        def answer(net: nn.Module, _: Any, output: Any) -> Any:
            values = logits_in(output)
            return values.clamp_min(torch.finfo(values.dtype).tiny).log() if net.training in probable else values

        net.register_forward_hook(answer)


def _how_logits(output: Any, num_classes: int) -> str:
    """A hint how something else that a network returns for an image becomes logits."""
    size = _size(logits_in(output))
    if size == (1, num_classes, 1, 1):
        return "it keeps the dimensions of an image: add flatten(1) at its end"
    if num_classes == 2 and size in ((1,), (1, 1)):
        return f"{_ONE_LOGIT}: return {_TWO}, torch.cat([torch.zeros_like(z), z], 1) of z (B, 1)"
    several = not isinstance(output, Tensor)
    return f"{'return the logits first, or under the name `logits`; or ' * several}check --num-classes"


def require_gradients(
    net: nn.Module, spec: str, input_size: tuple[int, int, int], looked_into: AbstractContextManager[Any] | None = None
) -> Any:
    """Check that gradients come back through a network to its images (C, H, W); a warning where they are all 0.

    Args:
        net: The network.
        spec: What it is called.
        input_size: Of its images.
        looked_into: What lasts while it runs, and not while gradients are taken.

    Returns:
        What ``looked_into`` gives.

    Raises:
        ArtifactError: They do not.
    """
    images, hint = noise(net, input_size, 2).requires_grad_(), f"leave {NO_GRADIENTS} and rounding out of forward"
    try:
        with undisturbed(net), torch.enable_grad():
            with looked_into or contextlib.nullcontext() as seen:
                answer = logits_in(net(images)).square().sum()
            # In the same mode: what is checkpointed is computed anew.
            found = torch.autograd.grad(answer, images, allow_unused=True)[0] if answer.requires_grad else None
    except Exception as error:  # foreign code can raise anything
        if "checkpoint" in str(error).lower():
            hint = "switch gradient checkpointing off where it is built"
        raise ArtifactError(f"{spec}: fails where gradients are taken: {str(error)[:200]}", hint) from error
    if found is None:
        raise ArtifactError(f"{spec}: no gradient comes back to its images", hint)
    if not found.any():
        LOG.warning("%s: the gradient that comes back to images of noise is 0: unless its weights are, %s", spec, hint)
    return seen


def require_training(net: nn.Module, spec: str, num_classes: int, input_size: tuple[int, int, int], batch: int) -> None:
    """Check that a network can be trained on batches of so many images (C, H, W).

    Raises:
        ConfigError: It fails, as BatchNorm does with one value for each channel, gives no logits (B, K), or lets no
            gradient back.
    """
    try:
        with undisturbed(net, training=True), torch.enable_grad():
            answers = net(noise(net, input_size, batch))
    except Exception as error:  # foreign code can raise anything
        few = "give more images, a larger --batch-size or a smaller --accumulate"
        hint = few if batch < 2 else "check --input-size and the model SPEC"
        raise ConfigError(f"{spec}: cannot be trained on {batch} images at once: {str(error)[:300]}", hint) from error
    if _size(answers) != (1, num_classes):
        raise ConfigError(
            f"{spec}: gives {_shown(answers)} for an image in training instead of logits {(1, num_classes)}",
            "return the logits first, or under the name `logits`",
        )
    learns = any(parameter.requires_grad for parameter in net.parameters())
    if learns and not answers.requires_grad:
        raise ConfigError(f"{spec}: no gradient comes back from its answers", f"leave {NO_GRADIENTS} out of forward")
    try:
        nn.ModuleList([net]).state_dict()
    except TypeError as error:
        hint = "let its state_dict take *args and **kwargs and hand them on, as PyTorch calls it"
        raise ConfigError(f"{spec}: its weights cannot be kept: {error}", hint) from error


def logits_in(output: Any) -> Any:
    """Of what a network returns, the logits: what is called so, or the first tensor. None where there is no tensor."""
    if isinstance(output, Tensor):
        return output
    first = next(filter(lambda value: value is not None, map(logits_in, _parts(output).values())), None)
    named = _parts(output).get("logits")
    return named if isinstance(named, Tensor) else first


def _parts(output: Any) -> Mapping[Any, Any]:
    """What a container holds, by name or position; nothing where it is none."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return output._asdict()
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(enumerate(output)) if isinstance(output, tuple | list) else {}


def _size(output: Any) -> tuple[int, ...] | None:
    """The shape for one of several images, (1, ...)."""
    return tuple(output[:1].shape) if isinstance(output, Tensor) and output.ndim else None


def _shown(output: Any) -> str:
    """What was returned, in words: the shape for one image, or each of the parts'."""
    if isinstance(output, Tensor):
        return str(_size(output))
    parts = ", ".join(f"{name} {_shown(value)}" if isinstance(name, str) else _shown(value)
                      for name, value in _parts(output).items())  # fmt: skip
    return type(output).__name__ + (f" of {parts}" if parts else "")


def _sums_to_one(logits: Any, num_classes: int) -> bool:
    if _size(logits) != (1, num_classes):
        return False
    sums = logits.float().sum(1)
    return bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
