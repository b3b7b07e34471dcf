"""Fully connected classifiers from scratch, on NumPy and CuPy: `catopt_xp.train(device="cuda")`.

`__init__.pyi` lists the public names. Each is loaded when it is first used, so importing the package is quick and
touches no GPU.
"""

from __future__ import annotations

import ast
import importlib
from importlib.resources import files
from typing import Any

_STUB = ast.parse(files(__name__).joinpath("__init__.pyi").read_text(encoding="utf-8"))
_HOME = {name.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'catopt_xp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"catopt_xp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
