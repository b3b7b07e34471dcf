"""What a run leaves: lists by epoch, the mini-batch losses, where the time went. Reads and writes JSON.

Floor F3.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catopt_xp.files import write_whole
from catopt_xp.plots import check_history, plot_history

STAGES = ("read", "decode", "move", "train", "evaluate", "save")


@dataclass
class History:
    """Lists by epoch; epochs count from 0.

    Each epoch: `epoch`, `learning_rate` (at its start), `seconds` (of training alone), `train_loss` (mean of the
    mini-batch losses, each weighed by its length). Each evaluated epoch: `eval_epoch`, `train_accuracy`,
    `full_train_loss` (over the whole set, after the epoch's pass), and `dev_loss`, `dev_accuracy` where there is a dev
    set. `mini_batch_loss`: every step's. `timings`: seconds by stage. `run`: how it was trained.

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
        try:
            data = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); give a history written by to_json") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not known >= set(data):
            foreign = sorted(set(data) - known) if isinstance(data, dict) else [type(data).__name__]
            raise ValueError(f"{where} is not a history: unknown {', '.join(foreign)}")
        check_history(data, where)
        return cls(**data)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure of the run (matplotlib); with `path` also saved there as PNG. See `plots.plot_history`."""
        return plot_history(dataclasses.asdict(self), path)

    def time_table(self) -> str:
        """Where the time went, one line a stage."""
        total = sum(self.timings.values()) or 1.0
        rows = [f"  {stage:<9}{seconds:9.2f} s  {seconds / total:5.1%}" for stage, seconds in self.timings.items()]
        return "\n".join(["time by stage:", *rows])
