"""Augmentation against a plain float64 reference in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfkd_cli.data.augment import RandomAffine, RandomCrop, RandomFlip, RandomResizedCrop, RandomRoll, pipeline
from dfkd_cli.options import Augmentation

EVERYTHING = Augmentation(rotate=20, translate=0.1, scale=0.2, flip=True, crop=2, noise=0.1)


def random_images(count: int = 8, channels: int = 2, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference_affine(
    image: np.ndarray, angle: float, zoom: float, shift: tuple[float, float], fill: float
) -> np.ndarray:
    """Bilinear resampling of (C, H, W), pixel by pixel: clockwise degrees, shift as fractions (right, down)."""
    channels, height, width = image.shape
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    result = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            x, y = np.array([column, row]) - middle - np.array([shift[0] * width, shift[1] * height])
            x, y = middle + np.array([cos * x + sin * y, -sin * x + cos * y]) / zoom
            left, top = int(np.floor(x)), int(np.floor(y))
            value = np.zeros(channels)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                weight = (1 - abs(y - i)) * (1 - abs(x - j))
                value += weight * (image[:, i, j] if 0 <= i < height and 0 <= j < width else fill)
            result[:, row, column] = value
    return result


def affine(
    images: torch.Tensor, angle: float, zoom: float, shift: tuple[float, float], fill: float = 0.0
) -> torch.Tensor:
    params = {
        "angle": torch.full((len(images),), angle, dtype=images.dtype),
        "zoom": torch.full((len(images),), zoom, dtype=images.dtype),
        "shift": torch.tensor([shift] * len(images), dtype=images.dtype),
    }
    return RandomAffine(fill=fill).transform(images, params)


@pytest.mark.parametrize(
    ("angle", "zoom", "shift"),
    [(30, 1, (0, 0)), (0, 1.3, (0, 0)), (0, 0.8, (0, 0)), (0, 1, (0.13, -0.07)), (-75, 1.2, (0.1, 0.2))],
)
def test_affine_is_the_reference_resampling(angle, zoom, shift):
    images = random_images(2)
    expected = [reference_affine(image, angle, zoom, shift, fill=0.3) for image in images.numpy()]
    np.testing.assert_allclose(affine(images, angle, zoom, shift, fill=0.3).numpy(), expected, atol=1e-10)


def test_directions():
    images = torch.zeros(1, 1, 9, 9)
    images[0, 0, 4, 6] = 1  # right of the centre
    assert affine(images, 90, 1, (0, 0))[0, 0, 6, 4] == pytest.approx(1, abs=1e-5)  # clockwise: below it
    assert affine(images, 0, 1, (1 / 9, 2 / 9))[0, 0, 6, 7] == pytest.approx(1, abs=1e-5)  # right and down
    assert affine(images, 0, 2, (0, 0))[0, 0, 4, 8] == pytest.approx(1, abs=1e-5)  # enlarged


def test_affine_identity_is_exact():
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(affine(images, 0, 1, (0, 0)), images)


def test_affine_fill_per_channel():
    images = random_images()
    outside = affine(images, 0, 1, (1, 0), fill=torch.tensor([0.25, 0.75]))
    assert torch.allclose(outside[:, 0], torch.tensor(0.25, dtype=torch.float64))
    assert torch.allclose(outside[:, 1], torch.tensor(0.75, dtype=torch.float64))


def test_affine_draws_within_bounds_and_per_image():
    torch.manual_seed(0)
    params = RandomAffine(rotate=30, translate=0.2, scale=0.5).make_params([torch.rand(2000, 1, 4, 4)])
    for values, middle, bound in (
        (params["angle"], 0, 30),
        (params["zoom"], 1, 0.5),
        (params["shift"][:, 0], 0, 0.2),
        (params["shift"][:, 1], 0, 0.2),
    ):
        assert len(values.unique()) > 1900
        assert 0.95 * bound < (values - middle).abs().max() <= bound
        assert abs(values.mean() - middle) < 0.1 * bound
    assert not torch.equal(params["shift"][:, 0], params["shift"][:, 1])


def test_crop_is_pad_and_slice():
    torch.manual_seed(0)
    images = random_images(200)
    crop = RandomCrop(3, fill=torch.tensor([0.1, 0.9], dtype=torch.float64))
    params = crop.make_params([images])
    out = crop.transform(images, params).numpy()
    for image, result, top, left in zip(images.numpy(), out, params["top"], params["left"], strict=True):
        padded = np.stack([np.pad(c, 3, constant_values=f) for c, f in zip(image, (0.1, 0.9), strict=True)])
        np.testing.assert_array_equal(result, padded[:, top : top + 12, left : left + 16])
    for drawn in params.values():
        assert set(drawn.tolist()) == set(range(7))


def test_resized_crop_is_a_zoom_about_the_middle_of_its_window():
    images = random_images(2)
    size, corner = torch.tensor([[0.5, 0.5]] * 2).double(), torch.tensor([[0.375, 0.125]] * 2).double()
    out = RandomResizedCrop(0.25).transform(images, {"size": size, "corner": corner}).numpy()
    # The window's middle is at (0.625, 0.375) of the sides: shifted to the image's middle, then enlarged twice.
    shift = (-0.125 * 2, 0.125 * 2)
    expected = [reference_affine(image, 0, 2, shift, fill=0.3) for image in images.numpy()]
    np.testing.assert_allclose(out, expected, atol=1e-10)
    whole = {"size": torch.ones(2, 2).double(), "corner": torch.zeros(2, 2).double()}
    torch.testing.assert_close(RandomResizedCrop(0.25).transform(images, whole), images)


def test_resized_crop_takes_width_and_height_apart():
    images = random_images(1, height=12, width=16)
    params = {"size": torch.tensor([[0.5, 1.0]]).double(), "corner": torch.tensor([[0.5, 0.0]]).double()}
    out = RandomResizedCrop(0.25).transform(images, params)
    # The right half, each column between two of its own: a quarter and three quarters of the way.
    half = images[..., 8:]
    torch.testing.assert_close(out[..., 1:-1:2], 0.75 * half[..., :-1] + 0.25 * half[..., 1:])


def test_resized_crop_draws_windows_inside_the_image():
    torch.manual_seed(0)
    params = RandomResizedCrop(0.25, 2.0).make_params([torch.rand(5000, 1, 4, 4, dtype=torch.float64)])
    size, corner = params["size"], params["corner"]
    assert corner.min() >= 0 and (corner + size).max() <= 1
    inside = (size < 1).all(1)  # where there was room for the aspect
    area, aspect = size.prod(1)[inside], (size[:, 0] / size[:, 1])[inside]
    assert 0.25 <= area.min() < 0.26 and 0.9 < area.max() <= 1
    assert 0.5 <= aspect.min() < 0.51 and 1.97 < aspect.max() <= 2
    assert abs(aspect.log().mean()) < 0.03
    free = (corner / (1 - size))[inside]
    assert abs(free.mean() - 0.5) < 0.02 and free.std() == pytest.approx(12**-0.5, rel=0.03)


def test_resized_crop_has_gradients():
    images, crop = random_images(2, 2, 5, 6).requires_grad_(), RandomResizedCrop(0.25)
    params = crop.make_params([images])
    assert torch.autograd.gradcheck(lambda x: crop.transform(x, params), images)


def test_flip_mirrors_some_images():
    torch.manual_seed(0)
    images = random_images(64)
    out = RandomFlip().forward(images)
    mirrored = [torch.equal(o, i.flip(-1)) for o, i in zip(out, images, strict=True)]
    kept = [torch.equal(o, i) for o, i in zip(out, images, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48
    assert torch.equal(RandomFlip(p=1)(images), images.flip(-1))


def test_roll_moves_the_batch_around_both_edges():
    torch.manual_seed(0)
    images, roll, seen = random_images(3), RandomRoll(2), set()
    for _ in range(300):
        params = roll.make_params([images])
        seen.add(params["shift"])
        np.testing.assert_array_equal(roll.transform(images, params), np.roll(images, params["shift"], axis=(2, 3)))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_noise_has_the_asked_deviation_and_is_not_clipped():
    out = pipeline(Augmentation(noise=0.2), 0.0)(torch.ones(64, 1, 32, 32))
    assert out.std() == pytest.approx(0.2, rel=0.05)
    assert out.mean() == pytest.approx(1, abs=0.01)


def test_saturated_images_are_those_of_a_file_before_noise_is_added():
    images = 3 * torch.randn(4, 2, 8, 8)
    np.testing.assert_array_equal(pipeline(Augmentation(saturate=True), 0.0)(images), np.clip(images.numpy(), 0, 1))
    torch.manual_seed(0)
    noisy = pipeline(Augmentation(saturate=True, noise=0.1), 0.0)(images)
    assert (noisy - images.clamp(0, 1)).std() == pytest.approx(0.1, rel=0.2)
    assert noisy.min() < 0


def test_everything_off_is_free():
    images = torch.rand(2, 1, 8, 8)
    assert pipeline(Augmentation(), 0.0)(images) is images


@pytest.mark.parametrize("option", ["rotate", "translate", "scale", "flip", "crop", "resized_crop", "noise"])
def test_each_option_alone_changes_images_each_in_its_own_way(option):
    torch.manual_seed(0)
    value = {"rotate": 20.0, "flip": True, "crop": 2}.get(option, 0.2)
    image = torch.rand(1, 1, 8, 8)
    out = pipeline(Augmentation(**{option: value}), 0.0)(image.repeat(16, 1, 1, 1))
    assert out.shape == (16, 1, 8, 8)
    assert len(out.unique(dim=0)) >= 2
    assert not torch.equal(out, image.repeat(16, 1, 1, 1))


def test_the_seed_decides():
    augment, images = pipeline(EVERYTHING, 0.5), torch.rand(4, 1, 8, 8)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(augment(images))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_gradients():
    augment = pipeline(EVERYTHING, torch.tensor([0.2, 0.4]))
    images = random_images(2, 2, 5, 6).requires_grad_()

    def seeded(images: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return augment(images)

    assert torch.autograd.gradcheck(seeded, images)
