"""The training loop: epochs, evaluation, checkpoints, interruption, resumption.

`run_epochs` is the loop that `train` and the estimators share. `Loop` is a run of `train` around it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.ranks import Ranks
from catopt_xp.data.place import Sets
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.io.console import Bar, Signals, warn
from catopt_xp.training.callbacks import TrainState, Watchers
from catopt_xp.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunState,
    changes,
    environment,
    npz_path,
    save_run,
)
from catopt_xp.training.history import History
from catopt_xp.training.report import Report
from catopt_xp.training.setup import Learner

Rows = NDArray[np.int64]


class TrainingDiverged(FloatingPointError):
    """A mini-batch loss is NaN or infinite; the message names epoch, step, learning rate and the last checkpoint.

    `history`: of the epochs before.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the run saved.

    `checkpoint`: the file, or None; `epoch`: epochs that are whole; `history`: of what was trained.
    """

    def __init__(self, message: str, checkpoint: Path | None, epoch: int, history: History) -> None:
        super().__init__(message)
        self.checkpoint, self.epoch, self.history = checkpoint, epoch, history


class Epoch(NamedTuple):
    """An epoch that has ended: its number, the learning rate at its start, and its mini-batch losses (batches,)."""

    number: int
    learning_rate: float
    losses: NDArray[Any]


def run_epochs(
    engine: PlainEngine,
    rows: Callable[[int], Rows],
    start: int,
    stop: int,
    first: int = 0,
    steps: Callable[..., Iterator[int]] | None = None,
    after_step: Callable[[int, int, float], None] = lambda epoch, done, learning_rate: None,
    checked: Callable[[Epoch], Epoch] = lambda epoch: epoch,
) -> Iterator[Epoch]:
    """Makes the steps of the epochs `start … stop - 1`, and yields each epoch when it has ended.

    `rows`: gives an epoch's order, asked once for each, one epoch ahead; `first`: batches of epoch `start` that are
    done already; `steps`: makes the steps of an epoch (None: the engine does); `after_step(epoch, done,
    learning_rate)` is called after every update, when `done` batches of the epoch are done; `checked` looks at an epoch
    that has ended before the optimizer counts it, and answers what is yielded.
    """
    steps = steps or engine.steps
    orders: Iterator[Rows | None] = chain(map(rows, range(start, stop)), [None])
    for epoch, (order, following) in zip(range(start, stop), pairwise(orders), strict=True):
        assert order is not None
        engine.optimizer.epoch = epoch
        learning_rate = engine.optimizer.learning_rate
        for done in steps(epoch, order, first, following):
            after_step(epoch, done, learning_rate)
        ended, first = checked(Epoch(epoch, learning_rate, engine.fetch_losses())), 0
        engine.optimizer.increase_epoch()
        yield ended


class Loop:
    """One run of training, from a checkpoint or from the start.

    `engine`: makes the steps; `sets`: what it trains on; `learner`: the model and optimizer that it trains, and the
    caller's; `watchers`: the callbacks; `described`: how the run is described in its history; `report`: what is said.
    """

    def __init__(
        self,
        engine: PlainEngine,
        sets: Sets,
        learner: Learner,
        watchers: Watchers,
        described: dict[str, Any],
        report: Report,
        ranks: Ranks,
    ) -> None:
        self.engine, self.sets, self.learner, self.watchers = engine, sets, learner, watchers
        self.described, self.report, self.ranks = described, report, ranks
        self.history = History()
        self.position = RunState()
        self.checkpoint: Path | None = None
        self.environment = environment(engine.backend, engine.name, engine.versions())
        # By any rank: all gather them then.
        self.weights_are_read = ranks.any(watchers.need_weights)
        self._started = 0.0  # when the present epoch began, had it begun in one go

    def run(
        self, checkpoint: Checkpoint | None, total_epoch: int, print_interval: int, progress: bool | None
    ) -> History:
        """Trains up to `total_epoch`; the caller's model and optimizer carry the values however it ends.

        `checkpoint`: where to go on from; `print_interval`: epochs between evaluations; `progress`: a bar (None: when
        the terminal shows one). Raises TrainingDiverged, Interrupted, CheckpointError, OSError.
        """
        stopping = self.watchers.early_stopping
        with _ends_all(self.ranks), self.engine.backend.activate(), self.sets:
            try:
                if stopping is not None:
                    stopping.reset()
                if checkpoint is not None:
                    with self.ranks.agreed():
                        self._resume(checkpoint)
                self.history.run = self.described
                # An overflow ends in a loss that is not finite, which is said with its epoch and step.
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"), self._ended():
                    with Signals() as signals, _ends_all(self.ranks):
                        self._epochs(signals, total_epoch, print_interval, progress)
                    self.engine.settle()
                    if stopping is not None and stopping.best is not None:
                        self.engine.model.load(stopping.best)
                        self.report.say(f"the weights of epoch {stopping.best_epoch} were put back (early stopping)")
            finally:
                self.engine.settle()
                self.learner.copy_back()
        return self.history

    # --- epochs ---------------------------------------------------------------------------------------------------

    def _epochs(self, signals: Signals, end: int, print_interval: int, progress: bool | None) -> None:
        start, stopping = self.position.epoch, self.watchers.early_stopping
        if start >= end:
            self.report.notice(f"epoch {start} of {end} is reached already: nothing is left to train")
        elif stopping is not None and stopping.exhausted:
            self.report.notice(f"early stopping ended this run after epoch {start - 1}: nothing is left to train")
            return
        terminal = sys.stderr is not None and sys.stderr.isatty()
        shown = terminal if progress is None else progress
        with Bar(total=end, initial=min(start, end), unit="epoch", disable=not shown, leave=False) as bar:
            epochs = run_epochs(
                self.engine,
                self.sets.rows,
                start,
                end,
                self.position.batches,
                self._steps,
                partial(self._after_step, signals),
                self._checked,
            )
            for epoch in epochs:
                self._record(epoch)
                last = epoch.number == end - 1
                evaluated = epoch.number % print_interval == 0 or last
                if evaluated:
                    self._evaluate(epoch)
                bar.update()
                if self._is_over(epoch.number, evaluated, last, signals):
                    break

    def _is_over(self, epoch: int, evaluated: bool, last: bool, signals: Signals) -> bool:
        """Lets the callbacks look; whether one of them ends the run. Raises Interrupted where a signal came."""
        state = self._state(epoch, evaluated)
        if evaluated or self.weights_are_read:
            self.engine.settle()
        received = self.ranks.any(signals.received)
        state.last = last or received
        self.watchers.on_epoch(state, self.ranks.any)
        # A signal that comes while the checkpoint is being written is for the next step.
        if received or (self.watchers.checkpointing is None and self.ranks.any(signals.received)):
            self._interrupt()
        if state.stop:
            self.report.say(f"stopped after epoch {epoch}, as a callback asked")
        return state.stop

    def _steps(self, *asked: Any) -> Iterator[int]:
        """The steps of an epoch; its seconds count from here, or go on where a checkpoint left them."""
        self._started = time.perf_counter() - self.position.seconds
        stream = self.sets.stream
        return self.engine.steps(*asked) if stream is None else stream.steps(self.engine, *asked)

    def _after_step(self, signals: Signals, epoch: int, done: int, learning_rate: float) -> None:
        """Saves the run within an epoch where that is due, or where a signal ends it."""
        saving = self.watchers.checkpointing
        due = saving is not None and saving.falls_on(self._updates(epoch, done))
        stopped = self.engine.stops(signals.received)
        if not (stopped or due) or done == self.engine.batches:
            return
        losses, before = self._with_earlier(self.engine.fetch_losses())[:done], time.perf_counter()
        self._record_waiting()
        self._check_losses(epoch, learning_rate, losses)
        self.position = RunState(epoch=epoch, batches=done, seconds=before - self._started, losses=losses)
        if saving is not None:
            saving.write(self._state(epoch, evaluated=False))
        self._started += time.perf_counter() - before  # saving is no training
        if stopped:
            self._interrupt()

    def _record(self, epoch: Epoch) -> None:
        """Writes an epoch into the history."""
        seconds = time.perf_counter() - self._started
        self.position = RunState(epoch=epoch.number + 1)
        self.history.add_epoch(epoch.number, epoch.learning_rate, epoch.losses, self.engine.sizes, seconds)
        self._record_waiting()

    def _checked(self, epoch: Epoch) -> Epoch:
        """The epoch with its losses from before a resumption. Raises TrainingDiverged where one is not finite."""
        losses = self._with_earlier(epoch.losses)
        self._check_losses(epoch.number, epoch.learning_rate, losses)
        return epoch._replace(losses=losses)

    def _record_waiting(self) -> None:
        if self.sets.stream is not None:
            self.history.add_wait(self.sets.stream.take_waited())

    def _with_earlier(self, losses: NDArray[Any]) -> NDArray[Any]:
        """This epoch's losses, those from before a resumption included."""
        self.ranks.check_same(losses.tobytes(), f"losses in epoch {self.position.epoch}")
        if self.position.batches:
            losses[: self.position.batches] = self.position.losses
        return losses

    def _check_losses(self, epoch: int, learning_rate: float, losses: NDArray[Any]) -> None:
        if not np.isfinite(losses).all():
            step = int(np.argmin(np.isfinite(losses)))
            raise self._diverged(f"the loss is {losses[step]} at epoch {epoch}, step {step}", learning_rate)

    def _diverged(self, what: str, learning_rate: float) -> TrainingDiverged:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "this run has saved none yet"
        return TrainingDiverged(
            f"{what} (learning rate {learning_rate:g}): lower it, set clip_norm, or scale X; {kept}", self.history
        )

    def _evaluate(self, epoch: Epoch) -> None:
        """Accuracy and loss over the whole sets, recorded and said."""
        with self.history.stage("evaluate"):
            accuracy, loss = self.ranks.from_first(
                self.engine.evaluate(*self.sets.train.whole, self.engine.device_weights)
            )
            if not np.isfinite(loss):  # an epoch's last update is seen by no mini-batch loss of it
                raise self._diverged(f"the cost is {loss} after epoch {epoch.number}", epoch.learning_rate)
            text, dev = f"epoch {epoch.number:4d}: cost {loss:.4f}, accuracy {accuracy:.1%}", None
            if self.sets.dev is not None:
                dev = self.ranks.from_first(self.engine.evaluate(*self.sets.dev.whole))
                text += f"; dev cost {dev[1]:.4f}, accuracy {dev[0]:.1%}"
            self.history.add_evaluation(epoch.number, (accuracy, loss), dev)
        self.report.say(f"{text}; {self.history.seconds[-1]:.3f} s")

    # --- what callbacks see -----------------------------------------------------------------------------------------

    def _updates(self, epoch: int, done: int) -> int:
        """Updates of the whole run, when `done` batches of this epoch are done."""
        together = self.engine.settings.accumulate
        return epoch * -(-self.engine.batches // together) + -(-done // together)

    def _state(self, epoch: int, evaluated: bool) -> TrainState:
        """What callbacks see at the end of this epoch, or within it."""
        engine, updates = self.engine, self._updates(self.position.epoch, self.position.batches)
        return TrainState(
            epoch, engine.model, engine.optimizer, self.history, evaluated, steps=updates, save=self._save
        )

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Calls `on_end` of the callbacks when training ends; the first exception is raised, others are warnings."""
        try:
            yield
        except BaseException:
            for error in self._end():
                warn(f"at the end of the run: {error}")
            raise
        errors = self._end()
        for error in errors[1:]:
            warn(f"at the end of the run: {error}")
        if errors:
            raise errors[0]

    def _end(self) -> list[Exception]:
        """Tells the callbacks that training has ended; what they raised."""
        if self.weights_are_read:
            self.engine.settle()
        state = self._state(self.position.epoch - 1, evaluated=False)
        state.last = True
        return self.watchers.on_end(state)

    # --- saving and resuming ------------------------------------------------------------------------------------

    def _save(self, filename: str | os.PathLike[str]) -> Path:
        """Writes model, optimizer and the place in the run; what callbacks have as `state.save`."""
        stopping, optimizer = self.watchers.early_stopping, self.engine.optimizer
        with self.history.stage("save"):
            self.engine.settle()
            history = dict(vars(self.history))
            place = self.position
            place.mini_batch_loss = np.asarray(history.pop("mini_batch_loss"), dtype=self.engine.loss_dtype)
            place.history = history
            place.environment = self.environment
            if stopping is not None and stopping.best is not None:
                place.early_stopping, place.best = stopping.save(), stopping.best
            try:
                with self.ranks.agreed():
                    self.checkpoint = npz_path(filename)
                    if self.ranks.rank == 0:
                        self.checkpoint = save_run(self.engine.model, optimizer, filename, place)
            except FloatingPointError as error:
                where = f"{error} at epoch {place.epoch}, step {place.batches}"
                raise self._diverged(where, optimizer.learning_rate) from error
        return self.checkpoint

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Takes weights, moments, history and place from the checkpoint; what differs from then is said."""
        place, stopping, timings = checkpoint.run_state(), self.watchers.early_stopping, self.history.timings
        self.history = checkpoint.history()
        self.history.add_timings(timings)
        self.report.notice(*changes(place, self.history.run, self.described, self.environment))
        model = self.engine.model
        checkpoint.load_into(model, self.engine.optimizer)
        if stopping is not None and place.early_stopping:
            try:
                stopping.load(place.early_stopping, place.best or {}, model.save())
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{checkpoint.path}: early stopping cannot go on ({error})") from error
        has_dev_set = self.sets.dev is not None
        if self.history.fit_dev_set(has_dev_set):
            told = "has a dev set, the checkpoint had none" if has_dev_set else "has no dev set, the checkpoint had one"
            self.report.notice(f"this run {told}: its costs before are {'unknown' if has_dev_set else 'dropped'}")
            if stopping is not None:
                stopping.reset()
                self.report.notice("early stopping begins anew, as it judges by other costs")
        self.position, self.checkpoint = place, npz_path(checkpoint.path)
        if self.watchers.checkpointing is not None:
            self.watchers.checkpointing.written = checkpoint.path
        self.report.notice(f"going on from {checkpoint.path}, at epoch {place.epoch}, batch {place.batches}")

    def _interrupt(self) -> None:
        where = f"epoch {self.position.epoch}, batch {self.position.batches}"
        how = f"; resume with recover_from={str(self.checkpoint)!r}" if self.checkpoint else "; nothing was saved"
        raise Interrupted(f"interrupted at {where}{how}", self.checkpoint, self.position.epoch, self.history)


@contextmanager
def _ends_all(ranks: Ranks) -> Iterator[None]:
    """A `with` block in which an error of one rank alone ends all: the others would wait for it."""
    try:
        yield
    except BaseException as error:
        alike = isinstance(error, TrainingDiverged | Interrupted) or ranks.is_agreed(error)
        if ranks.size > 1 and not alike:
            ranks.abort(error)
        raise
