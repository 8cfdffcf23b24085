"""Improved Knowledge Distillation via Teacher Assistant: networks of middle size pass the teacher's knowledge on.

Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh. AAAI 2020. arXiv:1902.03393.

    T -> A_1 -> ... -> A_n -> S        each hop: L = (1 - lambda) CE(z, y) + lambda tau^2 KL(p_teacher || p)

Every hop is ``offline`` with the same settings, into ``assistants/`` of the student's directory, where finished hops
are found again. Which way is taken, with the networks in the order in which they are named, from large to small:

- ``dense``: through all of them, the paper's best.
- ``auto``: through one, whose agreement with the teacher lies midway between the teacher's own (1) and that of the
  student that it teaches without help. The paper finds that accuracies matter, not sizes.
- ``best``: the way on which the student agrees most. The best way to each network is searched from the best ways to
  those before it, so that with n assistants (n + 1)(n + 2) / 2 hops are made.

Agreement is with the first teacher's classes on the transfer set, images that nobody need have labelled; the released
code has no search, and takes each network's best epoch by its test images. A hop's formula is ``--objective response
--soft lambda --hard 1-lambda``; theirs is a mean over the classes too, so that its lambda weighs K times more here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfkd_cli.config import option
from dfkd_cli.options import Assisted
from dfkd_cli.regimes.offline import Offline


@dataclass(frozen=True, kw_only=True)
class Config(Assisted):
    """Teacher assistants."""

    assistants: tuple[str, ...] = option(("resnet20", "resnet14"), "model SPECs, from large to small")
    path: Literal["dense", "auto", "best"] = option("dense", "through all assistants, the one midway, or the best way")

    def through(self, student: str) -> tuple[str, ...]:
        """The assistants."""
        return self.assistants


class Assistants(Offline):
    """The last hop: a student and its last assistant."""

    config: Config
