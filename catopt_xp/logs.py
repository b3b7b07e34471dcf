"""Logs of a run, as callbacks: a CSV that grows by a row an epoch, JSON at the end, events for TensorBoard. Floor F3.

tensorboardX is imported here alone, and only when such a log is made. Its record writer is used directly: what goes
through its queue and thread takes four times as long, and a full disk there stops the run for good instead of raising.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from catopt_xp.callbacks import TrainState
from catopt_xp.history import History

# Tag of TensorBoard -> list of the history; what stands before the slash is the group that it is shown in.
TAGS_BY_EPOCH = {"loss/train_loss": "train_loss", "learning_rate": "learning_rate", "time/seconds": "seconds"}
TAGS_BY_EVALUATION = {
    "loss/full_train_loss": "full_train_loss",
    "loss/dev_loss": "dev_loss",
    "accuracy/train_accuracy": "train_accuracy",
    "accuracy/dev_accuracy": "dev_accuracy",
}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of writing names the place."""
    try:
        yield
    except OSError as error:
        told = f"could not write {path}: {error.strerror or error}; free space or choose another place"
        raise OSError(error.errno, told) from error


class CsvLog:
    """Writes `History.to_csv` as the run goes: the columns' names first, then a row after each epoch.

    `filename`: replaced when the run begins; its folder is made. A resumed run writes the epochs before it too, each
    once, whatever stood there. Raises OSError.
    """

    needs_weights = False

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.path = Path(filename)
        self._rows: int | None = None  # in the file; None: it is not this run's yet

    def on_epoch(self, state: TrainState) -> None:
        """Adds what the history has and the file has not."""
        history = state.history
        with history.stage("save"):
            if self._rows is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                history.to_csv(self.path)
            else:
                rows = [history.csv_row(k) for k in range(self._rows, len(history.epoch))]
                # Closed after each, so that others may read it.
                with _named(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
                    file.write("".join(rows))
            self._rows = len(history.epoch)

    def on_end(self, state: TrainState) -> None:
        """Makes ready for another run; one with nothing left to train leaves its file too."""
        if self._rows is None and state.history.epoch:
            self.on_epoch(state)
        self._rows = None


class JsonLog:
    """Writes `History.to_json` when training ends, however it ends, whole or not at all, unless there are no epochs.

    `filename`: replaced; its folder is made. Raises OSError.
    """

    needs_weights = False

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.path = Path(filename)

    def on_epoch(self, state: TrainState) -> None:
        """Nothing yet: the history is written once."""

    def on_end(self, state: TrainState) -> None:
        """Writes the file."""
        if state.history.epoch:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            state.history.to_json(self.path)


class TensorBoard:
    """Writes scalars and the run's settings into `folder`, for `tensorboard --logdir`, as the history grows.

    By epoch: the lists of a History by their names (`loss/train_loss`, `accuracy/dev_accuracy`, `learning_rate`,
    `time/seconds`, …) and the seconds by stage so far (`stages/train`, …). By step, from 1: `loss/mini_batch_loss`.
    As text: `run`. The folder is made. A resumed run writes the epochs before it too, each at the wall time at which it
    would have ended had nothing come between; what earlier runs left in the folder stays there and is no longer shown.

    Raises ImportError, in one line that names the extra, without tensorboardX; OSError.
    """

    needs_weights = False

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as error:
            told = f'logs for TensorBoard need tensorboardX ({error}): pip install "catopt-xp[tensorboard]"'
            raise ImportError(told) from error
        self._make_writer, self._make_text = event_file_writer.EventsWriter, summary.text
        self._events, self._summaries = event_pb2, summary_pb2
        self._writer: Any = None
        self._written = (0, 0, 0)  # epochs, evaluations, steps

    def on_epoch(self, state: TrainState) -> None:
        """Writes what the history has and the file has not."""
        with state.history.stage("save"), _named(self.folder):
            if self._writer is None:
                self._open(state.history)
            self._write(state.history)
            self._writer.flush()

    def on_end(self, state: TrainState) -> None:
        """Closes the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with _named(self.folder):
                writer.close()

    def _open(self, history: History) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The time makes the name its own, also within a second, and keeps the order in which readers take files.
        self._writer = self._make_writer(str(self.folder / "events"), f".{time.time_ns()}")
        self._written = (0, 0, 0)
        # A start at step 0 tells readers to drop what earlier files have from there on.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=0, session_log=start))
        table = "".join(f"| {name} | {str(value).replace('|', '&#124;')} |\n" for name, value in history.run.items())
        self._event(time.time(), 0, self._make_text("run", f"| setting | value |\n|---|---|\n{table}"))

    def _write(self, history: History) -> None:
        epochs, evaluations, steps = self._written
        seconds = history.seconds
        ends = list(accumulate(seconds, initial=time.time() - sum(seconds)))[1:]  # wall time after each epoch
        for k in range(epochs, len(history.epoch)):
            values = {tag: getattr(history, name)[k] for tag, name in TAGS_BY_EPOCH.items()}
            self._scalars(ends[k], history.epoch[k], values)
        for k in range(evaluations, len(history.eval_epoch)):
            epoch = history.eval_epoch[k]
            lists = {tag: getattr(history, name) for tag, name in TAGS_BY_EVALUATION.items()}
            values = {tag: values[k] for tag, values in lists.items() if values}
            self._scalars(ends[history.epoch.index(epoch)], epoch, values)
        if history.epoch:
            stages = {f"stages/{stage}": spent for stage, spent in history.timings.items()}
            self._scalars(ends[-1], history.epoch[-1], stages)
        losses = history.mini_batch_loss
        for k in range(steps, len(losses)):
            self._scalars(ends[k * len(ends) // len(losses)], k + 1, {"loss/mini_batch_loss": losses[k]})
        self._written = len(history.epoch), len(history.eval_epoch), len(losses)

    def _scalars(self, wall_time: float, step: int, values: dict[str, float]) -> None:
        made = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._event(wall_time, step, self._summaries.Summary(value=made))

    def _event(self, wall_time: float, step: int, summary: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=wall_time, step=step, summary=summary))
