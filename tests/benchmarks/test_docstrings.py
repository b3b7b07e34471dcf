"""The examples in the docstrings of `benchmarks`."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import benchmarks.peers
import benchmarks.peers_gpu

MODULES = [
    found.name
    for package in (benchmarks.peers, benchmarks.peers_gpu)
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
NEEDS = {"torch_peer": "torch", "jax_peer": "jax", "sklearn_peer": "sklearn"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_right(name: str) -> None:
    library = NEEDS.get(name.split(".")[-1])
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert doctest.testmod(importlib.import_module(name), raise_on_error=False).failed == 0
