"""Formulas of image-optimising synthesizers in NumPy float64, written from the papers.

Arrays: images x (B, C, H, W), logits (B, K), weights (K, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from oracles import Array, softmax

# -- The Knowledge Within: Haroush et al., CVPR 2020 -------------------------------------------------------------------


def blur_matrix(size: int, sigma: float) -> Array:
    """(size, size): a Gaussian blur of a row of pixels, cut off at three deviations, the row reflected at its ends."""
    reach = min(math.ceil(3 * sigma), size - 1)
    matrix = np.zeros((size, size))
    for i in range(size):
        for offset in range(-reach, reach + 1):
            j = abs(i + offset)
            j = 2 * (size - 1) - j if j >= size else j
            matrix[i, j] += math.exp(-(offset**2) / (2 * sigma**2))
    return matrix / matrix.sum(1, keepdims=True)


def roughness(x: Array, sigma: float) -> tuple[float, Array]:
    """Squared distance to the blurred image, mean over the batch; and its gradient in the images."""
    height, width = x.shape[-2:]
    blur = np.kron(blur_matrix(height, sigma), blur_matrix(width, sigma))
    sharpen = np.eye(height * width) - blur
    flat = x.reshape(-1, height * width)
    value = ((flat @ sharpen.T) ** 2).sum() / len(x)
    return float(value), (2 * flat @ sharpen.T @ sharpen / len(x)).reshape(x.shape)


def gaussian_kl(mean_p: Array, var_p: Array, mean_q: Array, var_q: Array) -> Array:
    """``KL(N(p) || N(q))`` as the paper writes it."""
    return np.log(np.sqrt(var_q) / np.sqrt(var_p)) - 0.5 * (1 - (var_p + (mean_p - mean_q) ** 2) / var_q)


def statistics_divergence(x: Array, mean: Array, var: Array, reverse: bool = False) -> tuple[float, Array]:
    """Divergence between recorded moments (C,) and those of x, mean over channels; and its gradient in x."""
    count = x.size // x.shape[1]
    seen_mean, seen_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    gap = seen_mean - mean
    if reverse:
        value = gaussian_kl(seen_mean, seen_var, mean, var)
        by_mean, by_var = gap / var, 0.5 * (1 / var - 1 / seen_var)
    else:
        value = gaussian_kl(mean, var, seen_mean, seen_var)
        by_mean, by_var = gap / seen_var, 0.5 * (1 / seen_var - (var + gap**2) / seen_var**2)
    by_mean, by_var, centre = (part[:, None, None] for part in (by_mean, by_var, seen_mean))
    return float(value.mean()), (by_mean + 2 * by_var * (x - centre)) / (count * len(mean))


# -- soft-targeted transfer set: Wang, AAAI 2021 -----------------------------------------------------------------------


def correlation(weight: Array) -> Array:
    """Cosine of every two classes' weights."""
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in weight] for a in weight])


def soft_target_loss(logits: Array, sampled: Array, tau: float) -> float:
    """Divergence of the tempered answers from those that were sampled, mean over the batch."""
    wanted, given = softmax(sampled / tau), softmax(logits / tau)
    return float((wanted * (np.log(wanted) - np.log(given))).sum() / len(logits))


def numerical_gradient(function: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    """Central differences."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


class Adam:
    """Algorithm 1 of Kingma and Ba, ICLR 2015, one step at a time."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.steps = betas, 0
        self.first: Array | float = 0.0
        self.second: Array | float = 0.0

    def step(self, x: Array, gradient: Array, lr: float) -> Array:
        (a, b), self.steps = self.betas, self.steps + 1
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * gradient**2
        corrected = self.first / (1 - a**self.steps), self.second / (1 - b**self.steps)
        return x - lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)


class Momentum:
    """Gradient descent with momentum 0.9 and weight decay, as Sutskever et al., ICML 2013, in PyTorch's form."""

    def __init__(self, decay: float) -> None:
        self.decay, self.velocity = decay, 0.0

    def step(self, x: Array, gradient: Array, lr: float) -> Array:
        self.velocity = 0.9 * self.velocity + gradient + self.decay * x
        return x - lr * self.velocity
