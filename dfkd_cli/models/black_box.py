"""A teacher of whom nothing is seen but answers, each image asked about once.

probabilities: p = softmax(z)                     as logits log p: softmax(log p / tau) is softmax(z / tau)
topN:          p of the N likeliest classes       the others share what is left, equally
label:         argmax p                           0.9 for it, and 0.1 shared by all classes

What the last two make of what they do not see is ours: some probability for every class, so that every loss between
answers is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_cli.artifacts.ledger import Ledger
from dfkd_cli.errors import ConfigError, RunFailed
from dfkd_cli.models.classifier import Classifier, ModelInfo

SMOOTHING = 0.1  # share of a label that all classes have
FAR_FROM_ONE = 0.02  # what rounded probabilities may sum to, more or less than 1


class BlackBox(Classifier):
    """Pixels in [0, 1], float (B, C, H, W), to log-probabilities (B, K), without gradients.

    Args:
        oracle: Who is asked; None where only answers that are known already are given.
        info: What a student of it is like.
        seen: What is seen of an answer: ``probabilities``, ``topN`` or ``label``.
        budget: How many images may be asked about.
    """

    opaque = True

    def __init__(self, oracle: Classifier | None, info: ModelInfo, seen: str, budget: int | None = None) -> None:
        super().__init__(oracle or nn.Identity(), info)
        self.seen, self.ledger = seen, Ledger(budget)

    def forward(self, pixels: Tensor) -> Tensor:
        """The answers: those on record, and of other images new ones."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.ledger.answer(pixels, self._ask)

    def _ask(self, pixels: Tensor) -> Tensor:
        if not isinstance(self.net, Classifier):
            raise RunFailed(
                f"{self.info.spec}: no answer to this image is stored", "use it with the transfer set that stores them"
            )
        return as_seen(self.net(pixels.float()).float(), self.seen)


class Function(nn.Module):
    """A user's function of pixels, float32 (B, C, H, W) in [0, 1] as a NumPy array, to log-probabilities (B, K).

    It returns probabilities (B, K), whole numbers (B,): the classes, or a pair: the likeliest classes (B, N) and their
    probabilities (B, N).

    Raises:
        ConfigError: There is one class.
        RunFailed: It fails, or returns something else.
    """

    def __init__(self, ask: Callable[[Any], Any], spec: str, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"{spec}: of one class there is nothing to learn", "give --num-classes 2 or more")
        self.ask, self.spec, self.num_classes = ask, spec, num_classes

    def forward(self, pixels: Tensor) -> Tensor:
        try:
            said = self.ask(pixels.cpu().numpy())
            parts = [torch.as_tensor(part) for part in (said if isinstance(said, tuple) else (said,))]
        except Exception as error:  # users' code can raise anything
            what = f"{self.spec} failed: {type(error).__name__}: {str(error)[:300]}"
            given = "it gets a NumPy array; " if isinstance(error, (TypeError, AttributeError)) else ""
            raise RunFailed(what, f"{given}what it has answered is kept: the same command asks on") from error
        return self._logits(parts, len(pixels)).to(pixels.device)

    def _logits(self, parts: list[Tensor], count: int) -> Tensor:
        # Unsigned integers of more than eight bits can hardly be computed with.
        parts = [part if part.is_floating_point() else part.long() for part in parts]
        first, last, sizes = parts[0], parts[-1], [tuple(part.shape) for part in parts]
        if first.is_floating_point():
            if sizes == [(count, self.num_classes)] and _are_probabilities(first, 1 - FAR_FROM_ONE):
                return _log(first.float())
        elif first.numel() and int(first.min()) >= 0 and int(first.max()) < self.num_classes:
            if sizes == [(count,)]:
                return labelled(first, self.num_classes)
            pair = len(parts) == first.ndim == 2 and sizes[0] == sizes[1] and len(first) == count
            pair = pair and last.is_floating_point()
            if pair and _are_probabilities(last, 0.0):
                return likeliest(last.double(), first, self.num_classes)
        shapes = " and ".join(f"{part.dtype} {[*part.shape]}".removeprefix("torch.") for part in parts)
        raise RunFailed(
            f"{self.spec} returned {shapes} for {count} images{self._unfit(first, sizes, count)}",
            f"return probabilities ({count}, {self.num_classes}), classes ({count},), or the likeliest classes and "
            "their probabilities",
        )

    def _unfit(self, values: Tensor, sizes: list[tuple[int, ...]], count: int) -> str:
        """What is wrong with numbers whose shape is right."""
        if sizes == [(count, self.num_classes)] and values.is_floating_point():
            if not values.isfinite().all():
                return ", not all of them finite"
            wrong = (values < 0).any(1) | ((values.sum(1) - 1).abs() > FAR_FROM_ONE)
            least, most, total = (float(value) for value in (*values[wrong][0].aminmax(), values[wrong][0].sum()))
            return f", no probabilities: one image's are {least:.3g} to {most:.3g} and sum to {total:.3g}"
        if sizes == [(count,)] and not values.is_floating_point():
            return (
                f", classes {int(values.min())} to {int(values.max())}: the first is 0, the last {self.num_classes - 1}"
            )
        return ""


def as_seen(logits: Tensor, seen: str) -> Tensor:
    """What is seen of answers, both as logits (B, K)."""
    if seen == "label":
        return labelled(logits.argmax(1), logits.shape[1])
    if seen == "probabilities":
        return logits.log_softmax(1)
    best, classes = logits.double().softmax(1).topk(min(int(seen.removeprefix("top")), logits.shape[1]))
    return likeliest(best, classes, logits.shape[1])


def labelled(classes: Tensor, count: int) -> Tensor:
    """Labels (B,), of so many classes, as log-probabilities."""
    one = torch.nn.functional.one_hot(classes, count).float()
    return _log((1 - SMOOTHING) * one + SMOOTHING / count)


def likeliest(probabilities: Tensor, classes: Tensor, count: int) -> Tensor:
    """Probabilities (B, N), float64, of some classes (B, N) as log-probabilities of all ``count`` of them."""
    left = (1 - probabilities.sum(1, keepdim=True)).clamp_min(0) / max(count - classes.shape[1], 1)
    return _log(left.repeat(1, count).scatter(1, classes, probabilities))


def _are_probabilities(values: Tensor, least: float) -> bool:
    """Whether numbers (B, N) are, and sum to at least so much, and to one at most, but for rounding."""
    sums = values.sum(1)
    return bool((values >= 0).all() and (sums >= least).all() and (sums <= 1 + FAR_FROM_ONE).all())


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log().float()
