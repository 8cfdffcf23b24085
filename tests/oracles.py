"""Reference formulas in NumPy float64, written from the papers and not from the code under test.

Arrays: logits (B, K), images (B, C, H, W), weights (K, D). ``tau`` is the temperature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(target: Array, predicted: Array) -> float:
    """``-sum_k target_k log predicted_k``, mean over the batch."""
    return float(-(target * np.log(predicted)).sum() / len(target))


# -- data impressions: Nayak et al., ICML 2019 -----------------------------------------------------------------------


def class_similarity(weight: Array) -> Array:
    """Cosine of every two classes' weights, then each row to [0,1]."""
    classes = len(weight)
    scaled = np.empty((classes, classes))
    for i in range(classes):
        row = [weight[i] @ w / np.sqrt((weight[i] @ weight[i]) * (w @ w)) for w in weight]
        scaled[i] = [(value - min(row)) / (max(row) - min(row)) for value in row]
    return scaled


def dirichlet_moments(concentration: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and fourth central moment of every coordinate (K,); each is Beta(a_k, a_0 - a_k)."""
    a, b = concentration, concentration.sum() - concentration
    total = a + b
    mean, variance = a / total, a * b / (total**2 * (total + 1))
    excess = 6 * ((a - b) ** 2 * (total + 1) - a * b * (total + 2)) / (a * b * (total + 2) * (total + 3))
    return mean, variance, (excess + 3) * variance**2


def impression_loss(logits: Array, target: Array, tau: float) -> float:
    """Cross-entropy between the target and the tempered answer."""
    return cross_entropy(target, softmax(logits / tau))


def impression_gradient(logits: Array, target: Array, tau: float) -> Array:
    """The gradient of :func:`impression_loss` in the logits, for targets that sum to one."""
    return (softmax(logits / tau) - target) / (tau * len(logits))


def total_variation(images: Array) -> tuple[float, Array]:
    """Sum of squared neighbour differences per image, mean over the batch; and its gradient in the images."""
    count, channels, height, width = images.shape
    value, gradient = 0.0, np.zeros_like(images)
    for n, c, y, x in np.ndindex(count, channels, height, width):
        for below, right in ((1, 0), (0, 1)):
            if y + below < height and x + right < width:
                difference = images[n, c, y + below, x + right] - images[n, c, y, x]
                value += difference**2 / count
                gradient[n, c, y + below, x + right] += 2 * difference / count
                gradient[n, c, y, x] -= 2 * difference / count
    return value, gradient


def adam(
    x: Array,
    gradient: Callable[[Array], Array],
    lr: float | Callable[[int], float],
    steps: int,
    project: Callable[[Array], Array],
    betas: tuple[float, float] = (0.9, 0.999),
) -> Array:
    """Algorithm 1 of Kingma and Ba, ICLR 2015; ``project`` follows every step, ``lr`` may depend on it (from 0)."""
    first, second = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g, rate = gradient(x), lr(t - 1) if callable(lr) else lr
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g**2
        x = project(x - rate * (first / (1 - betas[0] ** t)) / (np.sqrt(second / (1 - betas[1] ** t)) + 1e-8))
    return x


def numerical_gradient(loss: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    """Central differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (loss(x + moved) - loss(x - moved)) / (2 * step)
    return gradient


# -- DeepDream, DeepInversion, Adaptive DeepInversion: Yin et al., CVPR 2020 -------------------------------------------


def image_priors(images: Array) -> dict[str, float]:
    """Norms over the whole batch and mean absolute values of differences in four directions; the images' mean norm."""
    height, width = images.shape[2:]
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    norms, means = 0.0, 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        inside = (y + down < height) & (x + right >= 0) & (x + right < width)
        here, there = (y[inside], x[inside]), (y[inside] + down, x[inside] + right)
        differences = images[:, :, *there] - images[:, :, *here]
        norms += np.sqrt((differences**2).sum())
        means += np.abs(differences).mean()
    return {
        "total_variation": norms,
        "total_variation_l1": means,
        "l2": np.sqrt((images**2).sum((1, 2, 3))).mean(),
    }


def channel_moments(values: Array, correction: int = 0) -> tuple[Array, Array]:
    """Mean and variance (C,) of values (B, C, ...); the variance of a single value is zero."""
    columns = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    squares = ((columns - columns.mean(1, keepdims=True)) ** 2).sum(1)
    return columns.mean(1), squares / max(columns.shape[1] - correction, 1)


def statistics_distance(
    seen: list[Array], recorded: list[tuple[Array, Array]], first: float = 1.0, correction: int = 1
) -> float:
    """Norms of the differences of means and of variances, unbiased by default, over what goes into each layer."""
    total = 0.0
    for layer, (values, (mean, variance)) in enumerate(zip(seen, recorded, strict=True)):
        ours = channel_moments(values, correction)
        distance = np.sqrt(((ours[0] - mean) ** 2).sum()) + np.sqrt(((ours[1] - variance) ** 2).sum())
        total += distance if layer else first * distance
    return total


def agreement(student: Array, teacher: Array, variant: str) -> float:
    """One minus J of logits, at temperature 3.

    The paper's J is the Jensen-Shannon divergence. The code's has its KL divergences the other way round, of
    distributions that are clamped to [0.01,0.99].
    """
    p, q = softmax(student / 3), softmax(teacher / 3)
    m = (p + q) / 2
    if variant == "paper":
        return 1 - sum((x * (np.log(x) - np.log(m))).sum() / len(m) for x in (p, q)) / 2
    p, q, m = (np.clip(x, 0.01, 0.99) for x in (p, q, m))
    j = sum((m * (np.log(m) - np.log(other))).sum() / len(m) for other in (p, q)) / 2
    return 1 - min(max(j, 0), 1)


def inversion_rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """A linear rise over the first iterations, then a half cosine to zero over the others."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2


# -- BatchNorm statistics as Gaussians: Haroush et al., CVPR 2020 ------------------------------------------------------


def gaussian_divergence(mean: Array, variance: Array, other_mean: Array, other_variance: Array) -> Array:
    """KL of the first Gaussian from the other, in each channel."""
    ratio = (variance + (mean - other_mean) ** 2) / other_variance
    return np.log(np.sqrt(other_variance) / np.sqrt(variance)) - 0.5 * (1 - ratio)


# -- response distillation: Hinton et al. 2015; Ba and Caruana 2014 ----------------------------------------------------


def response(student: Array, teacher: Array, form: str, tau: float) -> float:
    """The soft loss in one of its three forms."""
    if form == "mse":
        return float(((student - teacher) ** 2).mean())
    p, q = softmax(teacher / tau), softmax(student / tau)
    entropy = cross_entropy(p, p) if form == "kl" else 0.0
    return tau**2 * (cross_entropy(p, q) - entropy)


def response_gradient(student: Array, teacher: Array, tau: float) -> Array:
    """The gradient of the forms ``kl`` and ``ce`` in the student's logits."""
    return tau * (softmax(student / tau) - softmax(teacher / tau)) / len(student)


# -- training ----------------------------------------------------------------------------------------------------------


def smoothed_cross_entropy(logits: Array, labels: NDArray[np.int64], smoothing: float) -> float:
    """Szegedy et al., CVPR 2016: the target is 1 - e for the label plus e / K for every class."""
    classes = logits.shape[1]
    return cross_entropy((1 - smoothing) * np.eye(classes)[labels] + smoothing / classes, softmax(logits))


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, schedule: str, milestones: tuple[float, ...], gamma: float
) -> float:
    """Linear warm-up over a share of the steps that ends at the peak, then a half cosine to zero; or falls in steps."""
    rising = min(int(warmup * steps), steps - 1)
    if schedule == "step":
        peak *= gamma ** sum(step >= round(share * steps) for share in milestones)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    if schedule == "step":
        return peak
    if schedule == "constant":
        return peak
    return peak * (1 + np.cos(np.pi * (step - rising) / (steps - rising))) / 2


def sgd(
    w: Array, gradient: Callable[[Array], Array], lr: float, momentum: float, decay: float, steps: int, nesterov: bool
) -> Array:
    """Stochastic gradient descent with L2 decay and momentum, Polyak's or Nesterov's (Sutskever et al., ICML 2013)."""
    velocity = np.zeros_like(w)
    for _ in range(steps):
        g = gradient(w) + decay * w
        velocity = momentum * velocity + g
        w = w - lr * (g + momentum * velocity if nesterov else velocity)
    return w
