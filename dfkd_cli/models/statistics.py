"""What a teacher's BatchNorm layers remember of its training data, and what they see of other images."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.models.activations import first
from dfkd_cli.models.classifier import Classifier, probe, undisturbed
from dfkd_cli.models.moments import Moments, moments, normalise

DEAD = 1e-5  # recorded variance of a channel that never told images apart


def recorded_moments(classifier: Classifier) -> dict[str, Moments]:
    """The running statistics of every BatchNorm layer, by its name in ``net``: those of the training data."""
    moments = {}
    for name, layer in _layers(classifier).items():
        mean, variance = layer.running_mean, layer.running_var
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)  # what batch_norms() is about
        moments[name] = Moments(mean.flatten(), variance.flatten())
    return moments


class RunningMoments:
    """Mean and biased variance per channel of activations (B, C, ...) that come in batches, as if they came at once.

    Attributes:
        count: Values per channel so far.
        mean: (C,) float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """(C,) float64."""
        return self._squares / self.count

    def add(self, batch: Tensor) -> None:
        """Take in a batch: the pairwise update of Chan, Golub and LeVeque, which loses no digits to cancellation."""
        values = batch.transpose(0, 1).flatten(1)
        variance, mean = (moment.cpu().double() for moment in torch.var_mean(values, dim=1, correction=0))
        new = values.shape[1]
        shift, total = mean - self.mean, self.count + new
        self._squares = self._squares + variance * new + shift**2 * (self.count * new / total)
        self.mean = self.mean + shift * (new / total)
        self.count = total


class Covariance(RunningMoments):
    """Mean and population covariance of rows (B, D), float64, that come in batches, as if they came at once."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self._scatter = torch.zeros(units, units, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64; zeros before the first row."""
        return self._scatter / max(self.count, 1)

    def add(self, batch: Tensor) -> None:
        """Take in a batch: the update of :class:`RunningMoments` for every two units."""
        mean, new = batch.mean(0), len(batch)
        centred, shift = batch - mean, mean - self.mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(shift, shift, alpha=self.count * new / (self.count + new))
        super().add(batch)


class LayerMoments:
    """The moments of all that went into a BatchNorm layer.

    Where one pass runs it several times it recorded what went into each run in turn: its moments are their mean.

    Attributes:
        runs: Of the first, second ... run within each pass.
    """

    def __init__(self) -> None:
        self.runs: dict[int, RunningMoments] = defaultdict(RunningMoments)

    @property
    def count(self) -> int:
        """Values per channel so far."""
        return sum(run.count for run in self.runs.values())

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return torch.stack([run.mean for run in self.runs.values()]).mean(0)

    @property
    def variance(self) -> Tensor:
        """(C,) float64."""
        return torch.stack([run.variance for run in self.runs.values()]).mean(0)


@contextlib.contextmanager
def batch_moments(classifier: Classifier, correction: int = 0) -> Iterator[dict[str, Moments]]:
    """The moments of what last went into every BatchNorm layer, whenever ``net`` runs inside the ``with`` block.

    Of a layer that one pass runs several times they are the mean over its runs, as in :class:`LayerMoments`. Meanwhile
    nothing may copy the network: the copy of a layer would tell of its input here.
    """
    seen: dict[str, Moments] = {}

    def keep(name: str, run: int, latest: Moments) -> None:
        if run:
            pairs = (seen[name].mean, latest.mean), (seen[name].variance, latest.variance)
            latest = Moments(*(former + (now - former) / (run + 1) for former, now in pairs))
        seen[name] = latest

    def take(name: str, run: int, values: Tensor) -> None:
        keep(name, run, moments(values, correction))

    def replace(name: str, run: int, values: Tensor, layer: _BatchNorm) -> Tensor:
        output, latest = normalise(layer, values, correction)
        keep(name, run, latest)
        return output

    with _inputs(classifier, take, replace):
        yield seen


@contextlib.contextmanager
def running_moments(classifier: Classifier) -> Iterator[dict[str, LayerMoments]]:
    """The moments of all that goes into every BatchNorm layer that runs inside the ``with`` block."""
    seen: dict[str, LayerMoments] = defaultdict(LayerMoments)
    with _inputs(classifier, lambda name, run, values: seen[name].runs[run].add(values)):
        yield seen


class AveragedMoments(nn.Module):
    """An exponential average, over batches, of the moments at each BatchNorm layer. Its state is in its buffers.

    Args:
        classifier: Whose layers.
        momentum: Share of the former average in the new one.
    """

    average: Tensor  # (2, C), C: channels of all layers
    updates: Tensor  # (), int64

    def __init__(self, classifier: Classifier, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        with batch_moments(classifier) as seen:  # some layers may not run, such as those of auxiliary heads
            probe(classifier.net, classifier.info.input_size)
        self.sizes = {name: len(moments.mean) for name, moments in seen.items()}
        self.register_buffer("average", torch.zeros(2, sum(self.sizes.values())))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def blend(self, seen: Mapping[str, Moments]) -> dict[str, Moments]:
        """The average as it would be with one more batch, with gradients towards that; at first, the batch's own."""
        joined = self._joined(seen)
        if self.updates:
            joined = (1 - self.momentum) * joined + self.momentum * self.average
        parts = torch.split(joined, list(self.sizes.values()), dim=1)
        return {name: Moments(*part) for name, part in zip(self.sizes, parts, strict=True)}

    @torch.no_grad()
    def update(self, seen: Mapping[str, Moments]) -> None:
        """Take a batch into the average."""
        self.average.copy_(self._joined(self.blend(seen)))
        self.updates += 1

    def _joined(self, seen: Mapping[str, Moments]) -> Tensor:
        """Means and variances of all layers, (2, channels of all layers)."""
        of_layers = [seen[name] for name in self.sizes]
        return torch.stack([torch.cat([m.mean for m in of_layers]), torch.cat([m.variance for m in of_layers])])


def gaussian_divergence(p: Moments, q: Moments, epsilon: float = 1e-6) -> Tensor:
    """``KL(N(p) || N(q))`` per channel (C,), in nats; variances are at least ``epsilon``."""
    ours, theirs = p.variance.clamp_min(epsilon), q.variance.clamp_min(epsilon)
    ratio = ours / theirs
    return 0.5 * (ratio + (p.mean - q.mean).square() / theirs - 1 - ratio.log())


def channel_divergences(seen: Moments, recorded: Moments, reverse: bool = False) -> Tensor:
    """``KL(N(recorded) || N(seen))`` of each channel (C,) of one layer, in nats.

    Args:
        seen: Of some images.
        recorded: The teacher's. Channels that were dead in its training do not count: theirs is 0.
        reverse: ``KL(N(seen) || N(recorded))`` instead.
    """
    divergences = gaussian_divergence(seen, recorded) if reverse else gaussian_divergence(recorded, seen)
    return (recorded.variance >= DEAD) * divergences


def layer_divergence(seen: Moments, recorded: Moments, reverse: bool = False) -> Tensor:
    """The mean, 0-d, of :func:`channel_divergences` over the channels that count."""
    alive = recorded.variance >= DEAD
    return channel_divergences(seen, recorded, reverse).sum() / alive.sum().clamp_min(1)


@contextlib.contextmanager
def _inputs(
    classifier: Classifier,
    take: Callable[[str, int, Tensor], None],
    replace: Callable[[str, int, Tensor, _BatchNorm], Tensor] | None = None,
) -> Iterator[None]:
    """Call ``take`` with the name of a BatchNorm layer, which of its runs in this pass it is, and what goes into it.

    That is (B, C, ...), also where a layer of somebody's own takes (B, ..., C). ``replace`` is called instead of
    a layer of PyTorch's own that normalises by recorded statistics and learns nothing, and returns what comes out.
    """
    runs: Counter[str] = Counter()

    channels_last: dict[str, bool] = {}

    def watch(name: str, channels: int) -> Any:
        def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = first(*inputs, *named.values())
            if name not in channels_last:
                channels_last[name] = _takes_channels_last(layer, values, channels)
            take(name, runs[name], values.transpose(1, -1) if channels_last[name] else values)
            runs[name] += 1

        return before

    def instead(name: str, layer: _BatchNorm, run: Callable[[str, int, Tensor, _BatchNorm], Tensor]) -> Any:
        def forward(input: Tensor) -> Tensor:  # the name that it has in PyTorch
            runs[name] += 1
            return run(name, runs[name] - 1, input, layer)

        return forward

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(classifier.net.register_forward_pre_hook(lambda *_: runs.clear()))
        for name, layer in _layers(classifier).items():
            if replace is not None and _plain(layer):
                layer.forward = instead(name, layer, replace)  # type: ignore[method-assign]
                hooks.callback(delattr, layer, "forward")
                continue
            channels = layer.running_mean.numel()  # type: ignore[union-attr]  # batch_norms() have them
            hooks.enter_context(layer.register_forward_pre_hook(watch(name, channels), with_kwargs=True))
        yield


def _takes_channels_last(layer: nn.Module, values: Tensor, channels: int) -> bool:
    """Whether a layer's channels are the last axis of what goes in; where the second is as long, it is asked."""
    if isinstance(layer, _BatchNorm) or values.shape[1] != channels or values.shape[-1] != channels or values.ndim < 3:
        return values.shape[1] != channels
    sides = [side for side in range(2, values.ndim + 1) if side != channels][: values.ndim - 2]
    tokens = values.new_zeros(1, *sides, channels)
    with undisturbed(layer, layer.training), contextlib.suppress(Exception):  # it cannot: its channels are the second
        return bool(layer.forward(tokens).shape == tokens.shape)
    return False


def _plain(layer: _BatchNorm) -> bool:
    """Whether a layer is PyTorch's own, as it was written, normalises by recorded statistics, and learns nothing."""
    learns = layer.training or any(parameter.requires_grad for parameter in layer.parameters())
    return not learns and type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)


def _layers(classifier: Classifier) -> dict[str, _BatchNorm]:
    normalising = set(classifier.batch_norms())
    return {name: layer for name, layer in classifier.net.named_modules() if layer in normalising}
