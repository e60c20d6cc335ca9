"""TensorBoard: a run's figures as event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from fedobd._lookup import not_installed
from fedobd.tracking._tracker import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


@final
class TensorBoardTracker(Tracker):
    """Writes event files to the folder `tensorboard` of the run folder.

    A run that goes on writes its rounds from the first in a new file, which takes the place of
    what the older ones say of them (TensorBoard's `purge_step`). The configuration is in the Text
    tab from the beginning, and in the HParams tab with the summary at the end.

    Raises:
        UsageError: tensorboard is not installed.
    """

    name: ClassVar[str] = "tensorboard"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise not_installed("this", error, "tensorboard") from error
        self._make_writer = SummaryWriter
        self._parameters: dict[str, int | float | str] = {}

    def _begin(self, parameters: Mapping[str, Any], folder: Path) -> None:
        target = folder / FOLDER
        purge_step = 0 if target.exists() else None
        self._writer: SummaryWriter = self._make_writer(str(target), purge_step=purge_step)
        self._parameters = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in parameters.items()
        }
        lines = (f"    {key} = {value}" for key, value in self._parameters.items())
        self._writer.add_text("config", "\n".join(lines), 0)
        self._writer.flush()

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _close(self, summary: Mapping[str, float] | None) -> None:
        if summary is not None:
            self._writer.add_hparams(self._parameters, dict(summary), run_name=".")
        self._writer.close()
