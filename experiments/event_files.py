"""The metrics of a run as event files, which TensorBoard displays: tensorboard --logdir runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run_folder import Epoch

FOLDER = "tensorboard"


class EventFiles:
    """Writes the metrics of steps and epochs into a folder `tensorboard` of the run's folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file; TensorBoard ignores the numbers after `first_step` in the earlier ones."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=first_step + 1 if first_step else None)

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the metrics of some steps, as `Run.log` does."""
        for record in records:
            for name, value in _scalars({key: value for key, value in record.items() if key != "step"}):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def end_epoch(self, row: Epoch) -> None:
        """Write the numbers of an epoch."""
        for quantity in ("loss", "accuracy"):
            for part in ("train", "validation"):
                self._writer.add_scalar(f"{quantity}_by_epoch/{part}", getattr(row, f"{part}_{quantity}"), row.step)
        if row.of_masks:
            self._writer.add_scalar("mean_iou_by_epoch/validation", row.validation_mean_iou, row.step)
        self._writer.add_scalar("images_per_second", row.images_per_second, row.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each number, such as ("delta_norms/conv1", 0.1)."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", item) for key, item in value.items())
        else:
            yield name, value
