"""Self-attention in networks of any make: what each token takes from the others."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.models.activations import Tap
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
    tokens: dict[str, int] = {}
    cut: list[int] = []

    def attend(path: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note a layer that one thing comes into by its place, to PyTorch's as query, key and value."""
        ours = isinstance(layer, nn.MultiheadAttention)
        if inputs and inputs[0].ndim == 3 and not (ours and any(part is not inputs[0] for part in inputs[:3])):
            tokens[path] = inputs[0].shape[0 if ours and not layer.batch_first else 1]

    with contextlib.ExitStack() as hooks:
        for path, layer in classifier.net.named_modules():
            if isinstance(layer, nn.Conv2d):
                hook = layer.register_forward_hook(lambda _, __, output: cut.append(output.shape[2:].numel()))
            elif _attends(layer):
                watched = functools.partial(attend, path, layer)
                hook = Attention(layer, 0).tap.layer.register_forward_pre_hook(
                    lambda _, inputs, see=watched: see(inputs)
                )
            else:
                continue
            hooks.enter_context(hook)
        probe(classifier.net, classifier.info.input_size)
    return {
        path: Attention(classifier.net.get_submodule(path), min((n - size for size in cut if size <= n), default=0))
        for path, n in tokens.items()
    }


def _attends(layer: nn.Module) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight is not None
    return isinstance(getattr(layer, "proj", None), nn.Linear) and isinstance(getattr(layer, "num_heads", None), int)
