"""Few-shot Learning of Neural Networks from Scratch by Pseudo Example Optimization: a few images, and hard ones beside.

Kimura, Ghahramani, Takeuchi, Iwata, Ueda. BMVC 2018. arXiv:1802.03039.

    D(x) = sum_objectives weight * sum_terms term_weight * term(S(x), T(x))
    u_0  = clip(x + e),  x: images of the transfer set,  e ~ N(0, pseudo_noise^2)      clip: to [0,1]
    S    <- argmin_S  D(a(x)) + pseudo * D(u)        one step of the student; a: the random augmentation
    u    <- clip(argmax_u  D(u))                     `iterations` steps of Adam on the pixels

Kimura-style, our choices where the abstract is silent. It says that a small labelled set is joined by pseudo examples
which are parameters to be optimised, and that the student imitates a reference model; no code was released. Ours:

- The reference is the teacher, and its answers are softened: the chosen objectives are what is imitated.
- Pseudo images move to where the student imitates worst, by ascent on the same objectives, through both networks.
- The student is in evaluation mode meanwhile: every image climbs alone.
- Every step uses all pseudo images, unchanged. Their labels, for objectives that ask, are the teacher's classes.
- Pseudo images are a batch of their own, from which BatchNorm's averages learn nothing: what is hard is not like what
  comes, and averages of both are right for neither (as arXiv:1911.09665 found of adversarial images).

``--transfer-set real:200`` with ``--method offline`` is the same few images without pseudo examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images, Source, Subset
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import averages_kept
from dfkd_cli.options import TaughtAtFirst
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.offline import Offline
from dfkd_cli.seeds import derive


@dataclass(frozen=True, kw_only=True)
class Config(TaughtAtFirst):
    """Pseudo examples."""

    pseudo_images: int = option(200, "pseudo images, all of them used in every step", low=1, rehearsal=2)
    pseudo_noise: float = option(0.1, "Gaussian noise they start with, standard deviation in pixel units", low=0)
    pseudo: float = option(1.0, "weight of the pseudo images' loss beside the transfer set's", low=0)
    iterations: int = option(1, "ascent steps on the pseudo images after each step of the student", low=0, rehearsal=1)
    ascent_lr: float = option(0.01, "Adam learning rate of the ascent, on the pixels", above=0)


class PseudoExamples(Offline):
    """One frozen teacher, one student, and images that move to where the two differ most."""

    needs = ("teacher", "network", "objective")
    scaled = False
    config: Config
    pseudo: Tensor  # (N, C, H, W) in [0,1]

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        images = starting_images(self.train_source, config.pseudo_images, config.pseudo_noise, task.seed)
        self.register_buffer("pseudo", images)
        self.ascent_state: dict[str, Any] | None = None

    def on_fit_start(self) -> None:
        """Set up the ascent, or continue that of the checkpoint: the pixels are on this process's device by now."""
        super().on_fit_start()
        self.ascent = torch.optim.Adam([self.pseudo], lr=self.config.ascent_lr, maximize=True, fused=True)
        if self.ascent_state is not None:
            self.ascent.load_state_dict(self.ascent_state)

    def on_train_start(self) -> None:
        """Check that the student can be shown the pseudo images, and that there is one process.

        With BatchNorm of its own, each would move them elsewhere.
        """
        super().on_train_start()
        if self.trainer.world_size > 1:
            raise ConfigError("--method pseudo-examples: images are moved by one process", "give --devices 1")
        self.require_images(len(self.pseudo))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The pixels are a buffer and saved as such; Lightning does not know of their optimiser."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ascent"] = self.ascent.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the ascent's state until there is an ascent."""
        super().on_load_checkpoint(checkpoint)
        self.ascent_state = checkpoint["ascent"]

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives on the batch, and on all pseudo images."""
        loss, terms = super().loss(images)
        if not self.share:
            return loss, terms
        with averages_kept(self.student):
            more, pseudo_terms = self.pseudo_loss()
        return loss + self.share * self.config.pseudo * more, terms | {
            f"pseudo.{name}": term for name, term in pseudo_terms.items()
        }

    def pseudo_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives on the pseudo images, with gradients towards them through both networks if they ask for it."""
        teacher = self.ask_teacher(Images(self.pseudo))
        labels = next(iter(teacher.values())).logits.argmax(1)
        terms = self.terms(self.ask_student(self.pseudo), teacher, Images(self.pseudo, labels))
        return self.total(terms), self.named(terms)

    def after_step(self) -> None:
        """Move the pseudo images uphill."""
        if not self.share:
            return  # nobody learns from them any more
        self.eval()
        self.pseudo.requires_grad_()
        for _ in range(self.config.iterations):
            self.ascent.zero_grad()
            # Gradients go to the pixels only, and are laid out as these are, which the fused optimiser relies on.
            torch.autograd.backward(self.pseudo_loss()[0], inputs=[self.pseudo])
            self.ascent.step()
            with torch.no_grad():
                self.pseudo.clamp_(0, 1)
        self.pseudo.requires_grad_(False)
        self.train()


def starting_images(source: Source, count: int, noise: float, seed: int) -> Tensor:
    """Images of a source, each as often as any other, with Gaussian noise of standard deviation ``noise``.

    Returns:
        (count, C, H, W) float32 in [0,1], on the CPU.
    """
    generator = torch.Generator().manual_seed(derive("pseudo", seed))
    chosen = np.zeros(len(source), dtype=bool)
    chosen[torch.randperm(len(source), generator=generator)[:count].numpy()] = True
    images = Subset(source, chosen).all().to(torch.device("cpu")).pixels
    images = images[torch.arange(count) % len(images)]
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
