"""The whole suite with the oldest versions that pyproject.toml allows, or with the newest, pre-releases among them.

    python tests/hardening/oldest.py FOLDER PYTHON [oldest|newest|pre] [arguments of pytest …]

makes an environment in FOLDER, looks whether its versions are the bounds exactly ("oldest"), runs the tests of this
checkout there, and writes results/suite_PYTHON_VERSIONS.json. It needs uv and an index, and takes as long as the suite.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import environments
from packaging.requirements import Requirement
from packaging.version import Version

EVERYTHING = "kernels or hardening or not (kernels or hardening)"  # but the long tests, which it does not name
OPTIONS = {
    "oldest": ["--resolution", "lowest-direct"],
    "newest": [],
    "pre": ["--prerelease", "allow"],
}


def bounds(extras: tuple[str, ...]) -> dict[str, Version]:
    """The lowest version of each dependency of the package and of these extras."""
    project: dict[str, Any] = tomllib.loads((environments.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in listed[extra])]
    found = {}
    for requirement in map(Requirement, lines):
        (part,) = requirement.specifier
        found[requirement.name.lower()] = Version(part.version)
    return found


def check_oldest(told: dict[str, str]) -> None:
    """Ends the script unless exactly the bounds are installed."""
    other = {name: told.get(name) for name, bound in bounds(("test",)).items() if Version(told[name]) != bound}
    if other:
        raise SystemExit(f"not the oldest versions that are allowed: {other}")


def run_suite(interpreter: Path, words: list[str]) -> dict[str, Any]:
    """Counts of the tests by outcome, and the names of those that failed."""
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", EVERYTHING, *words]
    environment = os.environ | {"CI": "true", "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"}
    start, lines = time.monotonic(), []
    with subprocess.Popen(
        list(map(str, command)), cwd=environments.REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1])}
    failed = sorted(match[1] for line in lines if (match := re.match(r"(?:FAILED|ERROR) (.*?)(?: - .*)?$", line)))
    return counts | {"seconds": round(time.monotonic() - start), "not passed": failed}


def main(folder: Path, python: str, kind: str, words: list[str]) -> int:
    package = f"{environments.REPOSITORY}[test]"
    interpreter = environments.make(folder, python, [package], *OPTIONS[kind])
    told = environments.versions(interpreter)
    if kind == "oldest":
        check_oldest(told)
    direct = {name: told[name] for name in sorted(bounds(("test",)))}
    found = {"date": time.strftime("%Y-%m-%d"), "python": told["python"], "versions": direct}
    found |= {"arguments": words} if words else {}
    outcome = run_suite(interpreter, words)
    short = told["python"].rsplit(".", 1)[0]
    environments.write(f"suite_{short}_{kind}.json", found | outcome)
    return 1 if outcome["not passed"] else 0


if __name__ == "__main__":
    kind = sys.argv[3] if len(sys.argv) > 3 else "oldest"
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2], kind, sys.argv[4:]))
