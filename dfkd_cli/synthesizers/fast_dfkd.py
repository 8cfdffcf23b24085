"""Fast-DFKD: a meta generator from which a batch of images is a few steps away.

Fang, Mo, Wang, Song, Bei, Zhang, Song. Up to 100x Faster Data-free Knowledge Distillation. AAAI 2022. arXiv:2112.06253.

    theta_0 = theta, z_0 ~ N(0, 1):   k steps of Adam on  L = a CE(T(x), y) + b R(x) + c L_adv(x),  x = G(z; theta_i)
    R = sum_l |mean_l - m_l|_2 + |var_l - v_l|_2,   (m_l, v_l) = (1 - r) (moments of x) + r (average of former batches)
    theta <- Adam(d theta),    FOMAML: d theta = sum_i dL/dtheta_i,    Reptile: d theta = theta - theta_k

The average has r as its momentum and takes each batch once, after its last step. L_adv and the rest of the frame are in
``pooled``. ``iterations``, ``lr`` and ``latent_lr`` go together: 2, 5e-3, 0.015; 5, 3e-3, 0.01; 10, 2e-3, 0.01. The
weights are those of ResNet-34 to ResNet-18.

Differences from the released code:

- The gradient of Reptile is not multiplied by 67, which Adam does not notice.
- The meta generator has the BatchNorm averages of the last batch's; in the code they stay as they were initialised.
  They count for nothing but the generator that is written at the end.
- The adversary joins when the student does; in the code one batch earlier.
- The student's learning rate falls to 0 and in each step; the code's falls to 2e-4 and in each epoch.
- The generator and its latents for ImageNet are not here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dfkd_cli.config import option
from dfkd_cli.synthesis_options import PooledGeneration
from dfkd_cli.synthesizers.pooled import BatchGeneration, Candidate, PooledGenerator


@dataclass(frozen=True, kw_only=True)
class Config(PooledGeneration):
    """Fast-DFKD."""

    iterations: int = 5
    lr: float = option(3e-3, "Adam learning rate of the generator; the meta generator's is iterations times it")
    latent_lr: float = option(0.01, "Adam learning rate of the latents", above=0)
    meta: Literal["fomaml", "reptile"] = option("fomaml", "what the meta generator learns from a batch")
    reset_first_layer: int | None = option(
        120, "round after the warm-up in which the generator's first layer starts anew; none: never", low=1
    )
    cross_entropy: float = 0.5
    statistics: float = 10.0
    statistics_momentum: float = 0.9
    adversarial: float = 1.33
    warmup_share: float = 0.09
    student_lr: float = option(0.2, "the student's first learning rate, which falls along a cosine")
    student_batch_size: int = 256


class FastDFKD(PooledGenerator):
    """Each batch starts from the meta generator."""

    config: Config

    def trained(self) -> Sequence[tuple[Optimizer, LRScheduler | None]]:
        """The student and the meta generator."""
        c = self.config
        meta = torch.optim.Adam(self.generator.parameters(), c.lr * c.iterations, betas=c.betas, fused=True)
        return [*super().trained(), (meta, None)]

    @property
    def meta_optimizer(self) -> Optimizer:
        """The second optimiser, without Lightning's wrapper: its gradients are not scaled in mixed precision."""
        return self.pairs[1][0]

    def start(self, labels: Tensor) -> BatchGeneration:
        """A copy of the meta generator, and new latents."""
        c = self.config
        if c.reset_first_layer and self.current_round + 1 == self.warmup_rounds + c.reset_first_layer:
            reset_first_layer(self.generator)
        self.meta_optimizer.zero_grad()
        network, latents = copy.deepcopy(self.generator), self.latents(len(labels))
        optimizer = torch.optim.Adam(network.parameters(), c.lr, betas=c.betas, fused=True)
        optimizer.add_param_group({"params": [latents], "lr": c.latent_lr})
        return BatchGeneration(network, latents, [optimizer])

    def before_step(self, batch: BatchGeneration) -> None:
        """FOMAML: the gradient at each inner step."""
        if self.config.meta == "fomaml":
            for meta, inner in zip(self.generator.parameters(), batch.network.parameters(), strict=True):
                assert inner.grad is not None
                meta.grad = inner.grad.clone() if meta.grad is None else meta.grad + inner.grad

    def finish(self, batch: BatchGeneration, best: Candidate) -> None:
        """The meta generator's step."""
        if self.config.meta == "reptile":
            for meta, inner in zip(self.generator.parameters(), batch.network.parameters(), strict=True):
                meta.grad = (meta - inner).detach()
        self.meta_optimizer.step()
        for mine, its in zip(self.generator.buffers(), batch.network.buffers(), strict=True):
            mine.copy_(its)


def reset_first_layer(generator: nn.Module) -> None:
    """Initialise the linear layer and the BatchNorm after it anew, both with N(0, 0.02^2) and zeros."""
    linear = next(layer for layer in generator.modules() if isinstance(layer, nn.Linear))
    norm = next(layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d))
    for layer in (linear, norm):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        nn.init.zeros_(layer.bias)
