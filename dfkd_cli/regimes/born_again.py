"""Born Again Neural Networks: a student becomes the teacher of the next one like it.

Furlanello, Lipton, Tschannen, Itti, Anandkumar. ICML 2018. arXiv:1805.04770.

    T -> S_1 -> S_2 -> ... -> S_n        each: L = CE(z, y) + KL(p_{before} || p)

Every generation is ``offline`` with the same settings and other first weights; those before the last are in
``assistants/`` of the student's directory. With a teacher of the student's architecture and one generation this is
Tf-KD_self of Yuan et al. (CVPR 2020, arXiv:1909.11723): L = (1 - alpha) CE + alpha KL, where the released code has
tau^2 before KL, and takes a mean over the classes, times a multiplier. The formula above is ``--objective response
--temperature 1 --hard 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_cli.config import option
from dfkd_cli.options import Assisted
from dfkd_cli.regimes.offline import Offline


@dataclass(frozen=True, kw_only=True)
class Config(Assisted):
    """Generations of students."""

    generations: int = option(3, "students that are taught in turn, the last of which is written", low=1, rehearsal=2)

    def through(self, student: str) -> tuple[str, ...]:
        """The generations before the last."""
        return (student,) * (self.generations - 1)


class BornAgain(Offline):
    """The last generation."""

    config: Config
