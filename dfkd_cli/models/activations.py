"""What happens inside a network: which layers there are to watch, and their outputs while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.models.classifier import Classifier, is_batch_norm, probe

K = TypeVar("K")


@dataclass(frozen=True)
class Tap:
    """A place in a network: what comes out of a layer, or with ``before`` what goes into it."""

    layer: nn.Module
    before: bool = False


@contextlib.contextmanager
def values_at(taps: Mapping[K, Tap], summary: Callable[[Tensor], Tensor] = torch.clone) -> Iterator[dict[K, Tensor]]:
    """The latest value (B, ...) at each tap by its name, whenever the network runs inside the ``with`` block.

    Args:
        taps: Where, by name.
        summary: What is kept of a value. Not the value itself, which what follows may change in place.
    """
    seen: dict[K, Tensor] = {}

    def watch(name: K, tap: Tap) -> Any:
        if tap.before:
            return tap.layer.register_forward_pre_hook(
                lambda _, inputs, named: seen.update({name: summary(first(*inputs, *named.values()))}), with_kwargs=True
            )
        return tap.layer.register_forward_hook(lambda _, __, output: seen.update({name: summary(first(output))}))

    with contextlib.ExitStack() as hooks:
        for name, tap in taps.items():
            hooks.enter_context(watch(name, tap))
        yield seen


@contextlib.contextmanager
def batch_statistics(classifier: Classifier) -> Iterator[None]:
    """BatchNorm layers use each batch's statistics inside the ``with`` block, and learn nothing from it.

    Everything else stays as it is: dropout and frozen parameters among them.
    """
    layers = [(layer, layer.training) for layer in classifier.batch_norms() if isinstance(layer, _BatchNorm)]
    for layer, _ in layers:
        layer.training = True
    try:
        with averages_kept(classifier):
            yield
    finally:
        for layer, training in layers:
            layer.training = training


@contextlib.contextmanager
def averages_kept(classifier: Classifier) -> Iterator[None]:
    """BatchNorm layers that are in training take nothing into their averages inside the ``with`` block."""
    layers = [m for m in classifier.batch_norms() if m.training and getattr(m, "track_running_stats", False)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def first(*values: Any) -> Any:
    """The first tensor, perhaps in a tuple, of what a layer takes or gives. None where there is none."""
    for value in values:
        found = first(*value) if isinstance(value, (tuple, list)) else value
        if isinstance(found, Tensor):
            return found
    return None


@dataclass
class Call:
    """One run of a layer. The tensors are kept: their identity tells who reads what, and freed memory is reused.

    Attributes:
        path: The layer's name in ``net``.
        layer: The layer.
        input, output: The first tensor that went in, and that came out.
    """

    path: str
    layer: nn.Module
    input: Tensor
    output: Tensor


def calls_of(classifier: Classifier) -> list[Call]:
    """Every run of a layer while one image goes through the network, in order."""
    calls: list[Call] = []
    paths = {layer: path for path, layer in classifier.net.named_modules()}

    def remember(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        taken, given = first(*inputs, *named.values()), first(output)
        if taken is not None and given is not None:
            calls.append(Call(paths[layer], layer, taken, given))

    with contextlib.ExitStack() as hooks:
        for layer in paths:
            hooks.enter_context(layer.register_forward_hook(remember, with_kwargs=True))
        probe(classifier.net, classifier.info.input_size)
    return calls


def pre_activations(classifier: Classifier) -> dict[str, nn.Module]:
    """The layers whose outputs go into the activation functions, by their name in ``net``, in the order they run.

    These are the convolutions and linear layers; where BatchNorm follows one directly, the BatchNorm stands for it. The
    last is the layer that gives the logits.

    Raises:
        ArtifactError: No layer gives the logits.
    """
    head = classifier.head()
    ran: dict[nn.Module, Call] = {}
    for call in calls_of(classifier):
        if is_batch_norm(call.layer):
            normalised = next((layer for layer, other in ran.items() if other.output is call.input), None)
            if normalised in (None, head):
                continue
            del ran[normalised]
        elif call.layer is not head and not isinstance(call.layer, (nn.Linear, nn.Conv2d)):
            continue
        ran[call.layer] = call
    last = ran.pop(head)
    return {call.path: layer for layer, call in [*ran.items(), (head, last)]}
