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
    x: Array, gradient: Callable[[Array], Array], lr: float, steps: int, project: Callable[[Array], Array]
) -> Array:
    """Algorithm 1 of Kingma and Ba, ICLR 2015, with its default constants; ``project`` follows every step."""
    first, second = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        x = project(x - lr * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8))
    return x


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
