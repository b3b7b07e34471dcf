"""Commands in surroundings that nobody wishes for: no home, no locale, no streams, odd variables, no current folder."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catopt_xp.backend import machine
from catopt_xp.backend.devices import strict_by_environment
from catopt_xp.backend.machine import address_room, cpu_count, thread_count
from catopt_xp.backend.xp import get_backend
from catopt_xp.data.cache import cache_folder, load_rows, store_rows
from catopt_xp.data.drawn.drawings import get_drawn_set

if sys.platform == "win32":
    pytest.skip("homes, streams and masks as POSIX has them", allow_module_level=True)

MODULE = [sys.executable, "-m", "catopt_xp"]
SIZES = "--img-shape 24x24 --hidden 6,5 --epochs 1 --device cpu --engine plain --save-dir run"
DRAWN = f"train --train-size 4 --dev-size 2 {SIZES}".split()
NOBODY = 54321
# What matplotlib says where it has no folder of its own.
NOT_OURS = ("mkdir -p failed for path", "Matplotlib created a temporary cache directory")


def run(
    words: list[str],
    folder: Path,
    environment: dict[str, str | None] | None = None,
    program: list[str] | None = None,
    shell: str = "",
) -> subprocess.CompletedProcess[str]:
    """A command in a folder; `environment`: besides this process's (None: not that name).

    `shell`: what stands around it.
    """
    base = {k: v for k, v in os.environ.items() if not k.startswith(("COV_CORE", "COVERAGE"))}
    given = {"OMP_NUM_THREADS": "1", "CATOPT_XP_CACHE": str(folder / "cache")}
    env = {k: v for k, v in (base | given | (environment or {})).items() if v is not None}
    command = [*(program or MODULE), *words]
    if shell:
        command = ["bash", "-c", shell, "bash", *command]  # the command is "$@"
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)


def ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if not line.startswith(NOT_OURS)]


def assert_done(done: subprocess.CompletedProcess[str], warned: str = "") -> None:
    lines = ours(done.stderr)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("catopt-xp: warning: ") for line in lines), done.stderr
    assert (warned in done.stderr) if warned else not lines, done.stderr


def assert_failed(done: subprocess.CompletedProcess[str], told: str, status: int = 1) -> None:
    lines = ours(done.stderr)
    assert done.returncode == status, done.stderr
    assert lines[-1].startswith("catopt-xp: error: "), done.stderr
    assert told in lines[-1]
    assert len(lines) == 1, done.stderr


# --- homes and caches -------------------------------------------------------------------------------------------------


def as_nobody(folder: Path) -> list[str]:
    """The program as a user whom permissions bind, and whom the system does not know."""
    if os.getuid() != 0:
        pytest.skip("only root can become a user whom the system does not know")
    drop = f"import os, runpy, sys; os.setgid({NOBODY}); os.setuid({NOBODY}); sys.argv[0] = 'catopt-xp'; "
    program = [sys.executable, "-c", f"{drop}runpy.run_module('catopt_xp', run_name='__main__')"]
    trial = [sys.executable, "-c", f"{drop}import catopt_xp.commands.main, PIL.Image; os.listdir({str(folder)!r})"]
    if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
        pytest.skip("another user than root may not read the interpreter, or the folder of the test")
    return program


@pytest.mark.parametrize(
    ("home", "reason"), [("readonly", "Permission denied"), ("file", "Not a directory"), (None, "Not a directory")]
)
def test_a_home_that_cannot_hold_a_cache_is_said_and_the_work_done(
    home: str | None, reason: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "readonly").mkdir(mode=0o555)
    (tmp_path / "file").touch()
    environment = {"CATOPT_XP_CACHE": None, "XDG_CACHE_HOME": None, "HOME": home and str(tmp_path / home)}
    program = None
    if home is None or (home == "readonly" and os.getuid() == 0):
        program = as_nobody(tmp_path)
    assert_done(run([*DRAWN, "--quiet"], tmp_path, environment, program), f"written ({reason}); going on in memory")
    assert (tmp_path / "run" / "model_latest.npz").exists()


def test_a_user_without_a_home_has_no_cache_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CATOPT_XP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.warns(UserWarning, match=r"cannot be written \(Not a directory\); going on in memory"):
        data = get_drawn_set((8, 8), train_size=1, test_size=0)
    assert data.train_X.shape == (192, 2)
    assert data.notices == []


@pytest.mark.parametrize("cache", [pytest.param("/proc/none", marks=pytest.mark.long), "file/below"])
def test_a_cache_that_cannot_be_made_is_said_and_the_work_done(cache: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run([*DRAWN, "--quiet"], tmp_path, {"CATOPT_XP_CACHE": str(tmp_path / cache)})
    assert_done(done, "going on in memory")
    assert "damaged" not in done.stderr


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CATOPT_XP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for odd in ("", "relative/folder", "~nobody"):  # its specification asks for an absolute path
        monkeypatch.setenv("XDG_CACHE_HOME", odd)
        assert cache_folder() == tmp_path / ".cache" / "catopt_xp"
    monkeypatch.setenv("CATOPT_XP_CACHE", "~no_such_user_here/x")
    with pytest.raises(ValueError, match="CATOPT_XP_CACHE is '~no_such_user_here/x', and nobody has that home"):
        cache_folder()


def test_a_cache_that_memory_does_not_suffice_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_rows(tmp_path / "a.npy", np.zeros((2, 3), dtype=np.uint8))

    def no_memory(*arguments: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(np, "load", no_memory)
    notices: list[str] = []
    with pytest.raises(MemoryError, match=r"a\.npy cannot be mapped"):
        load_rows(tmp_path / "a.npy", (2, 3), notices)
    assert notices == []


# --- locales, terminals, streams --------------------------------------------------------------------------------------

SURROUNDINGS: dict[str, dict[str, str | None]] = {
    "a locale that is missing": {"LC_ALL": "xx_YY"},
    "ASCII alone": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "an encoding of ASCII": {"PYTHONIOENCODING": "ascii"},
    "no terminal's name, one column": {"TERM": None, "COLUMNS": "1"},
    "a dumb terminal, odd columns": {"TERM": "dumb", "COLUMNS": "abc", "LINES": "-1"},
    "neither asserts nor docstrings": {"PYTHONOPTIMIZE": "2"},
    "warnings as errors": {"PYTHONWARNINGS": "error"},
    "no folder for temporary files": {"TMPDIR": "/no/such/folder"},
    "no time zone": {"TZ": "Nowhere/Land"},
}


MORE_FLAGS = (["-I"], ["-OO", "-X", "utf8=0"], ["-W", "error", "-X", "dev"])
IN_SHORT = ("ASCII alone", "warnings as errors")  # each takes a second or two


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.long) for name in SURROUNDINGS]
)
def test_training_in_odd_surroundings(name: str, tmp_path: Path) -> None:
    (tmp_path / "×–ü").mkdir()
    rng = np.random.Generator(np.random.PCG64(0))
    for animal in ("cats", "dogs"):
        (tmp_path / "×–ü" / animal).mkdir()
        for number in range(3):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "×–ü" / animal / f"{number}.png")
    words = f"train --data ×–ü --progress {SIZES}".split()
    done = run(words, tmp_path, {"MPLBACKEND": None} | SURROUNDINGS[name])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model_latest.npz").exists()
    assert "samples of 1728 features" in done.stdout


@pytest.mark.parametrize("flags", [["-I", "-OO"], *(pytest.param(x, marks=pytest.mark.long) for x in MORE_FLAGS)])
def test_flags_of_the_interpreter(flags: list[str], tmp_path: Path) -> None:
    assert_done(run([*DRAWN, "--quiet"], tmp_path, program=[sys.executable, *flags, "-m", "catopt_xp"]))


CLOSED = {
    '"$@" <&- >&- 2>&-': 1,
    '"$@" --quiet <&- >&- 2>&-': 0,
    '"$@" --quiet <&- 2>&-': 0,
    '"$@" --quiet </dev/null >/dev/full 2>/dev/full': 0,
    '"$@" >/dev/full 2>/dev/full': 1,
    '"$@" 2>/dev/null | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}': 1,
}


@pytest.mark.parametrize(
    "shell", [shell if shell in list(CLOSED)[:2] else pytest.param(shell, marks=pytest.mark.long) for shell in CLOSED]
)
def test_closed_and_full_streams(shell: str, tmp_path: Path) -> None:
    done = run(DRAWN, tmp_path, shell=shell)
    assert done.returncode == CLOSED[shell]
    assert "Traceback" not in done.stderr + done.stdout
    for file in (tmp_path / "run").glob("*") if (tmp_path / "run").exists() else ():
        assert not file.name.endswith(".tmp")


def test_what_a_library_prints_goes_into_no_file_where_streams_are_closed(tmp_path: Path) -> None:
    """A file opened next would have the number of a closed stream, and C prints to numbers."""
    start = "import os, runpy; first = os.open(os.devnull, os.O_RDONLY); os.close(first); print_to = 2; "
    check = "import catopt_xp.__main__; os.write(2, b'noise'); os.write(1, b'noise'); f = open('a', 'wb'); "
    check += "assert f.fileno() > 2; f.write(b'x'); f.close(); os.write(2, b'noise')"
    done = run([], tmp_path, program=[sys.executable, "-c", start + check], shell='"$@" <&- >&- 2>&-')
    assert done.returncode == 0
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("words", ["train --quiet", pytest.param("info", marks=pytest.mark.long), "evaluate a.npz"])
def test_a_current_folder_that_was_removed(words: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = run(words.split(), tmp_path, shell='cd gone && rmdir ../gone && "$@"')
    if words == "info" and done.returncode == 0:
        assert "NumPy" in done.stdout
    else:
        assert_failed(done, "")
        assert any(told in done.stderr for told in ("current folder was removed", "No such file", "no checkpoint at"))


@pytest.mark.parametrize("mask", [pytest.param("0000", marks=pytest.mark.long), "0777"])
def test_masks(mask: str, tmp_path: Path) -> None:
    """All permissions; and none at all, not even for the owner, which root does not notice."""
    done = run([*DRAWN, "--quiet"], tmp_path, {"CATOPT_XP_CACHE": "/proc/none"}, shell=f'umask {mask}; "$@"')
    if mask == "0000" or os.getuid() == 0:
        assert_done(done, "going on in memory")
        expected = 0o666 & ~int(mask, 8)
        assert (tmp_path / "run" / "model_latest.npz").stat().st_mode & 0o777 == expected
    else:
        assert done.returncode == 1
        assert "cannot be written (Permission denied)" in done.stderr.splitlines()[-1]


def test_few_files_may_be_open(tmp_path: Path) -> None:
    """From none besides the streams to enough: each ends with one line, and leaves nothing that is not whole."""
    statuses = set()
    for most in (4, 7, 64):
        done = run([*DRAWN, "--quiet"], tmp_path, shell=f'ulimit -n {most}; "$@"')
        statuses.add(done.returncode)
        lines = ours(done.stderr)
        if done.returncode and not lines[-1].startswith("catopt-xp: error: "):
            assert most < 6, done.stderr  # the interpreter itself cannot start, and says so in words of its own
        left = [file.name for file in tmp_path.rglob("*.tmp")]
        assert left == [], most
    assert 0 in statuses
    assert 1 in statuses


# --- variables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "²", "1.5", "0x2", "9" * 30])
def test_a_number_of_threads_that_is_none_is_said_once(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, value)
    machine._wanted_threads.cache_clear()
    with pytest.warns(UserWarning, match=f"{name} is {value!r}, which is no number of threads from 1: it is ignored"):
        assert thread_count() == cpu_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert thread_count() == cpu_count()
    for good, threads in (("3", 3), (" 2 ", 2), ("4,2", 4), ("007", 7)):
        monkeypatch.setenv(name, good)
        assert thread_count() == threads


@pytest.mark.parametrize("value", ["maybe", "true", "2", "no"])
def test_strictness_that_cannot_be_read_is_refused_on_any_device(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_STRICT_DEVICE", value)
    with pytest.raises(ValueError, match=f"CATOPT_XP_STRICT_DEVICE is '{value}': set it to 1, to 0, or not at all"):
        get_backend("cpu")
    assert get_backend("cpu", strict_device=False).device == "cpu"
    for good, strict in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("CATOPT_XP_STRICT_DEVICE", good)
        assert strict_by_environment() is strict


@pytest.mark.parametrize(
    ("variable", "status"),
    [
        ("CATOPT_XP_DEVICE=gpu9", 2),
        ("CATOPT_XP_STRICT_DEVICE=maybe", 2),
        ("CATOPT_XP_CACHE=~no_such_user_here", 1),
        ("OMP_NUM_THREADS=abc", 0),
        ("NUMBA_NUM_THREADS=0", 0),
        pytest.param("MPLBACKEND=abc", 0, marks=pytest.mark.long),
    ],
)
def test_a_variable_that_cannot_be_meant_is_named_in_one_line(variable: str, status: int, tmp_path: Path) -> None:
    name, value = variable.split("=")
    words = [word for word in DRAWN if word not in ("--device", "cpu", "--engine", "plain")] + ["--quiet"]
    done = run(words, tmp_path, {name: value})
    if status:
        assert_failed(done, name, status)
    else:
        assert_done(done, name)


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited as Linux does it")
def test_what_a_limit_on_the_address_space_leaves_is_known_and_counts(tmp_path: Path) -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    script += "from catopt_xp.backend.machine import address_room\nprint(address_room())\n"
    script += "from catopt_xp.data.dataset import check_memory\ncheck_memory('5 GB', 5 * 10**9)"
    done = run([], tmp_path, program=[sys.executable, "-c", script])
    assert 1 << 30 < int(done.stdout) < 4 << 30
    assert "DataArgumentError: 5 GB need 5.0 GB of memory" in done.stderr.splitlines()[-1]
    assert address_room() > 0
