"""Which engine runs and why, the check that it passes first, and its compiled code on disk."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panel_runs import Case, python, train

from catopt_xp.backend.xp import Backend, NumpyBackend
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.cpu.upper_layers import Rest
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam

# --- which engine runs --------------------------------------------------------------------------------------

SMALL = Case(dtype="float32", n_x=70)
LAYERS, NAMES = [70, 3, 1], ["relu", "sigmoid"]


class OwnNetwork(DeepNetwork):
    pass


class OwnAdam(Adam):
    pass


def setting(**changes: Any) -> dict[str, Any]:
    """Arguments of `choose_engine` with which the panel engine can run, but for the changes.

    A change may be a function, which gets the model.
    """
    samples, targets = SMALL.data()
    model = changes.get("model") or DeepNetwork(LAYERS, NAMES)
    arguments = {
        "model": model,
        "optimizer": Adam(model.save(), 1e-3),
        "samples": samples,
        "targets": targets,
        "backend": NumpyBackend(),
        "settings": Settings(5),
    }
    return arguments | {k: v(model) if callable(v) else v for k, v in changes.items()}


# Other than numba's absence and another backend, which need preparations.
OBSTACLES: dict[str, dict[str, Any]] = {
    "the panel engine knows DeepNetwork, not OwnNetwork": {"model": OwnNetwork(LAYERS, NAMES)},
    "the panel engine does not know the rule of OwnAdam": {"optimizer": lambda model: OwnAdam(model.save(), 1e-3)},
    "the optimizer holds the parameters in a dict of its own, the panel engine needs model.save()": {
        "optimizer": lambda model: Adam(dict(model.save()), 1e-3)
    },
    "clip_norm needs the whole gradient, which the panel engine never forms": {
        "optimizer": lambda model: Adam(model.save(), 1e-3, clip_norm=1.0)
    },
    "accumulate needs the whole gradient, which the panel engine never forms": {"settings": Settings(5, accumulate=2)},
    "eps is below 1e-30": {"optimizer": lambda model: Adam(model.save(), 1e-3, eps=1e-31)},
    "the set is float32, the network float64": {
        "model": DeepNetwork(LAYERS, NAMES, dtype="float64"),
        "samples": np.zeros((13, 70), np.float32),
    },
    "the set's samples do not lie one after the other in memory, aligned and in this machine's byte order": {
        "samples": np.zeros((70, 13), np.float32).T
    },
}


def assert_refused(arguments: dict[str, Any], obstacle: str) -> None:
    """ "panels" is refused with the reason in one line, "auto" takes the plain engine and gives the same reason."""
    with pytest.raises(ValueError, match=re.escape(f'engine "panels" cannot run this: {obstacle}')) as caught:
        choose_engine("panels", **arguments)
    assert "\n" not in str(caught.value)
    chosen, why = choose_engine("auto", **arguments)
    assert (type(chosen), why) == (PlainEngine, obstacle)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_panels_cannot_run_goes_to_the_plain_engine(obstacle: str) -> None:
    assert_refused(setting(**OBSTACLES[obstacle]), obstacle)


def test_another_device_goes_to_the_plain_engine(strict_backend: Backend) -> None:
    samples, targets = (strict_backend.asarray(x) for x in SMALL.data())
    model = DeepNetwork(LAYERS, NAMES, device=strict_backend)
    arguments = setting(model=model, samples=samples, targets=targets, backend=strict_backend)
    assert_refused(arguments, f"the panel engine runs on a CPU or an NVIDIA GPU, not on {strict_backend.device}")


def first_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[0]


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_first_line_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = 'pip install "catopt-xp[fast]" brings a faster one'
    assert_refused(setting(), told)
    result = train(engine="auto", total_epoch=1, verbose=True)
    assert (result.engine, result.engine_reason) == ("plain", told)
    assert f"engine plain ({told})" in first_line(capsys)


def test_the_first_line_names_the_engine_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    train(total_epoch=1, verbose=True)
    assert "engine panels (as asked)" in first_line(capsys)
    train(engine="plain", total_epoch=1, verbose=True)
    assert "engine plain (as asked)" in first_line(capsys)
    result = train(engine="auto", optimizer_options={"clip_norm": 1.0}, total_epoch=1, verbose=True)
    assert result.engine == "plain"
    assert "engine plain (clip_norm needs the whole gradient" in first_line(capsys)


# --- the check of a process ---------------------------------------------------------------------------------


def altered(change: Callable[..., tuple[Any, ...]]) -> Callable[..., None]:
    """`PanelEngine._pass` with other arguments."""
    right = PanelEngine._pass
    return lambda self, samples, *arguments: right(self, samples, *change(*arguments))


def rest_off(self: Any, *arguments: Any) -> float:
    """`Rest.step` with a loss that is off."""
    return 1.001 * RIGHT_STEP(self, *arguments)


RIGHT_STEP = Rest.step
PASS = "catopt_xp.engines.cpu.engine.PanelEngine._pass"
FAULTS: dict[str, tuple[str, Any]] = {
    "a gradient twice too large": (
        PASS,
        altered(lambda rows, d, rule, following: (rows, d * 2, rule, following)),
    ),
    "a rate off by a ten-thousandth": (
        PASS,
        altered(lambda rows, d, rule, after: (rows, d, (rule[0]._replace(rate=rule[0].rate * 1.0001), rule[1]), after)),
    ),
    "one sample left out": (
        PASS,
        altered(lambda rows, d, rule, following: (rows[1:], d[1:], rule, following)),
    ),
    "panels left out of the product": ("catopt_xp.engines.cpu.engine.tree_sum", lambda blocks: blocks[0]),
    "another loss of the compiled rest": ("catopt_xp.engines.cpu.engine.Rest.step", rest_off),
    "pixels of another scale": ("catopt_xp.engines.cpu.engine.pixel_scale", lambda dtype: 1 / 256),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_differs_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    differs = r"the panel engine failed its check: \S.* differs by \S+ of its size, Adam, float32"
    with pytest.warns(RuntimeWarning, match=rf"^{differs}; a slower one runs instead$"):
        engine, why = choose_engine("panels", **setting())
    assert type(engine) is PlainEngine
    assert re.fullmatch(differs, why)


@pytest.mark.usefixtures("unchecked")
def test_training_goes_on_with_the_plain_engine_where_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(*FAULTS["panels left out of the product"])
    with pytest.warns(RuntimeWarning, match=r"Z0 of the next batch|W0"):
        result = train(engine="auto", total_epoch=1, verbose=True)
    assert result.engine == "plain"
    assert "engine plain (the panel engine failed its check" in first_line(capsys)


@pytest.mark.usefixtures("unchecked")
def test_code_that_does_not_compile_leaves_the_plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a numba whose LLVM takes what the engine writes for wrong."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("Intrinsic has incorrect argument type!\nvoid (i32*)* @llvm.x86.sse.stmxcsr")

    monkeypatch.setattr(PASS, refuse)
    refused = r"the panel engine failed its check: RuntimeError, Intrinsic has .* type! void \(i32\*\)\* @llvm\S+"
    with pytest.warns(RuntimeWarning, match=rf"^{refused}; a slower one runs instead$"):
        engine, why = choose_engine("auto", **setting())
    assert type(engine) is PlainEngine
    assert re.fullmatch(refused, why)


@pytest.mark.usefixtures("unchecked")
def test_a_check_without_enough_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(PASS, refuse)
    with pytest.raises(MemoryError, match="no room"):
        choose_engine("auto", **setting())


@pytest.mark.usefixtures("unchecked")
def test_the_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine("auto", **setting())[1] == "the fastest that can run this"
    monkeypatch.setattr(*FAULTS["a gradient twice too large"])
    assert choose_engine("panels", **setting())[1] == "as asked"


# --- other processes, and the compiled code that they keep on disk ------------------------------------------

# Trains a little, with the best engine there is.
PROGRAM = """
import numpy as np
from catopt_xp import train
rng = np.random.default_rng(0)
X, Y = rng.integers(0, 256, (20, 1100), dtype=np.uint8).T, rng.integers(0, 2, (1, 20))
result = train(X=X, Y=Y, total_epoch=1, device="cpu", save_dir=None, verbose=False)
print(result.engine, result.engine_reason, result.history.train_loss[0], sep="; ")
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the compiled code of a first process, and what that one printed."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, python(PROGRAM, NUMBA_CACHE_DIR=str(folder))


@pytest.mark.hardening
def test_compiled_code_is_kept_for_the_next_process(kept: tuple[Path, str]) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}

    folder, first = kept
    before = files()
    assert first.startswith("panels; the fastest that can run this; ")
    assert {path.suffix for path in before} == {".nbi", ".nbc"}
    assert python(PROGRAM, NUMBA_CACHE_DIR=str(folder)) == first
    assert files() == before  # nothing was compiled anew


@pytest.mark.hardening
def test_each_index_of_kept_code_is_of_one_code_alone(kept: tuple[Path, str], tmp_path: Path) -> None:
    """Two processes that add to one index at once can each be handed the other's code later."""
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    python(PROGRAM.replace("total_epoch", 'optimizer="gd", total_epoch'), NUMBA_CACHE_DIR=str(tmp_path))
    names = [path.name.removesuffix(".nbi") for path in tmp_path.rglob("*.nbi")]
    assert len(names) == 4  # the pass over the panels and the rest, for two optimizers
    for name in names:
        assert len(list(tmp_path.rglob(f"{name}.*.nbc"))) == 1


@pytest.mark.hardening
def test_without_a_folder_for_compiled_code_training_works(kept: tuple[Path, str]) -> None:
    """A folder below a file can be made by nobody, root included; no other place is offered."""
    nowhere = {"NUMBA_CACHE_DIR": os.devnull + "/folder", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    assert python(PROGRAM, **nowhere) == kept[1]


@pytest.mark.hardening
@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_with_a_disk_too_full_for_compiled_code_training_works(tmp_path: Path, kept: tuple[Path, str]) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    assert python(full + PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)) == kept[1]


@pytest.mark.hardening
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_with_compiled_code_that_is_damaged_training_works(tmp_path: Path, kept: tuple[Path, str], suffix: str) -> None:
    """As after a power cut: the name is there, the bytes are not."""
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    damaged = list(tmp_path.rglob(f"*.{suffix}"))
    assert damaged
    for file in damaged:
        file.write_bytes(b"")
    assert python(PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)) == kept[1]


def test_a_numba_that_cannot_be_imported_leaves_the_plain_engine(tmp_path: Path) -> None:
    """As one is that is older than NumPy allows: installed, and of no use."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less. Got 9.9.")')
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert re.match("plain; .*Numba needs NumPy 2.2 or less", python(first + PROGRAM))
