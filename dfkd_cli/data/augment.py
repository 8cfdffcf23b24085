"""Batch augmentation with parameters drawn per image, on the images' device, differentiable in the images.

The transforms of torchvision draw one set of parameters for a whole batch; these draw one for every image. Random
numbers come from torch's global generator of the images' device: the caller seeds it. Images are floating point
(B, C, H, W), in any pixel space; ``fill`` is the background in that space, one number or one per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torchvision.transforms import v2

from dfkd_cli.options import Augmentation


class RandomAffine(v2.Transform):  # type: ignore[misc]  # torchvision ships no annotations
    """Rotate, zoom and shift each image about its centre, in one bilinear resampling.

    The identity is exact where the sides are powers of two and within float rounding elsewhere.

    Args:
        rotate: Angles are uniform in +- this many degrees; positive is clockwise.
        translate: Shifts are uniform in +- this fraction of each side; positive is right and down.
        scale: Zooms are uniform in 1 +- this; above 1 enlarges.
        fill: What lies outside the image: a number, or a tensor (C,).
    """

    def __init__(
        self, rotate: float = 0.0, translate: float = 0.0, scale: float = 0.0, fill: Tensor | float = 0.0
    ) -> None:
        super().__init__()
        self.rotate, self.translate, self.scale, self.fill = rotate, translate, scale, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw ``angle`` (B,) in degrees, ``zoom`` (B,) and ``shift`` (B, 2), x then y, as fractions of the sides."""
        images = flat_inputs[0]
        drawn = 2 * torch.rand(4, len(images), device=images.device, dtype=images.dtype) - 1
        return {
            "angle": self.rotate * drawn[0],
            "zoom": 1 + self.scale * drawn[1],
            "shift": self.translate * drawn[2:].T,
        }

    def transform(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Resample images (B, C, H, W) with the given parameters."""
        grid = _sampling_grid(images, **params)
        fill = _per_channel(self.fill, images)
        return grid_sample(images - fill, grid, padding_mode="zeros", align_corners=False) + fill


class RandomFlip(v2.Transform):  # type: ignore[misc]  # torchvision ships no annotations
    """Mirror each image left-right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw ``flip`` (B,), bool."""
        images = flat_inputs[0]
        return {"flip": torch.rand(len(images), device=images.device) < self.p}

    def transform(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Mirror those of the images (B, C, H, W) whose ``flip`` is set."""
        return torch.where(params["flip"].view(-1, 1, 1, 1), images.flip(-1), images)


class RandomRoll(v2.Transform):  # type: ignore[misc]  # torchvision ships no annotations
    """Roll the whole batch by up to ``jitter`` pixels along both axes: what leaves on one side enters on the other."""

    def __init__(self, jitter: int) -> None:
        super().__init__()
        self.jitter = jitter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, tuple[int, int]]:
        """Draw ``shift``, down and right, in pixels."""
        down, right = torch.randint(-self.jitter, self.jitter + 1, (2,)).tolist()  # on the CPU: roll takes numbers
        return {"shift": (down, right)}

    def transform(self, images: Tensor, params: dict[str, tuple[int, int]]) -> Tensor:
        """Roll images (B, C, H, W)."""
        return images.roll(params["shift"], (2, 3))


class RandomCrop(v2.Transform):  # type: ignore[misc]  # torchvision ships no annotations
    """Pad by ``padding`` pixels of ``fill`` on each side and cut the original size out again; pixels stay exact."""

    def __init__(self, padding: int, fill: Tensor | float = 0.0) -> None:
        super().__init__()
        self.padding, self.fill = padding, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw ``top`` and ``left`` (B,): where in the padded image each crop starts."""
        images = flat_inputs[0]
        top, left = torch.randint(2 * self.padding + 1, (2, len(images)), device=images.device)
        return {"top": top, "left": left}

    def transform(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Crop images (B, C, H, W) at the given places."""
        count, channels, height, width = images.shape
        border, wide = self.padding, width + 2 * self.padding
        padded = images.new_empty(count, channels, height + 2 * border, wide)
        padded[:] = _per_channel(self.fill, images)
        padded[..., border : border + height, border : border + width] = images
        rows = params["top"][:, None] + torch.arange(height, device=images.device)  # (B, H)
        columns = params["left"][:, None] + torch.arange(width, device=images.device)  # (B, W)
        pixels = (rows[:, :, None] * wide + columns[:, None, :]).view(count, 1, -1)  # (B, 1, H * W)
        return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


class RandomResizedCrop(v2.Transform):  # type: ignore[misc]  # torchvision ships no annotations
    """Enlarge a window of each image to the image's size, bilinearly. The window lies inside the image.

    Args:
        area: The window has a share of the image's area that is uniform between this and 1.
        aspect: Its width is stretched against its height by up to this factor, log-uniform, as far as there is room.
    """

    def __init__(self, area: float, aspect: float = 4 / 3) -> None:
        super().__init__()
        self.area, self.aspect = area, aspect

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw ``size`` and ``corner`` (B, 2), x then y, as fractions of the image's sides."""
        images = flat_inputs[0]
        drawn = torch.rand(4, len(images), device=images.device, dtype=images.dtype)
        area = self.area + (1 - self.area) * drawn[0]
        stretch = self.aspect ** (2 * drawn[1] - 1)
        size = torch.stack([(area * stretch).sqrt(), (area / stretch).sqrt()], dim=1).clamp(max=1)
        return {"size": size, "corner": (1 - size) * drawn[2:].T}

    def transform(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Resample images (B, C, H, W) with the given parameters."""
        size, middle = params["size"], 2 * params["corner"] + params["size"] - 1  # where the sides are 2 long
        x, y = _pixel_centres(images)
        across = (size[:, :1] * x + middle[:, :1])[:, None, :].expand(-1, len(y), -1)  # (B, H, W)
        down = (size[:, 1:] * y + middle[:, 1:])[:, :, None].expand(-1, -1, len(x))
        grid = torch.stack([across, down], dim=3)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)


def pipeline(config: Augmentation, fill: Tensor | float) -> Callable[[Tensor], Tensor]:
    """The augmentation that ``config`` asks for; returns its argument itself when everything is off.

    Args:
        config: What to draw. ``noise`` is in the units of the images; ``saturate`` needs them in those of a file.
        fill: The background, in the space and on the device of the images: a number or a tensor (C,).

    Returns:
        A function from float images (B, C, H, W) to images of the same shape.
    """
    steps: list[nn.Module] = []
    if config.saturate:
        steps.append(v2.Lambda(partial(torch.clamp, min=0, max=1)))
    if config.resized_crop:
        steps.append(RandomResizedCrop(config.resized_crop))
    if config.flip:
        steps.append(RandomFlip())
    if config.rotate or config.translate or config.scale:
        steps.append(RandomAffine(config.rotate, config.translate, config.scale, fill))
    if config.crop:
        steps.append(RandomCrop(config.crop, fill))
    if config.noise:
        steps.append(v2.GaussianNoise(sigma=config.noise, clip=False))
    return v2.Compose(steps) if steps else nn.Identity()


def _per_channel(fill: Tensor | float, images: Tensor) -> Tensor:
    """``fill`` as a tensor (1, C or 1, 1, 1) like ``images``."""
    if isinstance(fill, Tensor):
        return fill.to(images).view(1, -1, 1, 1)
    return images.new_full((1, 1, 1, 1), fill)  # a copy of a number would wait for a GPU's work


def _sampling_grid(images: Tensor, angle: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Where each output pixel is read from, (B, H, W, 2) in the coordinates of ``grid_sample``.

    The same as ``affine_grid`` without its batched matrix product, which would take most of the time on a CPU.
    """
    height, width = images.shape[-2:]
    radians = angle.deg2rad()
    cos, sin = radians.cos() / zoom, radians.sin() / zoom
    # The inverse of "rotate and zoom about the centre, then shift", in coordinates where the sides are 2 long.
    along_x = torch.stack([cos, -sin * (width / height)], dim=1)
    along_y = torch.stack([sin * (height / width), cos], dim=1)
    offset = -2 * (along_x * shift[:, :1] + along_y * shift[:, 1:])
    along_x, along_y, offset = (part[:, :, None, None] for part in (along_x, along_y, offset))  # (B, 2, 1, 1)
    x, y = _pixel_centres(images)
    return (along_x * x + (along_y * y[:, None] + offset)).permute(0, 2, 3, 1)


def _pixel_centres(images: Tensor) -> list[Tensor]:
    """The coordinates of ``grid_sample`` of the columns (W,) and of the rows (H,)."""
    sides = (images.shape[-1], images.shape[-2])
    return [(2 * torch.arange(n, device=images.device, dtype=images.dtype) + 1) / n - 1 for n in sides]
