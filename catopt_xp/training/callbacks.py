"""Callbacks: what may look at a run after every epoch. Early stopping, checkpoints and logs are callbacks.

The logs are a CSV that grows by a row an epoch, JSON at the end, and events for TensorBoard. tensorboardX is imported
here alone, and only when such a log is made. Its record writer is used directly: what goes through its queue and thread
takes four times as long, and a full disk there stops the run for good instead of raising.
"""

from __future__ import annotations

import os
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from catopt_xp.backend.xp import Array, backend_of
from catopt_xp.io.files import Mark, keep_copy, mark, write_whole
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.nn.parameters import Parameters, check_matches
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.training.checkpoint import npz_path
from catopt_xp.training.history import History


def _no_run(filename: str | os.PathLike[str]) -> Path:
    raise RuntimeError(f"{filename} was not written: this TrainState belongs to no run")


@dataclass
class TrainState:
    """What a callback sees. `model` and `optimizer` are those that train, on their device; set `stop` to end it all.

    `epoch`: the one that has ended, counted from 0. `evaluated`: whether the history got its costs and accuracies.
    `last`: whether no epoch follows, as the end is reached or the run was interrupted. `steps`: updates since epoch 0.
    `save(filename)` writes a checkpoint that `recover_from` takes, and returns its path.
    """

    epoch: int
    model: BaseRegressionModel
    optimizer: BaseOptimizer
    history: History
    evaluated: bool
    stop: bool = False
    last: bool = False
    steps: int = 0
    save: Callable[[str | os.PathLike[str]], Path] = _no_run


class Callback(Protocol):
    """Anything with `on_epoch(state)`, called after each epoch (and its evaluation, where there is one).

    Where it has `on_end(state)`, that is called once more when training ends, also by an exception. One that says
    `needs_weights = False` reads the weights of evaluated epochs alone; those of others are not gathered for it, which
    saves time.
    """

    def on_epoch(self, state: TrainState) -> None:
        """Look at the run, log it, or set `state.stop`."""


class EarlyStopping:
    """Stops when the cost has not fallen for `patience` evaluations, and keeps the weights of the best one.

    The cost is `dev_loss`, or `full_train_loss` without a dev set. `train` puts the best weights back at the end, and
    keeps them in its checkpoints. Raises ValueError when `patience` is below 1.
    """

    needs_weights = False

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping is {patience}; give the evaluations to wait, at least 1")
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forgets the run before."""
        self.best_loss = float("inf")
        self.best_epoch = -1
        self.waited = 0
        self.best: Mapping[str, Array] | None = None

    def on_epoch(self, state: TrainState) -> None:
        """Compares the newest evaluation with the best one."""
        if not state.evaluated:
            return
        history = state.history
        loss = (history.dev_loss or history.full_train_loss)[-1]
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.waited = loss, state.epoch, 0
            self.keep(state.model.save())
            return
        self.waited += 1
        state.stop = state.stop or self.exhausted

    def keep(self, weights: Mapping[str, Any]) -> None:
        """Copies `weights` into the buffer of the best ones, made at the first call."""
        if self.best is None:
            self.best = _buffers(weights)
        for name, kept in self.best.items():
            kept[...] = weights[name]

    @property
    def exhausted(self) -> bool:
        """Whether the cost has not fallen for `patience` evaluations."""
        return self.waited >= self.patience

    def save(self) -> dict[str, Any]:
        """State without the weights, JSON-able."""
        return {"best_loss": self.best_loss, "best_epoch": self.best_epoch, "waited": self.waited}

    def load(self, state: Mapping[str, Any], best: Mapping[str, Any], like: Mapping[str, Array]) -> None:
        """Takes a saved state and the weights kept with it, on the device of `like`. ValueError names a bad key."""
        check_matches(best, {name: tuple(x.shape) for name, x in like.items()}, "best weights")
        self.best_loss, self.best_epoch = float(state["best_loss"]), int(state["best_epoch"])
        self.waited = int(state["waited"])
        self.best = _buffers(like)
        for name, kept in self.best.items():
            kept[...] = backend_of(kept).asarray(best[name], dtype=kept.dtype)


class Checkpointing:
    """Writes a checkpoint every `every` epochs (None: when evaluated), and when the run ends or is stopped.

    `filename`: `.npz` is appended when missing; each checkpoint replaces the one before. What another run left there is
    kept beside it as `…_previous.npz`, and so is what another run leaves there meanwhile, which `notice` is told;
    `keeps=False` leaves that to another process. With
    `every_steps`, also after so many updates and their multiples, as far as an epoch ends there; within epochs, `train`
    asks `falls_on` of its own. Raises ValueError when `every` is below 1, OSError for a file that cannot be written.
    """

    needs_weights = False

    def __init__(
        self,
        filename: str | os.PathLike[str],
        every: int | None = None,
        every_steps: int | None = None,
        notice: Callable[[str], object] = warnings.warn,
        keeps: bool = True,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; give the epochs between checkpoints, at least 1")
        self.path = npz_path(filename)
        self.every, self.every_steps, self.notice, self.keeps = every, every_steps, notice, keeps
        self.written: Path | None = None  # of this run
        self._left: Mark | None = None
        self._shared = False  # whether another run was seen to write there

    def on_epoch(self, state: TrainState) -> None:
        """Saves where that is due."""
        due = state.evaluated if self.every is None else (state.epoch + 1) % self.every == 0
        if due or state.last or state.stop or self.falls_on(state.steps):
            self.write(state)

    def falls_on(self, steps: int) -> bool:
        """Whether `every_steps` asks for a checkpoint after so many updates."""
        return self.every_steps is not None and steps % self.every_steps == 0

    def write(self, state: TrainState) -> None:
        """Saves now."""
        found, own = mark(self.path), self.written
        ours = found is not None and own is not None and own.exists() and own.samefile(self.path)
        changed = ours and self._left not in (None, found)
        if self.keeps and found is not None and (changed or not ours):
            previous = self.path.with_name(f"{self.path.stem.removesuffix('_latest')}_previous.npz")
            keep_copy(self.path, previous)
            if not changed:
                self.notice(f"{self.path} was of another run, which is kept as {previous}")
            elif not self._shared:
                told = f"{self.path} is written by something else too, whose last one is kept as {previous}"
                self.notice(f"{told}: give each run a save_dir or model_name of its own")
            self._shared = changed
        self.written = state.save(self.path)
        self._left = mark(self.path)


class Watchers:
    """The callbacks of a run, in the order in which they look: early stopping first, checkpoints last.

    `callbacks`, `early_stopping`: as for `train`; `checkpointing`: None where nothing is saved. Raises TypeError for
    what is no callback, ValueError where early stopping is asked for twice.
    """

    def __init__(
        self, callbacks: Sequence[Callback], early_stopping: int | None, checkpointing: Checkpointing | None
    ) -> None:
        self.callbacks: list[Callback] = list(callbacks or ())
        for callback in self.callbacks:
            if not callable(getattr(callback, "on_epoch", None)):
                raise TypeError(f"callbacks holds {callback!r}; each must have a method on_epoch(state)")
        given = next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)
        if early_stopping is not None and given is not None:
            raise ValueError("early_stopping is given, and an EarlyStopping among the callbacks; pass one of them")
        self.need_weights = any(getattr(callback, "needs_weights", True) for callback in self.callbacks)
        self.early_stopping = given
        if early_stopping is not None:
            self.early_stopping = EarlyStopping(early_stopping)
            self.callbacks.insert(0, self.early_stopping)
        self.checkpointing = checkpointing

    def on_epoch(self, state: TrainState, agree: Callable[[bool], bool]) -> None:
        """Lets all of them look; `agree`: whether any rank asks to stop. The checkpoint sees whether one did."""
        for callback in self.callbacks:
            callback.on_epoch(state)
        state.stop = agree(state.stop)
        if self.checkpointing is not None:
            self.checkpointing.on_epoch(state)

    def on_end(self, state: TrainState) -> list[Exception]:
        """Calls `on_end` of all that have it, whatever one of them raises; what they raised."""
        errors = []
        for callback in self.callbacks:
            try:
                if hasattr(callback, "on_end"):
                    callback.on_end(state)
            except Exception as error:
                errors.append(error)
        return errors


def _buffers(like: Mapping[str, Array]) -> Mapping[str, Array]:
    """Zeros of the same names, shapes, dtypes and device."""
    if isinstance(like, Parameters):
        return like.zeros_like()
    return {name: backend_of(x).xp.zeros_like(x) for name, x in like.items()}


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


def _append(path: Path, content: bytes, left: Mark | None) -> Mark | None:
    """Adds to a file all of the content, or nothing; it is closed then, so that others may read it.

    `left`: its mark, as this run left it. Returns the new one; None where another file stands there, which is left so.
    """
    with open(path, "ab", buffering=0) as file:
        if mark(file.fileno()) != left:
            return None
        size = os.fstat(file.fileno()).st_size
        done = 0
        try:
            while done < len(content):  # a full disk takes a part, and tells at the next attempt
                done += file.write(content[done:])
        except OSError:
            with suppress(OSError):  # the error that counts is the first
                file.truncate(size)
            raise
        return mark(file.fileno())


class CsvLog:
    """Writes `History.to_csv` as the run goes: the columns' names first, then a row after each epoch.

    `filename`: replaced when the run begins; its folder is made. A resumed run writes the epochs before it too, each
    once, whatever stood there. Where something else writes there meanwhile, the file is replaced again. Raises OSError.
    """

    needs_weights = False

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.path = Path(filename)
        self._rows: int | None = None  # in the file; None: it is not this run's yet
        self._left: Mark | None = None  # of the file

    def on_epoch(self, state: TrainState) -> None:
        """Adds what the history has and the file has not."""
        history = state.history
        with history.stage("save"):
            if self._rows is not None:
                rows = [history.csv_row(k) for k in range(self._rows, len(history.epoch))]
                with _named(self.path):
                    # Both at once: an interruption between them would have the rows written again.
                    self._left, self._rows = _append(self.path, "".join(rows).encode(), self._left), len(history.epoch)
            if self._left is None:  # it is not this run's yet, or no longer
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._left = write_whole(self.path, lambda file: file.write(history.to_csv().encode()))
                self._rows = len(history.epoch)

    def on_end(self, state: TrainState) -> None:
        """Makes ready for another run; one with nothing left to train leaves its file too."""
        if self._rows is None and state.history.epoch:
            self.on_epoch(state)
        self._rows = self._left = None


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
        self._ahead = 0.0  # of wall time before the steady clock, when the file was opened
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
        # The time makes the name its own, also within a second, and keeps the order in which readers take files; where
        # the clock was set back, the name of the last file does, as the beginning of this one's.
        now, last = time.time_ns(), max((file.name for file in self.folder.glob("*.tfevents.*")), default="")
        soonest = f"events.out.tfevents.{now // 10**9}"
        prefix = last if last[: len(soonest)] > soonest else "events"
        self._writer = self._make_writer(str(self.folder / prefix), f".{now}")
        self._ahead = now / 1e9 - time.perf_counter()
        self._written = (0, 0, 0)
        # A start at step 0 tells readers to drop what earlier files have from there on.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.write_event(self._events.Event(wall_time=self._now(), step=0, session_log=start))
        table = "".join(f"| {name} | {str(value).replace('|', '&#124;')} |\n" for name, value in history.run.items())
        self._event(self._now(), 0, self._make_text("run", f"| setting | value |\n|---|---|\n{table}"))

    def _now(self) -> float:
        """Wall time that does not leap while the file is open, whatever is done to the clock."""
        return self._ahead + time.perf_counter()

    def _write(self, history: History) -> None:
        epochs, evaluations, steps = self._written
        now, seconds = self._now(), history.seconds[epochs:]
        ends = list(accumulate(seconds, initial=now - sum(seconds)))[1:]  # wall time after each epoch from there on
        for k, end in enumerate(ends, start=epochs):
            values = {tag: getattr(history, name)[k] for tag, name in TAGS_BY_EPOCH.items()}
            self._scalars(end, history.epoch[k], values)
        for k in range(evaluations, len(history.eval_epoch)):
            epoch = history.eval_epoch[k]
            lists = {tag: getattr(history, name) for tag, name in TAGS_BY_EVALUATION.items()}
            values = {tag: values[k] for tag, values in lists.items() if values}
            self._scalars(ends[max(0, bisect_left(history.epoch, epoch) - epochs)], epoch, values)
        if history.epoch:
            stages = {f"stages/{stage}": spent for stage, spent in history.timings.items()}
            self._scalars(now, history.epoch[-1], stages)
        losses = history.mini_batch_loss
        for k in range(steps, len(losses)):
            at = max(0, k * len(history.epoch) // len(losses) - epochs)
            self._scalars(ends[at], k + 1, {"loss/mini_batch_loss": losses[k]})
        self._written = len(history.epoch), len(history.eval_epoch), len(losses)

    def _scalars(self, wall_time: float, step: int, values: dict[str, float]) -> None:
        made = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._event(wall_time, step, self._summaries.Summary(value=made))

    def _event(self, wall_time: float, step: int, summary: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=wall_time, step=step, summary=summary))
