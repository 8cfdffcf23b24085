"""Passes of a network as CUDA graphs: all its kernels launched together.

Small networks keep a GPU waiting for the next launch. In bfloat16 on an H200, as a graph and with kernels launched one
by one: a WRN-40-2 answers 256 images of 32x32 pixels in 1.9 and 8.3 ms; forward and backward of a WRN-16-1 take 2.2 and
8.2, of a ResNet-18 4.9 and 13.8. ``torch.compile`` is no quicker (1.9 and 5.7 with its backend ``cudagraphs``, 1.6 and
2.4 with ``reduce-overhead``, beside other work), and compiles for 10 to 40 s.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from dfkd_cli.models.classifier import Classifier

RECORDED_AFTER = 10  # passes of the same kind: fewer are not worth the recording, which takes some of them


def logits_of(classifier: Classifier, pixels: Tensor) -> Tensor:
    """The logits (B, K) of pixels (B, C, H, W), as the classifier gives them when it is called.

    On a GPU, passes that come often are repeated as graphs. What the network does anew each time outside of its
    kernels is not repeated: whoever hooks into its layers calls the classifier itself. Pixels get no gradient from a
    graph: where they need one, and where processes share the work, the classifier runs as ever.
    """
    wanted = torch.is_grad_enabled() and pixels.requires_grad
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not pixels.is_cuda or wanted or shared:
        return classifier(pixels)
    if classifier not in _GRAPHS:
        _GRAPHS[classifier] = _Graphs(classifier.net)
    return _GRAPHS[classifier](classifier.normalise(pixels))


class _Graphs:
    """Repeats passes of a network, forward and backward, once they have come often enough.

    A pass is recorded for each shape, precision and mode, and for the memory that the weights are in. A network
    that waits for the GPU, to decide by a value, runs as ever; so does one that finds no memory for a second copy of
    its activations, and a pass while the backward of the one before it is still to come, which needs the memory of the
    graph.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.layers = net, list(net.modules())
        self.passes: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, _Recorded] = {}
        self.pending: set[Hashable] = set()  # recorded passes whose backward is still to come

    def __call__(self, inputs: Tensor) -> Tensor:
        kind = self._kind(inputs)
        self.passes[kind] += 1
        if self.passes[kind] == RECORDED_AFTER and _never_waits(self.net, inputs):
            try:
                self.recorded[kind] = _Recorded(self.net, inputs)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        if kind not in self.recorded or kind in self.pending:
            return self.net(inputs)
        output = self.recorded[kind](inputs)
        if output.requires_grad:
            self.pending.add(kind)
            output.register_hook(lambda _: self.pending.discard(kind))  # type: ignore[no-untyped-call]
        return output

    def _kind(self, inputs: Tensor) -> Hashable:
        """What a recorded pass depends on, other than by values."""
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        modes = tuple((layer.training, getattr(layer, "track_running_stats", None)) for layer in self.layers)
        tensors = itertools.chain(self.net.parameters(), self.net.buffers())
        memory = tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors)
        return inputs.shape, inputs.dtype, precision, torch.is_grad_enabled(), modes, memory


class _Recorded:
    """A pass over inputs of one shape, and its backward to the parameters that need gradients.

    Args:
        net: The network; its parameters and buffers stay where they are.
        inputs: An example (B, C, H, W), of which BatchNorm learns nothing.
    """

    def __init__(self, net: nn.Module, inputs: Tensor) -> None:
        self.inputs = inputs.detach().clone()
        named = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.parameters = list(named.values()) if torch.is_grad_enabled() else []
        # Leaves of their own in the same memory: those of the network accumulate gradients on another stream.
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in named.items()}
        precision, mixed = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

        def forward() -> Tensor:
            # Casts of weights that are cached between passes would not be part of the graph.
            with torch.autocast("cuda", precision, enabled=mixed, cache_enabled=False):
                return functional_call(net, leaves, (self.inputs,))

        def backward(output: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)

        def passes() -> None:  # the libraries choose their kernels in the first ones
            for _ in range(3):
                output = forward()
                if self.parameters:
                    backward(output, torch.zeros_like(output))

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _forgetting(net, passes)
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
            output = forward()
        self.output = output.detach()
        if self.parameters:
            self.gradient = torch.zeros_like(self.output)
            with torch.cuda.graph(self.backward, self.forward.pool(), capture_error_mode="thread_local"):
                self.gradients = backward(output, self.gradient)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The output for inputs of the same shape."""
        return _Replay.apply(self, inputs, *self.parameters)


class _Replay(torch.autograd.Function):
    """A recorded pass as a step of a computation that has gradients."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, inputs: Tensor, *_: Tensor) -> Tensor:
        ctx.recorded = recorded
        recorded.inputs.copy_(inputs)
        recorded.forward.replay()
        return recorded.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recorded: _Recorded = ctx.recorded
        for parameter in recorded.parameters:
            if parameter.grad is not None:  # perhaps in the memory that is written to now
                parameter.grad = parameter.grad.clone()
        recorded.gradient.copy_(gradient)
        recorded.backward.replay()
        # New tensors in the same memory: autograd keeps what nobody else holds, and copies what somebody does.
        return None, None, *(None if g is None else g.detach() for g in recorded.gradients)


def _never_waits(net: nn.Module, inputs: Tensor) -> bool:
    """Whether the network only launches kernels: what waits for their values cannot be recorded."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            _forgetting(net, lambda: net(inputs))
        return True
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _forgetting(net: nn.Module, action: Callable[[], Any]) -> None:
    """Do something with a network that leaves no trace in its buffers, or in the random state of the GPU."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        try:
            action()
        finally:
            for buffer, value in before:
                buffer.copy_(value)


_GRAPHS: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()
