"""Shuffled batches of a source of any size, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from dfkd_cli.data.sources import MEMORY, Images, Source, concatenated
from dfkd_cli.seeds import derive

Chunks = tuple[int, ...]


def room(device: torch.device) -> int:
    """Bytes of images to hold at once: an eighth of a GPU's memory, which is this run's; little of a CPU's."""
    return torch.cuda.mem_get_info(device)[1] // 8 if device.type == "cuda" else MEMORY


class Batches:
    """Shuffled batches of a source; every step can be found from its number alone.

    A source that fits in ``memory`` is loaded once and shuffled whole. A larger one is shuffled by chunks, and within
    windows of chunks that fit; only the window in use is held and, where a thread can read it meanwhile, the next.

    Args:
        source: The images.
        batch_size: Images per batch; an incomplete last batch is left out, unless it is the only one.
        seed: Seed of the order, which is new in every epoch.
        device: Where the batches, and the window, are.
        memory: Bytes of images held at once; by default what :func:`room` says.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, device: torch.device, memory: int | None = None
    ) -> None:
        self.source, self.seed, self.device = source, seed, device
        self.batch_size = min(batch_size, len(source))
        self.steps_per_epoch = len(source) // self.batch_size
        memory = room(device) if memory is None else memory
        fit = memory // source.bytes_per_image
        self.ahead = source.only_read and fit < len(source)
        self.capacity = max(fit // 2 if self.ahead else fit, max(source.sizes))
        self.starts = np.cumsum([0, *source.sizes]).tolist()
        self._windows: dict[Chunks, Images] = {}
        self._reader = ThreadPoolExecutor(1, "images")
        self._reading: dict[Chunks, Future[Images]] = {}
        source.use(device)

    def steps(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of steps ``start`` to ``stop``, counted over all epochs."""
        epoch, plan = -1, []
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                # After the last window comes the next epoch's first; past the last step of all it is read in vain.
                plan = self._plan(epoch) + (self._plan(epoch + 1)[:1] if self.ahead else [])
            position = step % self.steps_per_epoch
            yield self._take(plan, position * self.batch_size, (position + 1) * self.batch_size).to(self.device)

    def partners(self, images: Images) -> Images:
        """For each labelled image (B,) of the latest batch one of the same class, uniformly from those that are held.

        An image may be its own partner, and is where no other of its class is held. Torch's random state decides.
        """
        (held,) = self._windows.values()
        labels = images.true_labels
        classes = int(max(held.true_labels.max(), labels.max())) + 1
        counts = torch.bincount(held.true_labels, minlength=classes)
        rows, starts = held.true_labels.argsort(stable=True), counts.cumsum(0) - counts
        drawn = torch.rand(len(labels), device="cpu").to(self.device)  # as on any device
        at = (starts[labels] + (drawn * counts[labels]).long()).clamp_max(len(rows) - 1)
        partners, alone = held[rows[at]].to(self.device), (counts[labels] == 0)[:, None, None, None]
        return Images(torch.where(alone, images.pixels, partners.pixels), labels)

    def _plan(self, epoch: int) -> list[tuple[Chunks, np.ndarray]]:
        """The epoch's windows, each as its chunks and a shuffled order of its images."""
        generator = np.random.default_rng(derive("order", self.seed, epoch))
        sizes = self.source.sizes
        if len(self.source) <= self.capacity:
            windows = [tuple(range(len(sizes)))]
        else:
            windows, room = [], 0
            for chunk in generator.permutation(len(sizes)).tolist():
                if sizes[chunk] > room:
                    windows.append(())
                    room = self.capacity
                windows[-1] += (chunk,)
                room -= sizes[chunk]
        return [(window, generator.permutation(sum(sizes[c] for c in window))) for window in windows]

    def _take(self, plan: list[tuple[Chunks, np.ndarray]], start: int, stop: int) -> Images:
        parts = []
        for (window, order), following in zip(plan, [*plan[1:], (None, None)], strict=True):
            if start < len(order) and stop > 0:
                rows = torch.from_numpy(order[max(start, 0) : stop]).to(self.device)
                parts.append(self._window(window, following[0])[rows])
            start, stop = start - len(order), stop - len(order)
        return parts[0] if len(parts) == 1 else concatenated(parts)

    def _window(self, chunks: Chunks, following: Chunks | None) -> Images:
        """The images of some chunks; those that follow are read meanwhile."""
        if chunks not in self._windows:
            self._windows.clear()  # rows of it are copies: a batch that spans windows needs the former no more
            reading = self._reading.pop(chunks, None)
            self._reading.clear()
            self._windows[chunks] = self._load(chunks) if reading is None else reading.result()
            if self.ahead and following is not None and following not in self._windows:
                self._reading[following] = self._reader.submit(self._load, following)
        return self._windows[chunks]

    def _load(self, chunks: Chunks) -> Images:
        source, count = self.source, sum(self.source.sizes[c] for c in chunks)
        window = {"pixels": torch.empty(count, *source.shape, dtype=source.dtype, device=self.device)}
        if source.labelled:
            window["labels"] = torch.empty(count, dtype=torch.int64, device=self.device)
        window |= {name: torch.empty(count, k, device=self.device) for name, k in source.answers.items()}
        at = 0
        for chunk in chunks:  # filled in place: a list of chunks and their concatenation would take twice the room
            images, end = source.chunk(chunk), at + source.sizes[chunk]
            for name, values in window.items():
                values[at:end] = getattr(images, name)
            at = end
        positions = torch.cat([torch.arange(self.starts[c], self.starts[c + 1]) for c in chunks])
        return Images(**window, positions=positions.to(self.device))
