"""SRe2L and CDA: which window of its images a teacher sees, and when. The rest is tested with DeepInversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_synthesizers import linear_teacher, synthesizer

from dfkd_cli.synthesizers.sre2l import least_area

SIZE = (2, 24, 32)


def curriculum(t: int, steps: int, crop: float, share: float, form: str) -> float:
    """The least area in iteration ``t`` as the paper has it."""
    milestone = share * steps
    if t >= milestone:
        return crop
    return {
        "cosine": crop + (1 - crop) * (np.cos(np.pi * t / milestone) + 1) / 2,
        "linear": 1 - (1 - crop) * t / milestone,
        "step": 1.0,
    }[form]


@pytest.mark.parametrize("form", ["cosine", "linear", "step"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("crop", [0.08, 0.5, 1.0])
def test_the_curriculum_is_the_papers(crop, share, form):
    steps = 40
    ours = [least_area(t / steps, crop, share, form) for t in range(steps)]
    np.testing.assert_allclose(ours, [curriculum(t, steps, crop, share, form) for t in range(steps)], rtol=1e-12)


def maker(tmp_path, **values):
    values = {"jitter": 0, "view_flip": False} | values
    return synthesizer("sre2l", tmp_path, linear_teacher(size=SIZE, batch_norm=True), **values)


def random_areas(least: float, draws: int = 20_000) -> np.ndarray:
    """Areas of windows that lie within the image: uniform, the logarithm of width / height around the image's too."""
    rng = np.random.default_rng(0)
    area, aspect = rng.uniform(least, 1, draws) * SIZE[1] * SIZE[2], np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), draws))
    aspect *= SIZE[2] / SIZE[1]
    high, wide = np.sqrt(area / aspect).round(), np.sqrt(area * aspect).round()
    return (high * wide)[(high <= SIZE[1]) & (wide <= SIZE[2])] / (SIZE[1] * SIZE[2])


def windows(method, progress: float, draws: int = 400) -> np.ndarray:
    """Top, left, bottom and right of windows (draws, 4), as shares of the sides, read off an image of coordinates."""
    rows, columns = ((torch.arange(n, dtype=torch.float32) + 0.5) / n for n in SIZE[1:])
    picture = torch.stack([rows[:, None].expand(SIZE[1:]), columns.expand(SIZE[1:])])[None]
    found = []
    for _ in range(draws):
        seen = method.view(picture, progress)
        assert seen.shape == picture.shape
        down, right = seen[0, 0, :, 0], seen[0, 1, 0]
        found.append([down[0], right[0], down[-1], right[-1]])
    half = np.array([0.5 / n for n in SIZE[1:]])
    found = np.array(found)
    return np.concatenate([found[:, :2] - half, found[:, 2:] + half], axis=1)


def test_windows_have_the_share_of_the_area_that_the_paper_says(tmp_path):
    torch.manual_seed(0)
    method = maker(tmp_path, crop=0.1, curriculum=0.5)
    for progress, least in ((0.25, 0.55), (0.5, 0.1), (0.9, 0.1)):
        found = windows(method, progress)
        assert (found > -0.05).all() and (found < 1.05).all()
        high, wide = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
        areas = high * wide
        assert areas.min() > 0.8 * least - 0.05  # sides are whole pixels
        assert areas.min() < least + 0.1 and areas.max() > 0.9
        stretch = np.log(wide / high)  # in shares of the sides: none is likelier than its inverse
        np.testing.assert_allclose(stretch.mean(), 0, atol=5 * stretch.std() / len(areas) ** 0.5)
        drawn = random_areas(least)
        np.testing.assert_allclose(areas.mean(), drawn.mean(), atol=5 * drawn.std() / len(areas) ** 0.5)
    still = torch.randn(3, *SIZE)
    assert method.view(still, 0.0) is still  # the curriculum starts from whole images


def test_a_window_is_of_all_images_and_enlarged_bilinearly(tmp_path):
    torch.manual_seed(1)
    method = maker(tmp_path)
    image = torch.randn(1, *SIZE)
    torch.manual_seed(1)
    seen = method.view(image.repeat(3, 1, 1, 1), 0.0)
    assert torch.equal(seen, seen[:1].expand_as(seen))
    torch.manual_seed(1)
    top, left, bottom, right = windows(method, 0.0, 1)[0]
    rows, columns = np.array([top, bottom]) * SIZE[1], np.array([left, right]) * SIZE[2]
    (first, last), (start, stop) = rows.round().astype(int), columns.round().astype(int)
    part = image[0, :, first:last, start:stop].numpy().astype(float)
    expected = enlarged(enlarged(part, SIZE[1], 1), SIZE[2], 2)
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)


def enlarged(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation along an axis between pixel centres; the outermost are repeated."""
    count = values.shape[axis]
    at = ((np.arange(size) + 0.5) * count / size - 0.5).clip(0, count - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, count - 1), at - low
    share = share.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share


def test_gradients_reach_the_window_and_nothing_else(tmp_path):
    torch.manual_seed(2)
    image = torch.randn(2, *SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(maker(tmp_path).view(image, 0.0).sum(), image)
    inside = (gradient != 0).any(dim=(0, 1))
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(gradient.sum(), torch.tensor(float(image.numel())))


def test_images_are_rolled_and_mirrored_too(tmp_path):
    image = torch.randn(64, *SIZE)
    for name, changes in (
        ("rolled", {"jitter": 4, "view_flip": False}),
        ("mirrored", {"jitter": 0, "view_flip": True}),
    ):
        seen = maker(tmp_path / name, crop=1.0, **changes).view(image, 0.0)
        assert not torch.equal(seen, image), name
        assert torch.equal(seen.flatten(1).sort().values, image.flatten(1).sort().values), name
