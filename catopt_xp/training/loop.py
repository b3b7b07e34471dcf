"""The training loop: epochs, evaluation, checkpoints, interruption, resumption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import size_text
from catopt_xp.data.order import epoch_order, window_order
from catopt_xp.data.place import check_pools
from catopt_xp.data.stream import StreamedSet
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.io.console import Bar, Signals, plain
from catopt_xp.training.callbacks import Callback, Checkpointing, EarlyStopping, TrainState
from catopt_xp.training.checkpoint import CheckpointError, RunState, changes, environment, npz_path, save_run
from catopt_xp.training.history import History
from catopt_xp.training.plots import plot_mini_batch
from catopt_xp.training.setup import Job
from catopt_xp.version import __version__


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


class Run:
    """One run of training, from the job's checkpoint or from the start, to `total_epoch`."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, job.plan
        self.history = History()
        self.checkpoint: Path | None = None
        settings = Settings(
            job.batch_size,
            self.plan.drop_last,
            self.plan.accumulate,
            self.plan.schedule_by == "step",
            self.plan.checkpoint_every_steps,
            m=job.train_set.m,
        )
        samples, targets = job.train_set.samples, job.train_set.targets
        self.stream = job.train_set if isinstance(job.train_set, StreamedSet) else None
        parts = job.device_model, job.device_optimizer, samples, targets, job.backend, settings
        self.engine, self.engine_reason = choose_engine(self.plan.engine, *parts, job.ranks)
        check_pools(job.train_set, job.batch_size, self.engine.reach)
        self.callbacks: list[Callback] = list(self.plan.callbacks)
        needed = any(getattr(callback, "needs_weights", True) for callback in self.callbacks)
        self.weights_are_read = job.ranks.any(needed)  # by any rank: all gather them
        if self.plan.early_stopping is not None:
            self.callbacks.insert(0, EarlyStopping(self.plan.early_stopping))
        self.early_stopping = next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)
        self.checkpointing: Checkpointing | None = None
        if self.plan.checkpoint_path is not None:
            every, every_steps = self.plan.checkpoint_every, self.plan.checkpoint_every_steps
            keeps = job.ranks.rank == 0
            self.checkpointing = Checkpointing(self.plan.checkpoint_path, every, every_steps, self._notice, keeps)
        self.position = RunState()
        self.environment = environment(job.backend, self.engine.name, self.engine.versions())

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Run:
        """Trains to the end; the caller's model and optimizer carry the values however it ends."""
        dev_set = nullcontext() if self.job.dev_set is None else closing(self.job.dev_set)
        with self._together(), self.job.backend.activate(), closing(self.job.train_set), dev_set:
            self._check_same_arguments()
            with self.job.ranks.agreed():
                self._announce()
            self._train()
        draws = self.plan.plot_mini_batch and self.job.ranks.rank == 0
        if draws and self.plan.checkpoint_path is not None and self.history.mini_batch_loss:
            picture = self.plan.checkpoint_path.with_name(f"{self.plan.model_name}_mini_batch.png")
            plot_mini_batch(dataclasses.asdict(self.history), picture)
        self._say(self.history.time_table(resumed=self.job.checkpoint is not None))
        return self

    def _train(self) -> None:
        try:
            if self.early_stopping is not None:
                self.early_stopping.reset()
            if self.job.checkpoint is not None:
                with self.job.ranks.agreed():
                    self._resume()
            self.history.run = self._describe()
            for stage, seconds in self.job.timings.items():
                self.history.timings[stage] += seconds
            # An overflow ends in a loss that is not finite, which is said with its epoch and step.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"), self._ended():
                with Signals() as signals, self._together():
                    self._epochs(signals)
                self.engine.settle()
                if self.early_stopping is not None and self.early_stopping.best is not None:
                    self.job.device_model.load(self.early_stopping.best)
                    self._say(f"the weights of epoch {self.early_stopping.best_epoch} were put back (early stopping)")
        finally:
            self.engine.settle()
            self._copy_back()

    def _epochs(self, signals: Signals) -> None:
        start, end = self.position.epoch, self.plan.total_epoch
        if start >= end:
            self._notice(f"epoch {start} of {end} is reached already: nothing is left to train")
        elif self.early_stopping is not None and self.early_stopping.exhausted:
            self._notice(f"early stopping ended this run after epoch {start - 1}: nothing is left to train")
            return
        terminal = sys.stderr is not None and sys.stderr.isatty()
        shown = terminal if self.plan.progress is None else self.plan.progress
        with Bar(total=end, initial=min(start, end), unit="epoch", disable=not shown, leave=False) as bar:
            for epoch in range(start, end):
                self._epoch(epoch, signals)
                last = epoch == end - 1
                evaluated = epoch % self.plan.print_interval == 0 or last
                if evaluated:
                    self._evaluate(epoch)
                state = self._state(epoch, evaluated)
                if evaluated or self.weights_are_read:
                    self.engine.settle()
                received = self.job.ranks.any(signals.received)
                state.last = last or received
                for callback in self.callbacks:
                    callback.on_epoch(state)
                state.stop = self.job.ranks.any(state.stop)
                if self.checkpointing is not None:  # the last, so that it sees whether another ends the run
                    self.checkpointing.on_epoch(state)
                bar.update()
                # A signal that comes while the checkpoint is being written is for the next step.
                if received or (self.checkpointing is None and self.job.ranks.any(signals.received)):
                    self._interrupt()
                if state.stop:
                    self._say(f"stopped after epoch {epoch}, as a callback asked")
                    break

    def _epoch(self, epoch: int, signals: Signals) -> None:
        """One pass over the set, from wherever a checkpoint left it."""
        engine, optimizer, place, saving = self.engine, self.job.device_optimizer, self.position, self.checkpointing
        order, following = (self._order(e) if e < self.plan.total_epoch else None for e in (epoch, epoch + 1))
        assert order is not None
        optimizer.epoch = epoch
        learning_rate = optimizer.learning_rate
        started = time.perf_counter() - place.seconds
        asked = epoch, order, place.batches, following
        for done in engine.steps(*asked) if self.stream is None else self.stream.steps(engine, *asked):
            due = saving is not None and saving.falls_on(self._updates(epoch, done))
            stopped = engine.stops(signals.received)
            if (stopped or due) and done < engine.batches:
                losses, before = self._losses(place)[:done], time.perf_counter()
                self._record_waiting()
                self._check_losses(epoch, learning_rate, losses)
                self.position = RunState(epoch=epoch, batches=done, seconds=before - started, losses=losses)
                if saving is not None:
                    saving.write(self._state(epoch, evaluated=False))
                started += time.perf_counter() - before  # saving is no training
                if stopped:
                    self._interrupt()
        losses = self._losses(place)
        self._check_losses(epoch, learning_rate, losses)
        optimizer.increase_epoch()
        seconds = time.perf_counter() - started
        self.position = RunState(epoch=epoch + 1)
        self._record(epoch, learning_rate, losses, seconds)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Of the rows of `samples`, which are places where the set is streamed."""
        how = epoch, self.plan.seed, self.plan.shuffle
        if self.stream is not None:
            return self.stream.order(epoch)
        if self.job.window is not None:
            return window_order(self.engine.m, self.job.window, *how)
        return epoch_order(self.engine.m, *how)

    def _updates(self, epoch: int, done: int) -> int:
        """Those of the whole run, when `done` batches of this epoch are done."""
        together = self.plan.accumulate
        return epoch * -(-self.engine.batches // together) + -(-done // together)

    def _state(self, epoch: int, evaluated: bool) -> TrainState:
        """What callbacks see at the end of this epoch, or within it."""
        model, optimizer = self.job.device_model, self.job.device_optimizer
        updates = self._updates(self.position.epoch, self.position.batches)
        return TrainState(epoch, model, optimizer, self.history, evaluated, steps=updates, save=self._save)

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Calls `on_end` of the callbacks when training ends; the first exception is raised, others are warnings."""
        try:
            yield
        except BaseException:
            self._warn(self._end())
            raise
        errors = self._end()
        self._warn(errors[1:])
        if errors:
            raise errors[0]

    @staticmethod
    def _warn(errors: list[Exception]) -> None:
        for error in errors:
            warnings.warn(f"at the end of the run: {error}", stacklevel=2)

    def _end(self) -> list[Exception]:
        """Calls them all, whatever one of them raises; what they raised."""
        if self.weights_are_read:
            self.engine.settle()
        state, errors = self._state(self.position.epoch - 1, evaluated=False), []
        state.last = True
        for callback in self.callbacks:
            try:
                getattr(callback, "on_end", _do_nothing)(state)
            except Exception as error:
                errors.append(error)
        return errors

    def _check_same_arguments(self) -> None:
        """Ranks that were asked for other runs would wait for one another in other places."""
        plan = self.plan
        asked = plan.total_epoch, plan.checkpoint_every, plan.checkpoint_every_steps, plan.early_stopping
        told = json.dumps([self._describe(), *asked, plan.save_dir is None], default=repr)
        self.job.ranks.check_same(told.encode(), "arguments")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What ends this rank alone ends all: they would wait for it."""
        try:
            yield
        except BaseException as error:
            ranks = self.job.ranks
            alike = isinstance(error, TrainingDiverged | Interrupted) or ranks.is_agreed(error)
            if ranks.size > 1 and not alike:
                ranks.abort(error)
            raise

    def _losses(self, place: RunState) -> np.ndarray[Any, Any]:
        """This epoch's losses, those from before a resumption included."""
        losses = self.engine.fetch_losses()
        self.job.ranks.check_same(losses.tobytes(), f"losses in epoch {self.position.epoch}")
        if place.batches:
            losses[: place.batches] = place.losses
        return losses

    def _record(self, epoch: int, learning_rate: float, losses: np.ndarray[Any, Any], seconds: float) -> None:
        history = self.history
        history.epoch.append(epoch)
        history.learning_rate.append(learning_rate)
        history.seconds.append(seconds)
        history.train_loss.append(float(np.average(losses.astype(np.float64), weights=self.engine.lengths)))
        history.mini_batch_loss.extend(losses.tolist())
        history.timings["train"] += seconds
        self._record_waiting()

    def _record_waiting(self) -> None:
        """Moves the seconds that steps waited for rows from those of training, where they are counted too."""
        waited = 0.0 if self.stream is None else self.stream.take_waited()
        self.history.timings["wait"] += waited
        self.history.timings["train"] -= waited

    def _check_losses(self, epoch: int, learning_rate: float, losses: np.ndarray[Any, Any]) -> None:
        if np.isfinite(losses).all():
            return
        step = int(np.argmin(np.isfinite(losses)))
        raise self._diverged(f"the loss is {losses[step]} at epoch {epoch}, step {step}", learning_rate)

    def _diverged(self, what: str, learning_rate: float) -> TrainingDiverged:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "this run has saved none yet"
        return TrainingDiverged(
            f"{what} (learning rate {learning_rate:g}): lower it, set clip_norm, or scale X; {kept}", self.history
        )

    # --- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate(self, epoch: int) -> None:
        with self.history.stage("evaluate"):
            history, job = self.history, self.job
            accuracy, loss = job.ranks.from_first(self.engine.evaluate(*job.train_set.whole))
            if not np.isfinite(loss):  # an epoch's last update is seen by no mini-batch loss of it
                raise self._diverged(f"the cost is {loss} after epoch {epoch}", history.learning_rate[-1])
            history.eval_epoch.append(epoch)
            history.train_accuracy.append(accuracy)
            history.full_train_loss.append(loss)
            text = f"epoch {epoch:4d}: cost {loss:.4f}, accuracy {accuracy:.1%}"
            if job.dev_set is not None:
                accuracy, loss = job.ranks.from_first(self.engine.evaluate(*job.dev_set.whole))
                history.dev_accuracy.append(accuracy)
                history.dev_loss.append(loss)
                text += f"; dev cost {loss:.4f}, accuracy {accuracy:.1%}"
        self._say(f"{text}; {history.seconds[-1]:.3f} s")

    # --- saving and resuming ------------------------------------------------------------------------------------

    def _save(self, filename: str | os.PathLike[str]) -> Path:
        """Writes model, optimizer and the place in the run; what callbacks have as `state.save`."""
        with self.history.stage("save"):
            self.engine.settle()
            history = dict(vars(self.history))
            place = self.position
            place.mini_batch_loss = np.asarray(history.pop("mini_batch_loss"), dtype=self.engine.loss_dtype)
            place.history = history
            place.environment = self.environment
            if self.early_stopping is not None and self.early_stopping.best is not None:
                place.early_stopping, place.best = self.early_stopping.save(), self.early_stopping.best
            try:
                with self.job.ranks.agreed():
                    self.checkpoint = npz_path(filename)
                    if self.job.ranks.rank == 0:
                        self.checkpoint = save_run(self.job.device_model, self.job.device_optimizer, filename, place)
            except FloatingPointError as error:
                where = f"{error} at epoch {place.epoch}, step {place.batches}"
                raise self._diverged(where, self.job.device_optimizer.learning_rate) from error
        return self.checkpoint

    def _resume(self) -> None:
        """Takes weights, moments, history and place from the checkpoint; what differs from then is said."""
        checkpoint, job = self.job.checkpoint, self.job
        assert checkpoint is not None
        place = checkpoint.run_state()
        self.history = checkpoint.history()
        for text in changes(place, self.history.run, self._describe(), self.environment):
            self._notice(text)
        checkpoint.load_into(job.device_model, job.device_optimizer)
        if self.early_stopping is not None and place.early_stopping:
            try:
                self.early_stopping.load(place.early_stopping, place.best or {}, job.device_model.save())
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{checkpoint.path}: early stopping cannot go on ({error})") from error
        self._judge_by_what_there_is()
        self.position, self.checkpoint = place, npz_path(checkpoint.path)
        if self.checkpointing is not None:
            self.checkpointing.written = checkpoint.path
        self._notice(f"going on from {checkpoint.path}, at epoch {place.epoch}, batch {place.batches}")

    def _judge_by_what_there_is(self) -> None:
        """A dev set that is new, or gone, since the checkpoint: the history fits what follows."""
        history, has = self.history, self.job.dev_set is not None
        had = bool(history.dev_loss)
        if has == had or not history.eval_epoch:
            return
        unknown = [math.nan] * len(history.eval_epoch) if has else []
        history.dev_loss, history.dev_accuracy = list(unknown), list(unknown)
        told = "has a dev set, the checkpoint had none" if has else "has no dev set, the checkpoint had one"
        self._notice(f"this run {told}: its costs before are {'unknown' if has else 'dropped'}")
        if self.early_stopping is not None:
            self.early_stopping.reset()
            self._notice("early stopping begins anew, as it judges by other costs")

    def _interrupt(self) -> None:
        where = f"epoch {self.position.epoch}, batch {self.position.batches}"
        how = f"; resume with recover_from={str(self.checkpoint)!r}" if self.checkpoint else "; nothing was saved"
        raise Interrupted(f"interrupted at {where}{how}", self.checkpoint, self.position.epoch, self.history)

    def _copy_back(self) -> None:
        """Gives the caller's objects the values of those that trained."""
        job = self.job
        if job.device_model is not job.model:
            job.model.load(job.device_model.save())
            job.optimizer.load(job.device_optimizer.save())

    # --- what is said -------------------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        plan, job = self.plan, self.job
        return {
            "version": __version__,
            "device": job.backend.device,
            "engine": self.engine.name,
            "optimizer": type(job.optimizer).__name__,
            "options": job.optimizer.options,
            "model": job.model.architecture,
            "data": job.dataset.name,
            "classes": list(job.dataset.classes),
            "img_shape": None if job.dataset.img_shape is None else list(job.dataset.img_shape),
            "m": job.train_set.m,
            "n_x": job.n_x,
            "window": job.window,
            "batch_size": job.batch_size,
            "total_epoch": plan.total_epoch,
            "print_interval": plan.print_interval,
            "seed": int(plan.seed),
            "shuffle": plan.shuffle,
            "schedule_by": plan.schedule_by,
            "drop_last": plan.drop_last,
            "accumulate": plan.accumulate,
        }

    def _announce(self) -> None:
        device, reason = self.job.backend.device, self.job.backend.reason
        self._say(f"catopt_xp {__version__} on {device} ({reason}), engine {self.engine.name} ({self.engine_reason})")
        m, ranks, stream = self.job.train_set.m, self.job.ranks, self.stream
        how = f", spread over {ranks.size} ranks" if ranks.size > 1 else ""
        if stream is not None:
            how = f", streamed in windows of {stream.window} rows ({size_text(stream.stored_bytes)} in memory)"
        self._say(f"data: {plain(self.job.dataset.name)}, {m} samples of {self.job.n_x} features{how}")
        for notice in self.job.notices:
            self._say(f"note: {plain(notice)}")

    def _notice(self, text: str) -> None:
        self.job.notices.append(text)
        self._say(f"note: {plain(text)}")

    def _say(self, text: str) -> None:
        self.plan.say(text)


def _do_nothing(state: TrainState) -> None:
    """Stands in for the `on_end` that a callback does not have."""
