"""Every dependency has a licence and a release within two years: the table of all that the extras bring.

    python tests/hardening/supply.py FOLDER PYTHON

installs the package with the extras of its users and of its tests into an environment in FOLDER, reads the licences
that the distributions declare, and asks uv which version of each an index had two years ago: where it has a newer one
now, there was a release since. Writes results/supply.json. It needs uv and an index that tells when files came.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import environments
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

USERS = ("plot", "tensorboard", "fast", "sklearn", "distributed", "onnx", "safetensors", "test")
LICENCES = """
import importlib.metadata as m, json
found = {}
for d in m.distributions():
    told = d.metadata
    texts = [f.name for f in d.files or [] if any(w in f.name.upper() for w in ("LICEN", "COPYING", "NOTICE"))]
    found[told["Name"]] = {
        "version": d.version,
        "expression": told["License-Expression"],
        "license": told["License"],
        "classifiers": [c.split(" :: ")[-1] for c in told.get_all("Classifier") or [] if c.startswith("License ::")],
        "files": sorted(set(texts)),
        "needs": [r for r in d.requires or [] if "extra ==" not in r],
    }
print(json.dumps(found))
"""


def licence_of(told: dict[str, Any]) -> str:
    """What a distribution says of its licence, in a line; empty where it says nothing."""
    lines = str(told["license"] or "").strip().splitlines()
    short = lines[0] if lines and len(lines[0]) < 100 else ""
    named = told["expression"] or "; ".join(c for c in told["classifiers"] if c != "OSI Approved") or short
    return str(named or ", ".join(told["files"]))


def licences(interpreter: Path) -> dict[str, dict[str, Any]]:
    """What the distributions of an environment say of their licences, by name."""
    told = json.loads(environments.run([interpreter, "-c", LICENCES]))
    return {canonicalize_name(name): said for name, said in told.items()}


def direct_dependencies() -> dict[str, list[str]]:
    """The extras that ask for each dependency; "core" where the package does."""
    text = (environments.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    found: dict[str, list[str]] = {}
    for extra, lines in ({"core": project["dependencies"]} | project["optional-dependencies"]).items():
        for line in lines:
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(extra)
    return found


def newest(names: list[str], interpreter: Path, until: str | None) -> dict[str, str]:
    """The newest version of each distribution that an index had on a day; those that it had not are left out."""
    options = ["--exclude-newer", until] if until else []
    words = [environments.uv(), "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate", *options]
    try:
        told = environments.run([*words, "--python", interpreter, "-"], input="\n".join(names))
    except SystemExit:
        if until is None:
            raise
        if len(names) == 1:
            return {}
        half = len(names) // 2
        return newest(names[:half], interpreter, until) | newest(names[half:], interpreter, until)
    return {canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)", told, re.MULTILINE)}


def main(folder: Path, python: str) -> int:
    package = f"{environments.REPOSITORY}[{','.join(USERS)}]"
    interpreter = environments.make(folder, python, [package])
    direct = direct_dependencies()
    installed = licences(interpreter)
    installed.pop("catopt-xp")
    # Of the peers of benchmarks, and of the CuPy that excludes the other one, the licence is looked at, and no more.
    others = sorted(set(direct) - set(installed))
    beside = licences(environments.make(folder / "others", python, others, "--no-deps"))
    installed |= {name: beside[name] for name in others}
    names = sorted({*direct, *installed})
    today = datetime.date.today()
    two_years_ago = today.replace(year=today.year - 2).isoformat()
    now, then = (newest(names, interpreter, until) for until in (None, two_years_ago))
    table = {}
    for name in names:
        table[name] = {
            "for": direct.get(name, "brought by another"),
            "newest": now[name],
            "two years ago": then.get(name),
            "released since": now[name] != then.get(name),
            "licence": licence_of(installed[name]),
        }
    without = [name for name, told in installed.items() if not licence_of(told)]
    old = [name for name in direct if not table[name]["released since"]]
    brought = [name for name in names if name not in direct and not table[name]["released since"]]
    found = {"date": today.isoformat(), "two years ago": two_years_ago, "without a licence": without}
    found |= {"direct, without a release since": old, "brought by others, without a release since": brought}
    environments.write("supply.json", found | {"table": table})
    print(json.dumps(found, indent=1))
    return 1 if without or old else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2]))
