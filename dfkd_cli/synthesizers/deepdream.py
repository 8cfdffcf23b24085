"""DeepDream: images of one class each under image priors alone.

Mordvintsev, Olah, Tyka. Inceptionism: Going deeper into neural networks. Google research blog, 2015. Here the baseline
of DeepInversion (Yin et al., CVPR 2020, arXiv:1912.08795), whose terms and settings it shares.

    x = argmin_x  CE(T(x) / tau, y) + a_tv (|d_w x| + |d_h x| + |d_diag x| + |d_anti x|) + a_l2 |x|

The four norms are over the whole batch, so that their sum grows with the root of the batch size. ``temperature``, tau,
is ours and 1 by default: the higher it is, the longer the class goes on to shape its images, which matters where
nothing but priors stands beside it. See ``deepinversion`` for what differs from the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_cli.synthesis_options import Inversion
from dfkd_cli.synthesizers.inversion import Inverter


@dataclass(frozen=True, kw_only=True)
class Config(Inversion):
    """DeepDream."""


class DeepDream(Inverter):
    """Images of one class each."""

    config: Config
