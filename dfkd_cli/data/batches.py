"""Shuffled batches of a source of any size, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from threading import Thread, main_thread

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
    windows of chunks that fit, one chunk at least; only the window in use is held. Where ``memory`` is given, windows
    are half as large, and a thread reads the next one meanwhile.

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
        fit, largest = (room(device) if memory is None else memory) // source.bytes_per_image, max(source.sizes)
        # Not by default, where windows of another size would be another order than that of former versions.
        self.ahead = memory is not None and source.only_read and 2 * largest <= fit < len(source)
        self.capacity = max(fit // 2 if self.ahead else fit, largest)
        self.starts = np.cumsum([0, *source.sizes]).tolist()
        self._windows: dict[Chunks, Images] = {}
        self._reading: dict[Chunks, Future[Images]] = {}
        self._planned = -1, list[tuple[Chunks, np.ndarray]]()  # an epoch, and its windows
        source.use(device)

    def steps(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of steps ``start`` to ``stop``, counted over all epochs."""
        for step in range(start, stop):
            epoch, plan = self._planned
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                plan = self._plan(epoch)
                if self.ahead:  # of what an incomplete batch leaves out nothing is read; then the next epoch begins
                    ends = np.cumsum([len(order) for _, order in plan])
                    used = int(np.searchsorted(ends, self.steps_per_epoch * self.batch_size)) + 1
                    plan = plan[:used] + self._plan(epoch + 1)[:1]
                self._planned = epoch, plan
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
                rows = torch.from_numpy(order[max(start, 0) : stop])
                # A copy that blocks would wait for all that the GPU has been given to do.
                rows = rows.to(self.device, non_blocking=self.device.type == "cuda")
                parts.append(self._window(window, following[0])[rows])
            start, stop = start - len(order), stop - len(order)
        return parts[0] if len(parts) == 1 else concatenated(parts)

    def _window(self, chunks: Chunks, following: Chunks | None) -> Images:
        """The images of some chunks; those that follow are read meanwhile."""
        if chunks not in self._windows:
            self._windows.clear()  # rows of it are copies: a batch that spans windows needs the former no more
            reading = self._reading.pop(chunks, None)
            for unwanted in self._reading.values():
                unwanted.cancel()
            self._reading.clear()
            self._windows[chunks] = self._load(chunks) if reading is None else reading.result()
            if self.ahead and following is not None and following not in self._windows:
                self._reading[following] = Future()
                Thread(target=self._read, args=(following, self._reading[following]), name="images").start()
        return self._windows[chunks]

    def _read(self, chunks: Chunks, reading: Future[Images]) -> None:
        """Load chunks in a thread, which ends at the next of them when nobody wants them, or the process ends."""

        def wanted() -> bool:
            return not reading.cancelled() and main_thread().is_alive()

        with contextlib.suppress(InvalidStateError):
            try:
                reading.set_result(self._load(chunks, wanted))
            except Exception as error:
                reading.set_exception(error)

    def _load(self, chunks: Chunks, wanted: Callable[[], bool] = lambda: True) -> Images:
        source, count = self.source, sum(self.source.sizes[c] for c in chunks)
        window = {"pixels": torch.empty(count, *source.shape, dtype=source.dtype, device=self.device)}
        if source.labelled:
            window["labels"] = torch.empty(count, dtype=torch.int64, device=self.device)
        window |= {name: torch.empty(count, k, device=self.device) for name, k in source.answers.items()}
        at = 0
        for chunk in chunks:  # filled in place: a list of chunks and their concatenation would take twice the room
            if not wanted():
                raise CancelledError
            images, end = source.chunk(chunk), at + source.sizes[chunk]
            for name, values in window.items():
                values[at:end] = getattr(images, name)
            at = end
        positions = torch.cat([torch.arange(self.starts[c], self.starts[c + 1]) for c in chunks])
        return Images(**window, positions=positions.to(self.device))
