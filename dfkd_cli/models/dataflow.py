"""Which values a network's layers pass to each other, as one image shows: what quantisers are put in between."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfkd_cli.models.classifier import probe

Value = tuple[int, int]  # a tensor, as it is after so many changes in place

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
_ATEN = torch.ops.aten
_NORMS = (_ATEN.native_batch_norm, _ATEN.cudnn_batch_norm, _ATEN._native_batch_norm_legit_no_training)
_FOLLOW = (*_NORMS, _ATEN.relu, _ATEN.relu_, _ATEN.hardtanh, _ATEN.hardtanh_, _ATEN.clamp, _ATEN.clamp_min)
_PRODUCTS = (_ATEN.convolution, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)


def _can_round(module: nn.Module) -> bool:
    """Whether it is a layer with a weight of its own: not one that is computed, as by weight and spectral norm."""
    return isinstance(module, LAYERS) and module._parameters.get("weight") is not None


def _value(tensor: Tensor, changed: bool = False) -> Value:
    return id(tensor), tensor._version + changed


class _Read(NamedTuple):
    """Where a value is read, by which operator, and what comes out."""

    where: nn.Module
    operator: Any
    result: Value


class Dataflow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What happens in a network while one image goes through it.

    Attributes:
        layers: The layers that can round their weight and input, in the order in which they first run.
        elsewhere: The names of modules in which something else is computed by products: with other weights, or none.
    """

    def __init__(self, net: nn.Module, input_size: tuple[int, int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.net, self.paths = net, {module: path for path, module in net.named_modules()}
        self.layers: list[nn.Module] = []
        self.elsewhere: list[str] = []
        self._running: list[nn.Module] = []
        self._runs = Counter[nn.Module]()
        self._results: list[tuple[nn.Module, Value]] = []  # the inner modules first
        self._reads: dict[Value, list[_Read]] = {}
        self._held: list[Any] = []  # identities of freed tensors are used again
        with contextlib.ExitStack() as stack:
            for module in self.paths:
                stack.enter_context(module.register_forward_pre_hook(self._enter))
                stack.enter_context(module.register_forward_hook(self._leave))
            stack.enter_context(self)
            probe(net, input_size)

    def joints(self) -> list[nn.Module]:
        """The modules that are to give integers: to sums, and to other modules than layers from convolutions."""
        runs = [
            value for layer, value in self._results if isinstance(layer, CONVOLUTIONS) and layer in self.layers[:-1]
        ]
        ends = list(map(self._end, runs))
        adding = (_ATEN.add, _ATEN.add_)
        sums = {read.result for end in ends for read in self._reads.get(end, ()) if read.operator in adding}
        added = [value for value, reads in self._reads.items() if any(read.result in sums for read in reads)]
        places = [self._place(value) for value in (*ends, *added) if self._leaves(value)]
        return list(dict.fromkeys(place for place in places if place is not None))

    def _end(self, value: Value) -> Value:
        """What becomes of a convolution's output by BatchNorm and ReLU."""
        while len(reads := self._reads.get(value, [])) == 1 and reads[0].operator in _FOLLOW:
            value = reads[0].result
        return value

    def _leaves(self, value: Value) -> bool:
        return any(not _can_round(read.where) for read in self._reads.get(value, ()))

    def _place(self, value: Value) -> nn.Module | None:
        """The innermost module that gives the value and runs once."""
        given = (module for module, result in self._results if result == value)
        return next((module for module in given if self._runs[module] == 1 and module is not self.net), None)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)
        self._runs[module] += 1
        if _can_round(module) and module not in self.layers:
            self.layers.append(module)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self._running.pop()
        if isinstance(output, Tensor):
            self._results.append((module, _value(output)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [(value, _value(value)) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        output = function(*args, **(kwargs or {}))
        self._held += [args, output]
        first: Any = next(iter(output), None) if isinstance(output, tuple | list) else output
        if self._running and isinstance(first, Tensor):
            where, operator = self._running[-1], function.overloadpacket
            given = _value(first, any(value is first for value, _ in read))
            for _, value in read:
                self._reads.setdefault(value, []).append(_Read(where, operator, given))
            by_product = operator in _PRODUCTS or "attention" in str(operator)
            path = self.paths[where]
            if by_product and not _can_round(where) and path not in self.elsewhere:
                self.elsewhere.append(path)
        return output
