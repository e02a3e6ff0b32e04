"""Training batches of images that stay in their files: grain reads them ahead of their steps."""

import sys
from collections.abc import Iterator
from typing import Any

import grain

from experiments.data import Batches
from experiments.dataset import Batch

AHEAD = 4
"""Number of batches that are read ahead, each by a thread of its own."""


class StreamedBatches(Batches):
    """The same batches as those of `Batches`, in the same order; the next ones are read while a step runs.

    The position in the data is the number of the step, as for images in memory, so a resumed run reads on where it was.
    """

    _next = -1
    _reader: Any = None

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0; fast if it is the one after that of the last call."""
        if step != self._next:
            if self._reader is not None:
                self._reader.close()
            self._reader = self._read_from(step)
        self._next = step + 1
        batch: Batch = next(self._reader)
        return batch

    def _read_from(self, step: int) -> Iterator[Any]:
        steps = grain.MapDataset.range(step, sys.maxsize).map(super().__call__)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=AHEAD, prefetch_buffer_size=AHEAD)))
