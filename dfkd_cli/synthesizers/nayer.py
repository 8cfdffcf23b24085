"""NAYER: noisy layers over label embeddings; here random or one-hot ones, not the text encoder's.

Tran, Le, Le, Harandi, Tran, Phung. NAYER: Noisy Layer Data Generation. CVPR 2024. arXiv:2310.00258.

    x = G(N_i(BN(e_y))),    N_i ~ linear, weights N(0, 1), a new one in each batch for each block i of all classes
    L = a CE(T(x), y) + b R(x) + c L_adv(x)                            a batch: some steps of Adam on G, BN and all N_i

R, with the average of former batches, is that of ``fast-dfkd``; L_adv and the rest of the frame are in ``pooled``. The
generator goes on from batch to batch, and starts anew when its life is over; the averages of R go on.

The paper's e_y is what CLIP's text encoder makes of the class's name, 512 numbers: knowledge from outside that this
command must not have. ``embedding`` is one-hot (as many numbers as classes) or random (``embedding_size`` numbers from
N(0, 1)), as in its ablation. Its published figures are for the text encoder.

Differences from the released code:

- The classes of an incomplete last block are different ones.
- Its two batches in a row before the student learns are two rounds here, with half the steps of the student each.
- The student's learning rate falls to 0 instead of 2e-4.
- The generator that is written takes normal latents: before training, N_i(BN(e_y)) is normal with the norm of BN(e_y)
  as its deviation, by which the generator's first weights are multiplied.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.seeds import derive
from dfkd_cli.synthesis_options import PooledGeneration
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.synthesizers.pooled import BatchGeneration, PooledGenerator


@dataclass(frozen=True, kw_only=True)
class Config(PooledGeneration):
    """NAYER."""

    batch_size: int = 400
    iterations: int = 30
    lr: float = option(4e-3, "Adam learning rate of the generator and the noisy layers")
    latent: int = option(1000, "outputs of a noisy layer, which the generator makes an image from", low=1)
    embedding: Literal["one-hot", "random"] = option("one-hot", "embeddings of the classes, no text encoder's")
    embedding_size: int = option(512, "numbers of a random embedding", low=1)
    generator_life: tuple[int, int] = option(
        (100, 20), "rounds after which the generator starts anew: in the warm-up, later", low=1
    )
    cross_entropy: float = 0.5
    statistics: float = 10.0
    statistics_momentum: float = 0.9
    adversarial: float = 1.33
    warmup_share: float = 0.25
    student_lr: float = option(0.2, "the student's first learning rate, which falls along a cosine")
    student_steps: int = 200
    student_batch_size: int = 512


class NAYER(PooledGenerator):
    """A generator of noisy label embeddings."""

    config: Config
    embeddings: Tensor  # (K, E)

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        c, classes = config, self.teacher.info.num_classes
        random = torch.Generator().manual_seed(derive("embedding", self.seed))
        embeddings = torch.randn(classes, c.embedding_size, generator=random)
        embeddings = torch.eye(classes) if c.embedding == "one-hot" else embeddings
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.note = f"nayer: {c.embedding} embeddings of the classes stand for a text encoder's"
        self.norm = nn.BatchNorm1d(embeddings.shape[1])

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The student, and the generator as it is before a batch, when the noisy layers are normal noise."""
        generator, norm = copy.deepcopy(self.generator), copy.deepcopy(self.norm).eval()
        with torch.no_grad():
            linear = next(layer for layer in generator.modules() if isinstance(layer, nn.Linear))
            linear.weight *= norm(self.embeddings).norm(dim=1).mean()
        return {**super().models(), "generator": generator}

    def labels(self, count: int) -> Tensor:
        """Blocks of all classes, the last perhaps of some of them."""
        classes = self.teacher.info.num_classes
        return torch.cat([torch.arange(classes).repeat(count // classes), torch.randperm(classes)[: count % classes]])

    def start(self, labels: Tensor) -> BatchGeneration:
        """The generator as it is, or anew, and new noisy layers."""
        c = self.config
        done = self.current_round if self.warming_up else self.current_round - self.warmup_rounds
        if done % c.generator_life[not self.warming_up] == 0:
            for layer in (*self.generator.modules(), self.norm):
                if isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
                    layer.reset_parameters()
        noisy = NoisyLayers(len(labels), len(self.embeddings), self.embeddings.shape[1], c.latent).to(self.device)
        network = nn.Sequential(self.norm, noisy, self.generator)
        optimizer = torch.optim.Adam(network.parameters(), c.lr, betas=c.betas, fused=True)
        return BatchGeneration(network, self.embeddings[labels], [optimizer])


class NoisyLayers(nn.Module):
    """Linear layers with normal weights, one for each block of a batch, (B, E) to (B, D).

    Args:
        count: B.
        block: Rows that share a layer; the last block may have fewer.
        inputs, outputs: E and D.
    """

    def __init__(self, count: int, block: int, inputs: int, outputs: int) -> None:
        super().__init__()
        blocks = -(-count // block)
        self.block = block
        self.weight = nn.Parameter(torch.randn(blocks, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(blocks, 1, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        missing = len(self.weight) * self.block - len(rows)
        blocks = F.pad(rows, (0, 0, 0, missing)).view(-1, self.block, rows.shape[1])
        return torch.baddbmm(self.bias, blocks, self.weight).flatten(0, 1)[: len(rows)]
