"""What the suites share: the devices, the number of threads, a cache folder of their own, and a look at other programs.

    pip install -e ".[bench,fast]" && pytest benchmarks --benchmark-json out.json

Each suite checks that results agree before it times anything. What cannot run here is skipped, with the reason. Let
nothing else run meanwhile: one more busy program makes threads that wait for one another ten times slower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catopt_xp import Backend, DeviceError, device_report, get_backend
from catopt_xp.backend.machine import thread_count

STATISTICS = Path("/proc/stat")  # of the system; on Linux alone
DISTURBED = 0.25  # processors busy with other programs
disturbed_tests = pytest.StashKey[list[str]]()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds to the JSON what this library knows of the machine."""
    machine_info |= {"devices": device_report().to_dict(), "threads": thread_count()}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[disturbed_tests] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    names = config.stash[disturbed_tests]
    if names:
        terminalreporter.section("disturbed", yellow=True)
        terminalreporter.line(f"Other programs were busy during {len(names)} benchmarks, whose times say little:")
        terminalreporter.line(", ".join(names))


@pytest.fixture(autouse=True)
def busy_elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Notes in `extra_info` how many processors worked for other programs, and keeps the test's name if many did."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    start, others = time.perf_counter(), seconds_elsewhere()
    yield
    if benchmark is None or others is None:
        return
    busy = ((seconds_elsewhere() or 0.0) - others) / (time.perf_counter() - start)
    benchmark.extra_info["processors_busy_elsewhere"] = round(max(0.0, busy), 2)
    if busy > DISTURBED:
        request.config.stash[disturbed_tests].append(request.node.name)


def seconds_elsewhere() -> float | None:
    """Processor seconds of all programs but this one and those it started; None where the system does not tell."""
    if not STATISTICS.exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, STATISTICS.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data cache lies in a temporary folder: benchmarks neither read nor fill the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATOPT_XP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def threads() -> int:
    """Threads that ours and every peer may use."""
    return thread_count()


@pytest.fixture(scope="session")
def gpu() -> Backend:
    """The GPU; without a usable one a test is skipped, with the cause that the probe found."""
    try:
        return get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each device in turn."""
    if request.param == "cpu":
        return get_backend("cpu")
    found: Backend = request.getfixturevalue("gpu")
    return found
