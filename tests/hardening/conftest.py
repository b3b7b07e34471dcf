"""The long tests of this folder run when asked for; each leaves a record of what it did."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from catopt_xp.files import write_whole
from catopt_xp.machine import cpu_model

RESULTS = Path(__file__).parent / "results"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests are skipped, with the reason, unless `-m` names them."""
    if "long" in config.option.markexpr:
        return
    reason = "long: `pytest tests/hardening -m long` runs it, tests/hardening/README.md has its last full run"
    for item in items:
        if item.get_closest_marker("long") and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(tried=200, broke=0, ...)` writes what a long test found to results/, beside when and where it ran."""
    started = time.time()

    def write(**found: object) -> None:
        where = {
            "test": request.node.nodeid,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.time() - started, 1),
            "processor": cpu_model(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        name = re.sub(r"\W+", "_", request.node.name).strip("_")
        text = json.dumps(where | found, indent=2) + "\n"
        write_whole(RESULTS / f"{name}.json", lambda file: file.write(text.encode()))

    return write
