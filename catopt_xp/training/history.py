"""What a run leaves: lists by epoch, the mini-batch losses, where the time went. Reads and writes JSON and CSV."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.io.console import plain
from catopt_xp.io.files import write_whole
from catopt_xp.training.plots import plot_history
from catopt_xp.training.record import BY_EPOCH, BY_EVALUATION, check_history

STAGES = ("read", "decode", "move", "train", "wait", "evaluate", "save")
COLUMNS = ("epoch", *BY_EPOCH, *BY_EVALUATION)  # of the CSV


@dataclass
class History:
    """Lists by epoch; epochs count from 0.

    Each epoch: `epoch`, `learning_rate` (at its start), `seconds` (of training alone), `train_loss` (mean of the
    mini-batch losses, each weighed by its length). Each evaluated epoch: `eval_epoch`, `train_accuracy`,
    `full_train_loss` (over the whole set, after the epoch's pass), and `dev_loss`, `dev_accuracy` where there is a dev
    set. `mini_batch_loss`: every step's. `timings`: seconds by stage (wait: training that waited for rows of a streamed
    set, which `seconds` contain; save: checkpoints and logs). `run`: how it was trained.

    >>> history = History(epoch=[0], train_loss=[0.7])
    >>> History.from_json(history.to_json()) == history
    True
    """

    epoch: list[int] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    eval_epoch: list[int] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    full_train_loss: list[float] = field(default_factory=list)
    dev_loss: list[float] = field(default_factory=list)
    dev_accuracy: list[float] = field(default_factory=list)
    mini_batch_loss: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    run: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.timings = dict.fromkeys(STAGES, 0.0) | self.timings  # a file may be older than a stage

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The history as JSON text; with `path` also written there, whole or not at all. Raises OSError."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        if path is not None:
            write_whole(Path(path), lambda file: file.write(text.encode()))
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> History:
        """A history from JSON text, or from a file. Raises ValueError naming what in it is foreign or does not fit."""
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        where = "history" if is_text else str(source)
        if not is_text:
            _check_file(Path(source))
        try:
            data = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); give a history as train wrote it") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not known >= set(data):
            foreign = sorted(set(data) - known) if isinstance(data, dict) else [type(data).__name__]
            raise ValueError(f"{where} is not a history: unknown {plain(', '.join(foreign))}")
        check_history(data, where)
        return cls(**data)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """What is listed by epoch as CSV text, a row an epoch; with `path` also written there, whole or not at all.

        The first line names the columns; costs and accuracies of an epoch that was not evaluated are left empty.
        Raises OSError.

        >>> print(History(epoch=[0], train_loss=[0.7]).to_csv(), end="")
        epoch,learning_rate,seconds,train_loss,train_accuracy,full_train_loss,dev_loss,dev_accuracy
        0,,,0.7,,,,
        """
        text = "".join([f"{','.join(COLUMNS)}\n", *(self.csv_row(k) for k in range(len(self.epoch)))])
        if path is not None:
            write_whole(Path(path), lambda file: file.write(text.encode()))
        return text

    def csv_row(self, k: int) -> str:
        """The line of `to_csv` for `epoch[k]`, with its end."""
        at = bisect_left(self.eval_epoch, self.epoch[k])
        evaluated = at < len(self.eval_epoch) and self.eval_epoch[at] == self.epoch[k]
        row = [self.epoch[k], *(getattr(self, name)[k] if getattr(self, name) else "" for name in BY_EPOCH)]
        row += [getattr(self, name)[at] if evaluated and getattr(self, name) else "" for name in BY_EVALUATION]
        return f"{','.join(map(str, row))}\n"

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> History:
        """A history from a file of `to_csv`, also while it grows: a last row that is not whole yet is left out.

        What is not listed by epoch is empty. Raises ValueError naming what does not fit, OSError.
        """
        _check_file(Path(path))
        try:
            head, *rows = Path(path).read_text(encoding="utf-8").split("\n")[:-1] or [""]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text ({error}); give a CSV as train wrote it") from error
        if head != ",".join(COLUMNS):
            raise ValueError(f"{path} does not begin with the line {','.join(COLUMNS)}; give a CSV as train wrote it")
        data: dict[str, Any] = {"eval_epoch": [], **{name: [] for name in COLUMNS}}
        for number, row in enumerate(rows, start=2):
            values = dict(zip(COLUMNS, row.split(","), strict=False))
            try:
                data["epoch"].append(int(values["epoch"]))
                if any(values[name] for name in BY_EVALUATION):
                    data["eval_epoch"].append(data["epoch"][-1])
                for name in (*BY_EPOCH, *BY_EVALUATION):
                    data[name] += [float(values[name])] if values[name] else []
            except (KeyError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}, line {number} is no row of a history: {row!r}") from error
        check_history(data, str(path))
        return cls(**data)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds that are spent within to those of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] += time.perf_counter() - started

    def add_epoch(
        self, epoch: int, learning_rate: float, losses: NDArray[Any], sizes: Sequence[float], seconds: float
    ) -> None:
        """Adds an epoch: its mini-batch losses, what each weighs (its samples), and the seconds that it trained."""
        self.epoch.append(epoch)
        self.learning_rate.append(learning_rate)
        self.seconds.append(seconds)
        self.train_loss.append(float(np.average(losses.astype(np.float64), weights=sizes)))
        self.mini_batch_loss.extend(losses.tolist())
        self.timings["train"] += seconds

    def add_evaluation(self, epoch: int, train: tuple[float, float], dev: tuple[float, float] | None) -> None:
        """Adds accuracy and loss over the training set, and over the dev set where there is one."""
        self.eval_epoch.append(epoch)
        self.train_accuracy.append(train[0])
        self.full_train_loss.append(train[1])
        if dev is not None:
            self.dev_accuracy.append(dev[0])
            self.dev_loss.append(dev[1])

    def add_timings(self, timings: Mapping[str, float]) -> None:
        """Adds seconds by stage."""
        for stage, seconds in timings.items():
            self.timings[stage] += seconds

    def add_wait(self, seconds: float) -> None:
        """Counts seconds that steps waited for rows as waiting, not as training."""
        self.timings["wait"] += seconds
        self.timings["train"] -= seconds

    def fit_dev_set(self, has: bool) -> bool:
        """Makes the lists fit a run that goes on with a dev set, or without one; whether that changed them."""
        if has == bool(self.dev_loss) or not self.eval_epoch:
            return False
        unknown = [math.nan] * len(self.eval_epoch) if has else []
        self.dev_loss, self.dev_accuracy = list(unknown), list(unknown)
        return True

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure of the run (matplotlib); with `path` also saved there as PNG. See `plots.plot_history`."""
        return plot_history(dataclasses.asdict(self), path)

    def time_table(self, resumed: bool = False) -> str:
        """Where the time went, one line a stage; `resumed`: the sums include what came before, which is said."""
        total = sum(self.timings.values()) or 1.0
        rows = [f"  {stage:<9}{seconds:9.2f} s  {seconds / total:5.1%}" for stage, seconds in self.timings.items()]
        return "\n".join([f"time by stage{', before the resumption too' * resumed}:", *rows])


def _check_file(path: Path) -> None:
    """Reading a pipe would wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is no file but a pipe or a device; give a history as train wrote it")
