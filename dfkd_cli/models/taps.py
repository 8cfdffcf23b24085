"""Named places in a network where its features are read. Any network: its code needs no change.

- ``stage1`` ... ``stageN``: the feature maps. A network whose modules have these names means these. In any other a
  stage is everything at one resolution: the last map (B, C, H, W) of each resolution above one pixel at which a
  convolution gives its output, in the order of the resolutions. ImageNet networks start with a strided stem, which is
  thus their ``stage1``. A vision transformer's only one is its patch embedding: name its blocks. ``last`` is the last
  stage, ``stages`` are all of them.
- ``penultimate``: what goes into the linear layer that gives the logits. ``logits``: what comes out.
- The path of any module of ``net``, such as ``layer3.1.conv2``: its output.
- ``NAME.pre``: the value at one of these before its activation. Where it is not activated yet, as at the stages of
  pre-activation networks, it is what next goes into an activation, after the BatchNorm in between.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.activations import Call, Tap, calls_of
from dfkd_cli.models.classifier import Classifier, is_batch_norm
from dfkd_cli.models.committee import Committee

LOG = logging.getLogger(__name__)
BEFORE = ".pre"
LAST, STAGES, PENULTIMATE, LOGITS = "last", "stages", "penultimate", "logits"


class Taps:
    """The places of one network by name, found by sending one image through it.

    Args:
        classifier: The network.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self._calls = calls_of(classifier)
        self._latest = {call.path: call for call in self._calls}
        self.earlier: dict[str, str] = {}  # by a stage's path, what is after it and runs again
        several = isinstance(classifier.net, Committee)  # each has stages of its own
        self.stages = {f"stage{i}": path for i, path in enumerate([] if several else self._stages(), start=1)}

    def _stages(self) -> list[str]:
        """The paths of the stages, from the first to the last."""
        names = itertools.takewhile(self._latest.__contains__, (f"stage{i}" for i in itertools.count(1)))
        if named := list(names):
            return named
        maps: dict[tuple[int, ...], str] = {}
        convolved, last = set(), dict[tuple[int, ...], str]()
        for call in self._calls:
            if call.output.ndim == 4:
                size = tuple(call.output.shape[2:])
                last[size] = call.path
                if self._latest[call.path] is call:  # what runs again gives its last value
                    maps[size] = call.path
                if isinstance(call.layer, nn.Conv2d):
                    convolved.add(size)
        stages = {size: path for size, path in maps.items() if size in convolved and size != (1, 1)}
        self.earlier = {path: last[size] for size, path in stages.items() if last[size] != path}
        return list(stages.values())

    def names(self, wanted: Iterable[str]) -> list[str]:
        """The names of single places that the wanted names stand for: ``stages`` are several."""
        single: list[str] = []
        for name in wanted:
            base, before = (name.removesuffix(BEFORE), BEFORE) if name.endswith(BEFORE) else (name, "")
            stages = list(self.stages) if base == STAGES else list(self.stages)[-1:] if base == LAST else []
            single += [stage + before for stage in stages] or [name]
        for name in single:
            if (later := self.earlier.get(path := self.stages.get(name, ""))) is not None:
                LOG.warning("%s: %s is what comes out of %s, before %s, of which only the last run can be read",
                            self.classifier.info.spec, name, path, later)  # fmt: skip
        return single

    def find(self, name: str) -> Tap:
        """The place of that name.

        Raises:
            ConfigError: There is none; the message names those that there are.
            ArtifactError: ``penultimate`` of a network without a linear layer at its end.
        """
        if name == PENULTIMATE and not isinstance(self.classifier.net, Committee):
            return Tap(self.classifier.head(), before=True)
        if name.endswith(BEFORE):
            return self._before_activation(name)
        return Tap(self._call(name).layer)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one image's features at the place of that name: (C, H, W) or (D,)."""
        tap = self.find(name)
        call = next(call for call in reversed(self._calls) if call.layer is tap.layer)
        return tuple((call.input if tap.before else call.output).shape[1:])

    def _call(self, name: str) -> Call:
        path = "" if name == LOGITS else self.stages.get(name, name)
        if path not in self._latest or (path == "" and name != LOGITS):
            if isinstance(self.classifier.net, Committee):
                hint = f"use one teacher, {LOGITS}, or the path of a module, which begins with members.0 in the first"
                raise ConfigError(f"several teachers together have no features {name!r}", hint)
            choices = ", ".join([*self.stages, PENULTIMATE, LOGITS])
            raise ConfigError(
                f"{self.classifier.info.spec} has no features {name!r}",
                f"choose from: {choices}, one of them with {BEFORE}, or the path of a module",
            )
        return self._latest[path]

    def batch_norm(self, name: str) -> _BatchNorm:
        """The BatchNorm that gives the value of that name, a place before an activation.

        Where the value is a sum, as at the end of a residual block, it is the first since the activation before.

        Raises:
            ArtifactError: There is none.
        """
        tap = self.find(name)
        at = next(i for i in reversed(range(len(self._calls))) if self._calls[i].layer is tap.layer)
        norm: _BatchNorm | None = None
        around = (c.layer for c in self._calls if is_batch_norm(c.layer) and tap.layer in c.layer.modules())
        if (holds := next(around, None)) is not None and holds.weight is not None:
            return holds  # a BatchNorm that activates what it gives
        for call in reversed(self._calls[:at]):
            if _activates(call):
                break
            if is_batch_norm(call.layer) and call.layer.weight is not None:
                norm = call.layer
                if call.output is self._calls[at].input:
                    break
        if norm is None:
            raise ArtifactError(
                f"{self.classifier.info.spec} has no BatchNorm with a scale before {name!r}",
                "use it with a teacher that has BatchNorm, and with taps before activations",
            )
        return norm

    def _before_activation(self, name: str) -> Tap:
        value = self._call(name.removesuffix(BEFORE)).output
        activations = [call for call in self._calls if _activates(call)]
        activation = next((call for call in reversed(activations) if call.output is value), None)
        if activation is None:
            norms = (c.output for c in self._calls if is_batch_norm(c.layer) and c.input is value)
            value = next(norms, value)
            activation = next((call for call in activations if call.input is value), None)
        if activation is None or self._latest[activation.path] is not activation:
            raise ConfigError(
                f"{self.classifier.info.spec} has no features {name!r}: no activation module of its own is found there",
                "give the path of the module whose output goes into the activation",
            )
        return Tap(activation.layer, before=True)


def _activates(call: Call) -> bool:
    return type(call.layer).__module__ == nn.ReLU.__module__ and not isinstance(call.layer, nn.MultiheadAttention)


def find_taps(classifier: Classifier, names: Iterable[str]) -> dict[str, Tap]:
    """Single places of a network by the names of one or several. It is only looked at when there are names."""
    names = list(dict.fromkeys(names))
    if not names:
        return {}
    taps = Taps(classifier)
    return {name: taps.find(name) for name in taps.names(names)}
