"""What a run says while it goes on: one line at a time, and notices that its result keeps."""

from __future__ import annotations

import sys

from tqdm import tqdm

from catopt_xp.backend.machine import size_text
from catopt_xp.backend.xp import Backend
from catopt_xp.data.place import Sets
from catopt_xp.io.console import plain
from catopt_xp.version import __version__


class Report:
    """What is printed, where the run is `verbose`; `notices` are kept in any case."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.notices: list[str] = []
        self._announced = False

    def say(self, text: str) -> None:
        """Prints a line; a progress bar stays below it."""
        if self.verbose:
            tqdm.write(text)
            sys.stdout.flush()  # a log that is read while the run goes on

    def notice(self, *texts: str) -> None:
        """Keeps what the user should know; prints it, at once or behind the first lines of the run."""
        for text in texts:
            self.notices.append(text)
            if self._announced:
                self.say(f"note: {plain(text)}")

    def announce(self, backend: Backend, engine: str, reason: str, data: str, n_x: int, sets: Sets, ranks: int) -> None:
        """The first lines of a run: device, engine, data, and the notices so far."""
        self.say(f"catopt_xp {__version__} on {backend.device} ({backend.reason}), engine {engine} ({reason})")
        how, stream = f", spread over {ranks} ranks" if ranks > 1 else "", sets.stream
        if stream is not None:
            how = f", streamed in windows of {stream.window} rows ({size_text(stream.stored_bytes)} in memory)"
        self.say(f"data: {plain(data)}, {sets.train.m} samples of {n_x} features{how}")
        for notice in self.notices:
            self.say(f"note: {plain(notice)}")
        self._announced = True
