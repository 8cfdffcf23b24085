"""Distillation losses in NumPy float64, written from the papers one image, pair or triple at a time.

``s`` and ``t`` are of the student and of the teacher: logits (B, K) or features (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from oracles import Array, softmax


def kl(p: Array, q: Array) -> float:
    """Divergence of one distribution from another."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def standardised(z: Array) -> Array:
    """Sun et al., CVPR 2024: z-scores with the unbiased deviation."""
    return np.stack(
        [(row - row.mean()) / (1e-7 + np.sqrt(((row - row.mean()) ** 2).sum() / (len(row) - 1))) for row in z]
    )


def dkd(s: Array, t: Array, labels: Array, tau: float) -> dict[str, float]:
    """Zhao et al., CVPR 2022, equations 4 to 6."""
    target, rest = 0.0, 0.0
    for p, q, y in zip(softmax(t / tau), softmax(s / tau), labels, strict=True):
        target += kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        rest += kl(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y]))
    return {"target": tau**2 * target / len(s), "non_target": tau**2 * rest / len(s)}


def pearson(u: Array, v: Array) -> float:
    u, v = u - u.mean(), v - v.mean()
    return float(u @ v / (np.sqrt(u @ u) * np.sqrt(v @ v) + 1e-8))


def dist(s: Array, t: Array, tau: float) -> dict[str, float]:
    """Huang et al., NeurIPS 2022, equations 8 and 9."""
    q, p = softmax(s / tau), softmax(t / tau)
    inter = np.mean([1 - pearson(a, b) for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearson(a, b) for a, b in zip(q.T, p.T, strict=True)])
    return {"inter": tau**2 * inter, "intra": tau**2 * intra}


def pooled(maps: Array, height: int, width: int, reduce: Callable[..., Array] = np.mean) -> Array:
    """Pooling to a size, by averaging: cell i covers floor(i H / h) to ceil((i + 1) H / h)."""
    count, channels, rows, columns = maps.shape
    out = np.empty((count, channels, height, width))
    for i, j in np.ndindex(height, width):
        part = maps[
            :,
            :,
            i * rows // height : -(-(i + 1) * rows // height),
            j * columns // width : -(-(j + 1) * columns // width),
        ]
        out[:, :, i, j] = reduce(part, axis=(2, 3))
    return out


def smaller(s: Array, t: Array, reduce: Callable[..., Array] = np.mean) -> tuple[Array, Array]:
    size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    return pooled(s, *size, reduce), pooled(t, *size, reduce)


def attention_map(image: Array) -> Array:
    """Zagoruyko and Komodakis, ICLR 2017: energy over the channels, of norm one."""
    energy = (image**2).mean(0).ravel()
    return energy / np.sqrt(energy @ energy)


def at(s: Array, t: Array, variant: str) -> float:
    s, t = smaller(s, t)
    differences = [attention_map(a) - attention_map(b) for a, b in zip(s, t, strict=True)]
    if variant == "paper":
        return float(np.mean([np.sqrt(d @ d) / 2 for d in differences]))
    return float(np.mean([d @ d / len(d) for d in differences]))


def sp(s: Array, t: Array) -> float:
    """Tung and Mori, ICCV 2019, equations 1 to 4."""
    count = len(s)

    def rows(features: Array) -> list[Array]:
        gram = [[a.ravel() @ b.ravel() for b in features] for a in features]
        return [np.array(row) / np.sqrt(np.dot(row, row)) for row in gram]

    return float(sum(((a - b) ** 2).sum() for a, b in zip(rows(s), rows(t), strict=True)) / count**2)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def rkd(s: Array, t: Array) -> dict[str, float]:
    """Park et al., CVPR 2019, equations 4 to 8; means over all pairs and triples."""
    count = len(s)

    def lengths(e: Array) -> Array:
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in e] for a in e])
        return d / (d.sum() / (count * (count - 1)))

    def cosine(e: Array, i: int, j: int, k: int) -> float:
        a, b = (e[j] - e[i]).ravel(), (e[k] - e[i]).ravel()
        norms = np.sqrt((a @ a) * (b @ b))
        return a @ b / norms if norms else 0.0

    pairs = [huber(a - b) for a, b in zip(lengths(s).ravel(), lengths(t).ravel(), strict=True)]
    triples = [huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in np.ndindex(count, count, count)]
    return {"distance": float(np.mean(pairs)), "angle": float(np.mean(triples))}


def pkt(s: Array, t: Array) -> float:
    """Passalis and Tefas, ECCV 2018, equations 4 to 7, with the mean over all entries."""

    def probabilities(features: Array) -> Array:
        out = np.empty((len(features), len(features)))
        for i, a in enumerate(features):
            for j, b in enumerate(features):
                x, y = a.ravel(), b.ravel()
                out[i, j] = (x @ y / np.sqrt((x @ x) * (y @ y)) + 1) / 2
        return np.stack([row / row.sum() for row in out])

    p, q = probabilities(t), probabilities(s)
    return float(np.mean([a * np.log(a / b) for a, b in zip(p.ravel(), q.ravel(), strict=True)]))


def information_flow(s: Array, t: Array, variant: str) -> float:
    """Passalis et al., CVPR 2020: Jeffreys divergence of the neighbours' probabilities, for two kernels.

    1e-6 is added to norms, to squared distances, and to every similarity; the paper's sums are over i != j.
    """

    def cosine(x: Array, y: Array) -> float:
        return (x @ y / ((np.sqrt(x @ x) + 1e-6) * (np.sqrt(y @ y) + 1e-6)) + 1) / 2

    def student_t(x: Array, y: Array) -> float:
        return 1 / (1 + np.sqrt((x - y) @ (x - y) + 1e-6))

    def probabilities(features: Array, kernel: Callable[[Array, Array], float]) -> Array:
        rows = [[kernel(a.ravel(), b.ravel()) + 1e-6 for b in features] for a in features]
        if variant == "paper":
            rows = [row[:i] + row[i + 1 :] for i, row in enumerate(rows)]
        return np.concatenate([np.array(row) / sum(row) for row in rows])

    total, entries = 0.0, len(s) * (len(s) - (variant == "paper"))
    for kernel in (cosine, student_t):
        q, p = (probabilities(features, kernel) for features in (s, t))
        total += kl(p, q) + kl(q, p)
    return total / entries


def batch_normalised(maps: Array, epsilon: float = 1e-5) -> Array:
    """Each channel less its mean over images and positions, by its biased deviation."""
    mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(variance + epsilon)


def convolved(maps: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    """A convolution, position by position."""
    maps = np.pad(maps, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    high, wide = weight.shape[2:]
    rows, columns = (maps.shape[2] - high) // stride + 1, (maps.shape[3] - wide) // stride + 1
    out = np.empty((len(maps), len(weight), rows, columns))
    for i, j in np.ndindex(rows, columns):
        window = maps[:, :, i * stride : i * stride + high, j * stride : j * stride + wide]
        out[:, :, i, j] = np.einsum("bchw,ochw->bo", window, weight) + bias
    return out


def transposed(maps: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    """A transposed convolution: each position adds its kernel to where a convolution would have read it."""
    high, wide = weight.shape[2:]
    rows, columns = (maps.shape[2] - 1) * stride + high, (maps.shape[3] - 1) * stride + wide
    out = np.zeros((len(maps), weight.shape[1], rows, columns))
    for i, j in np.ndindex(maps.shape[2:]):
        window = out[:, :, i * stride : i * stride + high, j * stride : j * stride + wide]
        window += np.einsum("bc,cohw->bohw", maps[:, :, i, j], weight)
    return out[:, :, padding : rows - padding, padding : columns - padding] + bias[:, None, None]


def hint(guess: Array, t: Array, variant: str) -> float:
    """Romero et al., ICLR 2015, equation 3, or its mean over all entries."""
    squares = [((a - b) ** 2).sum() / 2 for a, b in zip(guess, t, strict=True)]
    return float(np.mean(squares) if variant == "paper" else np.mean(squares) * 2 / t[0].size)


def nearest(maps: Array, height: int, width: int) -> Array:
    rows = [i * maps.shape[2] // height for i in range(height)]
    columns = [j * maps.shape[3] // width for j in range(width)]
    return maps[:, :, rows][..., columns]


def hierarchical(s: Array, t: Array) -> float:
    """Chen et al., CVPR 2021: mean squares of the maps and of their means in 4x4, 2x2 and 1x1 cells."""
    values, weights = [((s - t) ** 2).mean()], [1.0]
    for cells in (4, 2, 1):
        if cells < s.shape[2]:
            values.append(((pooled(s, cells, cells) - pooled(t, cells, cells)) ** 2).mean())
            weights.append(weights[-1] / 2)
    return float(np.average(values, weights=weights))


def reviewkd(maps: list[Array], targets: list[Array], weights: list[dict[str, Array]]) -> float:
    """Chen et al., CVPR 2021, equation 6, from the deepest level up; ``weights`` of each level's convolutions."""
    total, deeper = 0.0, None
    for own, target, w in reversed(list(zip(maps, targets, weights, strict=True))):
        fused = batch_normalised(convolved(own, w["narrow.0.weight"], np.zeros(1), 1, 0))
        if deeper is not None:
            deeper = nearest(deeper, *own.shape[2:])
            scores = convolved(np.concatenate([fused, deeper], axis=1), w["blend.0.weight"], w["blend.0.bias"], 1, 0)
            shares = 1 / (1 + np.exp(-scores))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        deeper = nearest(fused, *target.shape[2:])
        guess = batch_normalised(convolved(deeper, w["widen.0.weight"], np.zeros(1), 1, 1))
        total += hierarchical(guess, target)
    return total


def fsp(s: list[Array], t: list[Array], variant: str) -> float:
    """Yim et al., CVPR 2017, equations 1 and 3."""
    total = 0.0
    for k in range(len(s) - 1):
        matrices = []
        for pair in ((s[k], s[k + 1]), (t[k], t[k + 1])):
            first, second = smaller(*pair, np.max if variant == "paper" else np.mean)
            matrices.append(np.einsum("bist,bjst->bij", first, second) / first[0, 0].size)
        squares = (matrices[0] - matrices[1]) ** 2
        total += squares.sum() / len(squares) if variant == "paper" else squares.mean()
    return float(total)


def margin(mean: float, deviation: float) -> float:
    """Heo et al., ICCV 2019: the mean of the negative part of a Gaussian, or three deviations where it is rare."""
    density = math.exp(-((mean / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    negative = math.erfc(mean / deviation / math.sqrt(2)) / 2
    return mean - deviation * density / negative if negative > 0.001 else -3 * deviation


def ofd(s: Array, t: Array, margins: Array) -> float:
    """Heo et al., ICCV 2019, equations 1 to 3: of one stage, summed over an image."""
    total = 0.0
    for b, c, i, j in np.ndindex(s.shape):
        target = max(t[b, c, i, j], margins[c])
        if not s[b, c, i, j] <= target <= 0:
            total += (s[b, c, i, j] - target) ** 2
    return total / len(s)


def normalised(rows: Array) -> Array:
    return np.stack([row / np.sqrt(row @ row) for row in rows])


def crd_scales(embedded: list[Array], memories: Array, drawn: Array, tau: float) -> list[float]:
    """Tian et al., ICLR 2020: N times the mean score, of the student's anchors and of the teacher's."""
    scales = []
    for side in (0, 1):
        scores = [np.exp(v @ memories[1 - side][js].T / tau) for v, js in zip(embedded[side], drawn, strict=True)]
        scales.append(len(memories[0]) * float(np.mean(scores)))
    return scales


def crd(embedded: list[Array], memories: Array, drawn: Array, tau: float, scales: list[float]) -> float:
    """Tian et al., ICLR 2020: anchors of each network, memories of the other, the quotient of the released code."""
    total, noise = 0.0, (drawn.shape[1] - 1) / len(memories[0])
    for side in (0, 1):
        for v, (positive, *negatives) in zip(embedded[side], drawn, strict=True):
            score = np.exp(v @ memories[1 - side][positive] / tau) / scales[side]
            total -= np.log(score / (score + noise))
            for j in negatives:
                score = np.exp(v @ memories[1 - side][j] / tau) / scales[side]
                total -= np.log(1 - score / (score + noise))
    return float(total / len(drawn))


def boundary_sample(
    x: Array, weight: Array, bias: Array, base: int, target: int, step: float, iterations: int, low: Array, high: Array
) -> Array:
    """Heo et al., AAAI 2019, the update rule for one flat image and logits ``weight x + bias``."""
    for _ in range(iterations):
        z = weight @ x + bias
        if z.argmax() != base:
            break
        gradient = weight[base] - weight[target]
        x = x - step * (z[base] - z[target] + 1e-4) * gradient / np.sqrt(gradient @ gradient)
        x = np.minimum(np.maximum(x, low), high)
    return x


def boundary_candidates(s: Array, t: Array, labels: Array, count: int) -> list[int]:
    """Heo et al., AAAI 2019: images that both get right, those first whose other probabilities differ most."""
    q, p = softmax(s), softmax(t)
    right = [i for i, y in enumerate(labels) if s[i].argmax() == t[i].argmax() == y]
    differences = {i: sum((p[i, j] - q[i, j]) ** 2 for j in range(s.shape[1]) if j != labels[i]) for i in right}
    return sorted(right, key=lambda i: -differences[i])[:count]
