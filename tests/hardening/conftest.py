"""Every test of this folder is marked "hardening"; each long one leaves a record of what it did."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from catopt_xp.backend.machine import cpu_model
from catopt_xp.io.files import write_whole

if sys.platform != "win32":
    import fcntl

RESULTS = Path(__file__).parent / "results" / "long_tests.json"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("hardening")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(tried=200, broke=0, ...)` adds what a long test found to RESULTS, beside when and where it ran.

    Short forms leave no record.
    """
    started = time.time()

    def write(**found: object) -> None:
        if not request.node.get_closest_marker("long"):
            return
        where = {
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.time() - started, 1),
            "processor": cpu_model(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        test = request.node.nodeid.removeprefix("tests/hardening/")
        with alone():
            records = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            text = json.dumps(dict(sorted((records | {test: where | found}).items())), indent=2) + "\n"
            write_whole(RESULTS, lambda file: file.write(text.encode()))

    return write


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other worker of pytest-xdist records inside; on Windows, where folders are not locked, give it one worker."""
    if sys.platform == "win32":
        yield
        return
    lock = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
