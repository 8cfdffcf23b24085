"""Loss terms that several synthesizers share: pure functions, batch means unless they say otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from dfkd_cli.models.moments import Moments
from dfkd_cli.models.statistics import layer_divergence


def tempered_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``-sum_k y_k log softmax(z / temperature)_k``, mean over the batch.

    Args:
        logits: (B, K).
        targets: (B, K) soft labels, or (B,) class indices.
        temperature: Softmax temperature.
    """
    return F.cross_entropy(logits / temperature, targets)


def mean_answer_entropy(logits: Tensor) -> Tensor:
    """``-sum_k m_k log m_k`` of the mean probabilities ``m`` of logits (B, K), in nats."""
    mean = logits.softmax(1).mean(0)
    return -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()  # log 0 has no gradient


def tempered_divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``KL(y || softmax(z / temperature))``, mean over the batch, nats: the cross-entropy less the targets' entropy.

    Args:
        logits: (B, K).
        targets: (B, K) soft labels.
        temperature: Softmax temperature.
    """
    return F.kl_div((logits / temperature).log_softmax(1), targets, reduction="batchmean")


def total_variation(images: Tensor) -> Tensor:
    """Sum of squared differences between neighbouring pixels, mean over the batch; images (B, C, H, W)."""
    vertical = (images[:, :, 1:] - images[:, :, :-1]).square().sum()
    horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).square().sum()
    return (vertical + horizontal) / len(images)


def neighbour_differences(images: Tensor) -> list[Tensor]:
    """Differences of images (B, C, H, W) between neighbours: horizontal, vertical, along both diagonals."""
    up, down = images[:, :, :-1], images[:, :, 1:]
    return [
        images[..., :-1] - images[..., 1:],
        up - down,
        down[..., :-1] - up[..., 1:],
        up[..., :-1] - down[..., 1:],
    ]


def roughness(images: Tensor, sigma: float) -> Tensor:
    """``||x - G(x)||_2^2``, the squared distance of images (B, C, H, W) to their blurred selves, mean over the batch.

    Args:
        images: Reflected at their borders.
        sigma: Standard deviation of the Gaussian G in pixels; it is cut off at three of them.
    """
    return (images - blurred(images, sigma)).square().sum() / len(images)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (B, C, H, W), reflected at their borders, under a Gaussian of that deviation, cut off at three of them."""
    with torch.autocast(images.device.type, enabled=False):  # it would round them
        rows, columns = (_blur(side, sigma, images) for side in images.shape[-2:])
        return rows @ images @ columns.T


def _blur(side: int, sigma: float, images: Tensor) -> Tensor:
    """The matrix (side, side) that blurs a line of pixels. Blurring by it takes a tenth of the time on a CPU."""
    reach = min(math.ceil(3 * sigma), side - 1)
    lines = torch.eye(side, dtype=images.dtype, device=images.device)[None]
    return gaussian_blur(lines, [1, 2 * reach + 1], [sigma, sigma])[0]


def statistics_distance(seen: Mapping[str, Moments], recorded: Mapping[str, Moments], first: float = 1.0) -> Tensor:
    """``sum_l w_l (||mean_l - recorded mean_l||_2 + ||variance_l - recorded variance_l||_2)``.

    Args:
        seen: The moments of a batch, by layer in the order they ran; layers that did not run have no part in the sum.
        recorded: The teacher's, by layer.
        first: ``w`` of the first layer; the others have 1.
    """
    pairs = [(ours, recorded[name]) for name, ours in seen.items()]
    each = [(ours.mean - theirs.mean).norm() + (ours.variance - theirs.variance).norm() for ours, theirs in pairs]
    return torch.stack([first * each[0], *each[1:]]).sum()


def statistics_divergence(
    seen: Mapping[str, Moments], recorded: Mapping[str, Moments], reverse: bool = False
) -> Tensor:
    """``KL(N(recorded) || N(seen))``, mean over the channels of a layer, then over the layers; nats.

    Args:
        seen: The moments of a batch, by layer.
        recorded: The teacher's. Channels that were dead in its training do not count.
        reverse: ``KL(N(seen) || N(recorded))`` instead.
    """
    return torch.stack([layer_divergence(ours, recorded[name], reverse) for name, ours in seen.items()]).mean()
