"""The package as a whole: what importing loads, public names, doctests, no hidden state."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import catopt_xp
from catopt_xp.version import __version__

FOLDER = Path(catopt_xp.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(FOLDER)], prefix="catopt_xp."))
SOURCES = {"catopt_xp": FOLDER / "__init__.py"} | {
    name: path
    if (path := FOLDER.parent / (name.replace(".", "/") + ".py")).exists()
    else path.with_suffix("") / "__init__.py"
    for name in MODULES
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

# Libraries that may be imported inside a function: heavy, optional, or bound to a device. The import contracts in
# pyproject.toml say which module imports which.
OPTIONAL = {"PIL", "cupy", "matplotlib", "mpi4py", "numba", "onnx", "safetensors", "sklearn", "scipy", "tensorboardX"}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a source, but for what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            yield from (_module_of(node.module or "", alias.name) for alias in node.names)
        else:
            yield from imports_of(node)


def _module_of(module: str, name: str) -> str:
    """`from package import module` means the module, `from module import name` the module that is asked."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def python(code: str, *arguments: str) -> str:
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Imports.

LOADED = """
import sys
exec(sys.argv[1])
heavy = {"cupy", "numba", "PIL", "matplotlib", "sklearn", "scipy", "onnx", "safetensors", "mpi4py", "tensorboardX"}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import catopt_xp",
        "import catopt_xp; catopt_xp.train",
        "import catopt_xp; dir(catopt_xp)",
        "import catopt_xp.commands.main",
    ],
)
def test_importing_loads_no_heavy_or_optional_library(code: str) -> None:
    assert python(LOADED, code) == "[]\n"


def test_importing_the_package_loads_none_of_its_modules() -> None:
    code = "import sys, catopt_xp; print([m for m in sorted(sys.modules) if m.startswith('catopt_xp') or m == 'numpy'])"
    assert python(code) == "['catopt_xp']\n"


def libraries_of(module: str) -> set[str]:
    """The libraries that a module imports, itself or by a module of its folder that it stands on."""
    found, folder = set(imports_of(TREES[module])), module.rpartition(".")[0] + "."
    beside = [name for name in found if name.startswith(folder)]
    return {name.split(".")[0] for name in found}.union(*map(libraries_of, beside))


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_functions_are_of_optional_libraries_alone(module: str) -> None:
    functions = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {found.split(".")[0] for function in functions for found in imports_of(function)}
    # A module of ours that stands on an optional library is optional itself.
    own = {found for function in functions for found in imports_of(function) if found.startswith("catopt_xp.")}
    optional = {name for name in own if OPTIONAL & libraries_of(name)}
    assert inside - {"catopt_xp"} <= OPTIONAL, "move these imports to the head of the module"
    assert own == optional, "move these imports to the head of the module"


# Names and documentation.


def test_every_public_name_resolves_is_documented_and_listed() -> None:
    for name in catopt_xp.__all__:
        thing = getattr(catopt_xp, name)
        assert name in dir(catopt_xp)
        if name != "__version__":
            assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
            assert thing.__module__.startswith("catopt_xp."), name
    assert len(set(catopt_xp.__all__)) == len(catopt_xp.__all__)
    with pytest.raises(AttributeError, match="module 'catopt_xp' has no attribute 'nothing'"):
        catopt_xp.nothing  # noqa: B018


def test_the_names_of_the_chapter_are_public() -> None:
    names = "BaseOptimizer BaseRegressionModel DeepNetwork GradientDescent Momentum RMSProp Adam const_lr"
    names += " get_hyperbola_func get_cat_set save_state_dict load_state_dict load_model train"
    assert set(names.split()) <= set(catopt_xp.__all__)


def loaded_module(module: str) -> ModuleType:
    """The module, imported; without the optional library that it stands on the test is skipped."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


def public_things(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, thing in vars(module).items():
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__ and callable(thing):
            yield name, thing


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_their_public_functions_and_classes_are_documented(module: str) -> None:
    loaded = loaded_module(module)
    assert (loaded.__doc__ or "").strip()
    missing = [name for name, thing in public_things(loaded) if not (inspect.getdoc(thing) or "").strip()]
    assert missing == []


@pytest.mark.parametrize("module", ["catopt_xp", *MODULES])
def test_examples_in_docstrings_run_and_leave_no_files(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(loaded_module(module))
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {module}"
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_examples_at_all() -> None:
    examples = sum(source.read_text(encoding="utf-8").count(">>> ") for source in SOURCES.values())
    assert examples > 50


# State and files.


@pytest.mark.parametrize("module", MODULES)
def test_a_module_holds_constants_alone(module: str) -> None:
    loaded = loaded_module(module)
    mutable = [
        name
        for name, value in vars(loaded).items()
        if isinstance(value, list | dict | set | bytearray | np.ndarray)
        and not (name.startswith("__") or name.lstrip("_").isupper())
    ]
    assert mutable == [], "a constant has a name in capitals; anything else belongs in an object"
    assert not [ast.unparse(n) for n in ast.walk(TREES[module]) if isinstance(n, ast.Global)]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_changes_a_constant(module: str) -> None:
    tree = TREES[module]
    constants = {ast.unparse(target) for node in tree.body for target in _targets(node)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes = [node for function in functions for node in ast.walk(function)]
    stored = [node.value for node in nodes if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)]
    called = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    changed = stored + [function.value for function in called if function.attr in CHANGING]
    assert constants.isdisjoint({ast.unparse(node) for node in changed})


CHANGING = {"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"}


def _targets(node: ast.stmt) -> list[ast.expr]:
    """What a statement of a module gives a value."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def test_the_package_says_that_it_is_typed() -> None:
    assert (FOLDER / "py.typed").is_file()


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert catopt_xp.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", __version__)
    try:
        installed = importlib.metadata.version("catopt-xp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("catopt-xp is not installed: it runs from its sources")
    assert installed == __version__
