"""The package as a whole: what importing loads, who may import whom, public names, doctests, no hidden state."""

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

# A new module enters this table. Imports go to lower floors; a name that ends with a dot stands for the whole folder.
FLOORS = {
    0: "version texts files signals backend devices machine threads timers schedules averages",
    1: "functional layout parameters blocks archives checkpoint arrays labels plots figures estimator_arrays"
    " estimator_labels",
    2: "data data. network base_optimizer optim",
    3: "engines engines. distributed history callbacks logs saving batch_size",
    4: "plan storage job running training estimator_rules estimator_training estimator_lbfgs",
    5: "bench bench. estimator estimator_fit experiments trained export flag_values flag_groups arguments ending"
    " run_files tuning",
    6: "cli __main__",
}
SIDEWAYS = {
    ("backend", "devices"): "the backend asks whether a GPU can be used",
    ("backend", "machine"): "free memory of the host",
    ("backend", "threads"): "NumPy's tasks run on them",
    ("backend", "timers"): "a backend hands out its stopwatch",
    ("devices", "machine"): "a report is made of facts about the machine",
    ("threads", "machine"): "the number of processors",
    ("blocks", "functional"): "the scale of pixels is written there, once",
    ("layout", "functional"): "the names of activations",
    ("arrays", "parameters"): "what is a dtype of real numbers",
    ("labels", "arrays"): "labels are taken as any array is",
    ("labels", "parameters"): "the name of a dtype",
    ("estimator_arrays", "arrays"): "weights of samples are taken as any array is",
    ("checkpoint", "archives"): "a checkpoint is an archive of arrays",
    ("estimator_arrays", "parameters"): "the name of a dtype",
    ("estimator", "estimator_fit"): "what scikit-learn's classes are joined to",
    ("optim", "base_optimizer"): "the methods, and what they share",
    ("distributed", "engines"): "a rank has an engine of its own",
    ("distributed", "engines.cuda"): "the check of the kernels that all ranks will run",
    ("distributed", "engines.cuda_ranks"): "ranks train with it",
    ("distributed", "engines.cpu"): "which is checked as any panel engine is",
    ("distributed", "engines.panels"): "panels are dealt to ranks",
    ("distributed", "engines.ranks"): "the engine of a rank",
    ("batch_size", "engines"): "a size is chosen by the time of its steps",
    ("plots", "figures"): "what all figures share",
    ("callbacks", "history"): "a callback reads the history",
    ("logs", "callbacks"): "a log is a callback",
    ("logs", "history"): "a log is of the history",
    ("saving", "history"): "a checkpoint holds the history",
    ("job", "plan"): "a job is a plan with everything that it needs",
    ("job", "storage"): "where its sets lie",
    ("storage", "plan"): "as the plan's memory limit says",
    ("running", "job"): "a run carries out a job",
    ("running", "storage"): "and checks that an engine's steps find their rows",
    ("training", "job"): "train() prepares a job",
    ("training", "plan"): "of a plan",
    ("training", "running"): "and runs it",
    ("flag_groups", "flag_values"): "what a flag takes",
    ("arguments", "flag_groups"): "flags that several commands share",
    ("arguments", "flag_values"): "what a flag takes",
    ("arguments", "bench.contenders"): "the names that --contenders takes",
    ("arguments", "bench.table"): "what is timed by default",
    ("arguments", "export"): "the names that --format and --input take",
    ("export", "trained"): "what is exported",
    ("ending", "arguments"): "errors name the flags",
    ("ending", "flag_groups"): "each line on stderr begins with the program's name",
    ("__main__", "cli"): "python -m catopt_xp is the command line",
}
# Who may import a library that is heavy, optional, or bound to a device.
HOMES = {
    "cupy": {"backend"},
    "PIL": {"data."},
    "matplotlib": {"figures"},
    "tensorboardX": {"logs"},
    # The CPU engine with what it is made of.
    "numba": {"engines.cpu", "engines.compiled", "engines.lanes", "engines.updates", "engines.vectors", "bench.floor"},
    "llvmlite": {"engines.lanes", "engines.updates", "engines.vectors"},
    "sklearn": {"bench.", "estimator"},
    "scipy": {"estimator_lbfgs"},
    "onnx": {"export"},
    "safetensors": {"export"},
    "torch": {"bench."},
    "jax": {"bench."},
    "mpi4py": {"distributed"},
}


def short(module: str) -> str:
    return module.removeprefix("catopt_xp").removeprefix(".")


def is_in(module: str, entries: Any) -> bool:
    folder = module.split(".")[0] + "."
    return module in entries or ("." in module and folder in entries)


def floor_of(module: str) -> int:
    floors = [floor for floor, names in FLOORS.items() if is_in(module, names.split())]
    assert len(floors) == 1, f"{module} stands on the floors {floors} of the table"
    return floors[0]


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


OWN_IMPORTS = {
    short(name): sorted({short(found) for found in imports_of(tree) if found.split(".")[0] == "catopt_xp"})
    for name, tree in TREES.items()
}


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


def test_importing_the_package_loads_none_of_its_modules_but_the_version() -> None:
    code = "import sys, catopt_xp; print([m for m in sorted(sys.modules) if m.startswith('catopt_xp') or m == 'numpy'])"
    assert python(code) == "['catopt_xp', 'catopt_xp.version']\n"


@pytest.mark.parametrize("module", [name for name in OWN_IMPORTS if name])
def test_imports_run_downwards(module: str) -> None:
    floor = floor_of(module)
    for imported in OWN_IMPORTS[module]:
        assert imported, f"{module} imports the package itself, which is above every floor"
        in_one_folder = module.split(".")[0] == imported.split(".")[0]  # there no circle is all that is asked
        if not in_one_folder and (module, imported) not in SIDEWAYS:
            assert floor_of(imported) < floor, f"{module} (F{floor}) imports {imported} (F{floor_of(imported)})"


def test_imports_make_no_circle() -> None:
    left = {name: set(found) for name, found in OWN_IMPORTS.items()}
    while left:
        free = {name for name, found in left.items() if not found & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: found for name, found in left.items() if name not in free}


def test_every_sideways_import_that_is_allowed_is_made() -> None:
    made = {(module, imported) for module, found in OWN_IMPORTS.items() for imported in found}
    assert set(SIDEWAYS) <= made
    assert all(floor_of(a) == floor_of(b) for a, b in SIDEWAYS)


@pytest.mark.parametrize("module", [name for name in MODULES if "data." not in name])
def test_a_docstring_that_names_a_floor_names_its_own(module: str) -> None:
    named = re.findall(r"\b[Ff]loor F(\d)", ast.get_docstring(TREES[module]) or "")
    assert set(named) <= {str(floor_of(short(module)))}


@pytest.mark.parametrize("library", HOMES)
def test_only_its_own_modules_import_a_library(library: str) -> None:
    importers = {short(name) for name, tree in TREES.items() if library in {i.split(".")[0] for i in imports_of(tree)}}
    assert {name for name in importers if not is_in(name, HOMES[library])} == set()
    assert importers or not HOMES[library], f"nothing imports {library}: the table is out of date"


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
    optional = {name for name in own if set(HOMES) & libraries_of(name)}
    assert inside - {"catopt_xp"} <= set(HOMES), "move these imports to the head of the module"
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


def test_a_type_checker_sees_the_names_that_run() -> None:
    seen: dict[str | None, str | None] = {}
    for node in ast.walk(TREES["catopt_xp"]):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                seen |= {alias.asname: line.module for alias in line.names}
    assert seen == {name: f"catopt_xp.{module}" for name, module in catopt_xp._HOME.items()}


def test_the_names_of_the_chapter_are_public() -> None:
    names = "BaseOptimizer BaseRegressionModel DeepNetwork GradientDescent Momentum RMSProp Adam const_lr"
    names += " get_hyperbola_func get_cat_set save_state_dict load_state_dict load_model train"
    assert set(names.split()) <= set(catopt_xp.__all__)


def loaded_module(module: str) -> ModuleType:
    """The module, imported; without the optional library that it stands on the test is skipped."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in HOMES:
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
