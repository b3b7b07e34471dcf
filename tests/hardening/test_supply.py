"""What is built and handed out: contents, metadata, bounds of dependencies, and equal bytes from equal sources."""

from __future__ import annotations

import ast
import email
import hashlib
import importlib.util
import os
import random
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
BUILD = "import sys, hatchling.build as b\nprint(b.build_sdist(sys.argv[1]), b.build_wheel(sys.argv[1]))"
FOLDERS = ("catopt_xp", "tests", "benchmarks", "notebooks")
FILES = ("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", ".gitignore")
# A date of the first build; any will do.
DATE = "1700000000"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds the package, is not installed"
)


@cache
def sources() -> dict[Path, bytes]:
    """The files of the checkout that belong to it, by their names in it: those that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip(f"which files belong to the project is asked of git: {listed.stderr.strip()}")
    names = sorted({Path(name) for name in listed.stdout.split("\0") if name})
    return {name: (REPOSITORY / name).read_bytes() for name in names if (REPOSITORY / name).is_file()}


def build(folder: Path, seed: int, umask: int) -> tuple[Path, Path]:
    """sdist and wheel of a copy of the sources, made in `folder` in an order, at times and with a umask of its own."""
    copy, out, draw = folder / "sources", folder / "dist", random.Random(seed)
    files = list(sources().items())
    draw.shuffle(files)
    before = os.umask(umask)
    try:
        out.mkdir(parents=True)
        for name, content in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
            os.utime(copy / name, (draw.randrange(10**9), draw.randrange(10**9)))
        (copy / "catopt_xp" / "__pycache__").mkdir()  # what a run leaves behind
        (copy / "catopt_xp" / "__pycache__" / f"left.{seed}.pyc").write_bytes(b"compiled")
        environment = os.environ | {"SOURCE_DATE_EPOCH": DATE, "PYTHONHASHSEED": str(seed), "TZ": f"UTC{seed % 12}"}
        command = [sys.executable, "-c", BUILD, str(out)]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    sdist, wheel = done.stdout.split()
    return out / sdist, out / wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist and wheel."""
    return build(tmp_path_factory.mktemp("built"), seed=0, umask=0o022)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


# --- what is in the files ------------------------------------------------------------------------------------------


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    info = next(name for name in names if name.endswith("/RECORD")).removesuffix("RECORD")
    about = {info + name for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    own = {name.as_posix() for name in sources() if name.parts[0] == "catopt_xp"}
    assert names == own | about
    assert {"catopt_xp/py.typed", "catopt_xp/engines/cuda/step.cu"} <= names
    assert {Path(name).suffix for name in own} == {".py", ".pyi", ".cu", ".typed"}


def test_the_sdist_has_what_building_and_testing_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    names = {Path(*Path(member.name).parts[1:]) for member in members}
    wanted = {name for name in sources() if name.parts[0] in FOLDERS} | {Path(name) for name in FILES}
    assert names == wanted | {Path("PKG-INFO")}
    assert {Path(member.name).parts[0] for member in members} == {built[0].name.removesuffix(".tar.gz")}


def test_the_metadata_are_complete(built: tuple[Path, Path]) -> None:
    told = metadata(built[1])
    assert told["License-Expression"] == "MIT"
    assert told.get_all("License-File") == ["LICENSE"]
    assert told["Requires-Python"] == ">=3.11"
    assert told["Description-Content-Type"] == "text/markdown"
    assert str(told.get_payload()).startswith("# catopt_xp")
    assert told["Summary"]
    assert told["Keywords"]
    assert set(told.get_all("Provides-Extra") or []) == set(EXTRAS)
    # Links are left out, not invented.
    assert told.get_all("Project-URL") is None
    assert told["Home-page"] is None
    # A licence is named by its expression alone, and each Python that is named is one that is allowed.
    classifiers = told.get_all("Classifier") or []
    assert not [line for line in classifiers if line.startswith("License ::")]
    named = [match[1] for line in classifiers if (match := re.search(r"Python :: 3\.(\d+)$", line))]
    assert named == ["11", "12", "13"]


# --- the built files work ------------------------------------------------------------------------------------------

JOB = """
import sys
import numpy as np
import catopt_xp
assert catopt_xp.__file__.startswith(sys.argv[1]), catopt_xp.__file__
X, Y = np.random.default_rng(0).integers(0, 256, (40, 1100), dtype=np.uint8), np.arange(40) % 2
np.savez("set.npz", X=X.T, Y=Y[None])
from catopt_xp.commands.main import main
sys.exit(main(["train", "--data", "set.npz", "--hidden", "6,4", "--epochs", "2", "--engine", "plain", "--quiet"]))
"""


def test_the_wheel_unpacked_elsewhere_trains(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A wheel of Python sources is installed by unpacking it; nothing of the checkout is within reach."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(site)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", JOB, str(site)],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (work / "work_dirs").iterdir()} >= {"model_latest.npz"}


def run(*command: object, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_built_files_install_and_do_the_main_job(
    built: tuple[Path, Path], tmp_path: Path, record: Callable[..., None]
) -> None:
    """Needs a package index, for the dependencies. twine says what an index would say of the files."""
    told = {}
    for kind, file in zip(("sdist", "wheel"), built, strict=True):
        site, work = tmp_path / f"site {kind}".replace(" ", "_"), tmp_path / kind
        work.mkdir()
        run(sys.executable, "-m", "venv", site)
        python = site / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", f"{file}[fast,plot]", cwd=work)
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own |= {"CATOPT_XP_CACHE": str(tmp_path / "cache")}
        first = run(site / "bin" / "catopt-xp", "train", cwd=work, env=own).splitlines()[0]
        results = sorted(path.name for path in (work / "work_dirs").iterdir())
        assert {"model_latest.npz"} < set(results), results
        told[kind] = {"first line": first, "results": results}
        run(python, "-m", "pip", "uninstall", "-q", "-y", "catopt-xp", cwd=work)
        left = [path for path in site.rglob("*catopt*/**/*") if path.is_file()]
        assert {path.parent.name for path in left} <= {"__pycache__"}, (
            left
        )  # code that numba compiled, and nothing else
    run(python, "-m", "pip", "install", "-q", "twine")
    checked = run(python, "-m", "twine", "check", "--strict", *built)
    assert checked.count("PASSED") == 2
    sizes = {file.name: file.stat().st_size for file in built}
    record(bytes=sizes, main_job=told, twine="both PASSED, --strict")


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    (tmp_path / "dist").mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "dist")],
        cwd=folder,
        env=os.environ | {"SOURCE_DATE_EPOCH": DATE},
        check=True,
        capture_output=True,
    )
    for file in built:
        assert (tmp_path / "dist" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("builds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_builds_have_the_same_bytes(
    builds: int, built: tuple[Path, Path], tmp_path: Path, record: Callable[..., None]
) -> None:
    """Whatever the path, the times and the order of the files, the umask, the hash seed and the time zone."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built}
    for number in range(1, builds):
        files = build(tmp_path / ("deep" * number) / str(number), seed=number, umask=(0o077, 0o002, 0)[number % 3])
        assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == digests
    record(builds=builds, differing=0)


# --- what the project depends on -----------------------------------------------------------------------------------


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Each requirement with the name of its extra, "" for those of the package itself."""
    listed = {"": PROJECT["project"]["dependencies"]} | EXTRAS
    for extra, lines in listed.items():
        yield from ((extra, Requirement(line)) for line in lines)


def test_every_dependency_has_one_lower_bound_and_no_upper_one() -> None:
    """The bounds are versions that exist: `oldest.py` installs exactly these and runs the suite."""
    bounds: dict[str, set[str]] = {}
    for _, requirement in requirements():
        assert [part.operator for part in requirement.specifier] == [">="], str(requirement)
        bounds.setdefault(requirement.name.lower(), set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}
    assert {">=" + PROJECT["build-system"]["requires"][0].split(">=")[1]} == bounds["hatchling"]


# Libraries that come with another one, and what brings them.
BROUGHT = {"llvmlite": "numba", "scipy": "scikit-learn"}
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "cupy": "cupy-cuda12x", "cv2": "opencv-python-headless"}


def test_whatever_the_package_imports_is_a_dependency_of_it() -> None:
    imported: set[str] = set()
    for file in (REPOSITORY / "catopt_xp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"catopt_xp"}
    needed = {NAMES.get(BROUGHT.get(name, name), BROUGHT.get(name, name)).lower() for name in foreign}
    listed = {requirement.name.lower() for extra, requirement in requirements() if extra != "test"}
    assert needed <= listed, needed - listed
    core = {requirement.name.lower() for extra, requirement in requirements() if extra == ""}
    assert core == {"numpy", "pillow", "platformdirs", "threadpoolctl", "tqdm"}
