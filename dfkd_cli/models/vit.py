"""Vision transformers for small images: An Image is Worth 16x16 Words.

Dosovitskiy et al. ICLR 2021. arXiv:2010.11929.

``vit-DEPTH-WIDTH``: torchvision's network with so many blocks of so many channels, heads of 32 channels and an MLP of
twice the width. Patches are 4x4 pixels, of images below 24 pixels 2x2. Its only normalisation is LayerNorm, which keeps
nothing of the images that it was trained on. ``vit-6-128`` has 0.8 million parameters.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import VisionTransformer

from dfkd_cli.errors import ConfigError

NAMES = ("vit-<depth>-<width>",)


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K).

    Raises:
        ConfigError: No such width; images are not square, or their sides are not a whole number of patches.
    """
    depth, width = map(int, name.split("-")[1:])
    channels, *sides = input_size
    patch = 4 if min(sides) >= 24 else 2
    if width % 32 or not width or not depth:
        raise ConfigError(
            f"{name}: at least one layer, and a width of heads of 32 channels each", "for example vit-6-128"
        )
    if sides[0] != sides[1] or sides[0] % patch:
        raise ConfigError(f"{name} takes square images whose sides are multiples of {patch}", "choose another network")
    net = VisionTransformer(sides[0], patch, depth, width // 32, width, 2 * width, num_classes=num_classes)
    if channels != 3:
        net.conv_proj = nn.Conv2d(channels, width, patch, patch)
        nn.init.trunc_normal_(net.conv_proj.weight, std=(1 / net.conv_proj.weight[0].numel()) ** 0.5)
        nn.init.zeros_(net.conv_proj.bias)
    nn.init.trunc_normal_(net.heads.head.weight, std=0.02)  # torchvision's is zero: its features would be no evidence
    return net
