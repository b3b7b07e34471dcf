"""Environments of chosen versions, made by uv (`pip install uv`), for the scripts beside this file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
VERSIONS = """
import importlib.metadata as m, json, platform
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version()} | dict(sorted(found.items()))))
"""


def uv() -> str:
    """The command; ends the script where there is none."""
    beside = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if beside is None:
        raise SystemExit("uv is not installed: pip install uv")
    return beside


def run(command: Sequence[object], **options: Any) -> str:
    """What a command prints; its errors end the script."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def make(folder: Path, python: str, requirements: Sequence[object], *options: str) -> Path:
    """The interpreter of a new environment in `folder`; `options` as for `uv pip install`."""
    run([uv(), "venv", "--quiet", "--clear", "--python", python, folder])
    interpreter = folder / "bin" / "python"
    run([uv(), "pip", "install", "--quiet", "--python", interpreter, *options, *requirements])
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """What is installed there, and of which version."""
    found: dict[str, str] = json.loads(run([interpreter, "-c", VERSIONS]))
    return found


def write(name: str, found: object) -> None:
    """results/NAME, to be committed."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
