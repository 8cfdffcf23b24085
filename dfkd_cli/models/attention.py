"""Self-attention in networks of any make: what each token takes from the others."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.models.activations import Tap, values_at
from dfkd_cli.models.classifier import Classifier, probe


@dataclass(frozen=True)
class Attention:
    """A self-attention layer.

    Attributes:
        layer: ``nn.MultiheadAttention``, or a layer as timm has them, with ``num_heads`` and ``proj``.
        prefix: Tokens before those of the patches: the class token, registers.
    """

    layer: nn.Module
    prefix: int

    @property
    def tap(self) -> Tap:
        """Where :meth:`patches` looks: what goes into PyTorch's layer, or into the projection at the end of timm's."""
        if isinstance(self.layer, nn.MultiheadAttention):
            return Tap(self.layer, before=True)
        return Tap(self.layer.get_submodule("proj"), before=True)

    def patches(self, seen: Tensor) -> Tensor:
        """What attention gives to each patch before it is projected, mean over the heads.

        Args:
            seen: (B, N, D) at the tap, N tokens.

        Returns:
            (B, N - prefix, D / heads).
        """
        layer = self.layer
        heads: int = layer.num_heads  # type: ignore[assignment]  # of either make
        if isinstance(layer, nn.MultiheadAttention):
            tokens = seen if layer.batch_first else seen.transpose(0, 1)
            parts = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=2)
            query, key, value = (part.view((*part.shape[:2], heads, -1)).transpose(1, 2) for part in parts)
            values = F.scaled_dot_product_attention(query, key, value).mean(1)
        else:
            values = seen.view((*seen.shape[:2], heads, -1)).mean(2)
        return values[:, self.prefix :]


def attention_layers(classifier: Classifier) -> dict[str, Attention]:
    """The self-attention layers of a network that can be looked into, by their path, in the order they run.

    A layer attends to patches, which a convolution has cut, and tokens before them; within windows of patches there are
    none. What computes attention without layers that run, as torchvision's Swin does, is not found.
    """
    modules = dict(classifier.net.named_modules())
    places = {path: Attention(layer, 0) for path, layer in modules.items() if _attends(layer)}
    read = set[nn.Module]()

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """That something comes in by its place, and to PyTorch's layer three times the same: self-attention."""
        first = inputs[:1]
        if first and (not isinstance(layer, nn.MultiheadAttention) or all(part is first[0] for part in inputs[:3])):
            read.add(layer)

    with contextlib.ExitStack() as hooks:
        for layer in {place.tap.layer for place in places.values()}:
            hooks.enter_context(layer.register_forward_pre_hook(note))
        probe(classifier.net, classifier.info.input_size)
    places = {path: place for path, place in places.items() if place.tap.layer in read}
    convolutions = {path: Tap(layer) for path, layer in modules.items() if isinstance(layer, nn.Conv2d)}
    with values_at({path: layer.tap for path, layer in places.items()} | convolutions) as seen:
        probe(classifier.net, classifier.info.input_size)
    cut = [seen[path].shape[2:].numel() for path in convolutions if path in seen]
    found: dict[str, Attention] = {}
    for path in (path for path in seen if path in places and seen[path].ndim == 3):
        layer = places[path].layer
        tokens = seen[path].shape[0 if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first else 1]
        found[path] = Attention(layer, min((tokens - patches for patches in cut if patches <= tokens), default=0))
    return found


def _attends(layer: nn.Module) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight is not None
    return isinstance(getattr(layer, "proj", None), nn.Linear) and isinstance(getattr(layer, "num_heads", None), int)
