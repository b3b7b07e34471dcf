"""Shared fixtures: the backends that every formula is tested on, and a cache folder of our own."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cupy_stand_in import FakeCupy
from hypothesis import settings

from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import Backend, NumpyBackend, get_backend
from catopt_xp.engines import choose
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import PlainEngine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background: tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: a loaded machine is no failure. In CI every run has the same examples. `--hypothesis-profile=many` draws
# more of them; where a test has a number of its own, as many.
settings.register_profile("local", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True, database=None)
settings.register_profile("many", deadline=None, max_examples=300)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


# What a run leaves out unless `-m` names it.
LEFT_OUT = ("kernels", "hardening", "long")
DESELECTED = pytest.StashKey[Counter[str]]()


def is_left_out(item: pytest.Item, expression: str) -> bool:
    """Long tests run only where `-m` says long, other marked ones where it says one of their marks."""
    marks = {mark.name for mark in item.iter_markers()}
    wanted = {mark for mark in marks & {*LEFT_OUT, "gpu"} if mark in expression}
    return ("long" in marks and "long" not in wanted) or (bool(marks & set(LEFT_OUT)) and not wanted)


@pytest.hookimpl(trylast=True)  # behind -k and -m, so that what these leave out is not counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item, config.option.markexpr)]
    if not left_out:
        return
    items[:] = [item for item in items if not is_left_out(item, config.option.markexpr)]
    config.hook.pytest_deselected(items=left_out)
    marks = Counter(next(mark for mark in reversed(LEFT_OUT) if item.get_closest_marker(mark)) for item in left_out)
    config.stash[DESELECTED] = marks
    if hasattr(config, "workeroutput"):
        config.workeroutput["deselected"] = dict(marks)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Each worker of pytest-xdist collects all tests and tells what it left out: the last one's word stands."""
    if told := getattr(node, "workeroutput", {}).get("deselected"):
        node.config.stash[DESELECTED] = Counter(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if marks := config.stash.get(DESELECTED, None):
        counts = ", ".join(f"{marks[mark]} {mark}" for mark in LEFT_OUT if marks[mark])
        terminalreporter.write_line(
            f"deselected: {counts} (`-m MARK` runs them, `pytest --markers` says what they are)"
        )


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data cache lies in a temporary folder: tests neither read nor fill the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATOPT_XP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def strict_backend() -> Backend:
    """The portable backend over array_api_strict, on a device whose arrays NumPy cannot take by accident."""
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    return Backend(xp, name="strict", device=xp.Device("device1"))


@pytest.fixture(scope="session", params=["numpy", "strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; without a usable GPU "cuda" is skipped, with the cause."""
    if request.param == "numpy":
        return NumpyBackend()
    if request.param == "strict":
        strict: Backend = request.getfixturevalue("strict_backend")
        return strict
    try:
        return get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """The stand-in for CuPy, also where ``import cupy`` finds it."""
    module = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`crash_after(n, action)` calls `action` once a run has done n updates, before anything is saved."""
    whole = {kind: kind.steps for kind in (PlainEngine, PanelEngine)}

    def install(updates: int, action: Callable[[], None]) -> None:
        count = 0

        def counted(engine: PlainEngine, *arguments: Any) -> Any:
            nonlocal count
            for done in whole[type(engine)](engine, *arguments):
                count += 1
                if count == updates:
                    action()
                yield done

        for kind in whole:
            monkeypatch.setattr(kind, "steps", counted)

    return install


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No earlier check of an engine is remembered, and none made here is kept."""
    choose._check.cache_clear()
    yield
    choose._check.cache_clear()
