"""Mutation testing: every small change to a formula or a condition must make a test fail.

    python -m pip install cosmic-ray
    python tests/hardening/mutation.py                    # all files, an hour on one core
    python tests/hardening/mutation.py training/checkpoint.py      # one of them

The mutants are those of cosmic-ray's operators, and of two that it lacks: another augmented assignment (`+=` for `-=`)
and a statement left out. What differs in annotations alone is no mutant, and of equal mutants one is run. The package
and its tests are copied to a temporary folder, and a mutant is never written to a file. For each a process forks that
has collected the tests of the module already: the child exchanges the code of the mutated function, then runs the
examples of the module and its tests until one fails. A mutant outside of functions is imported by a child that has
NumPy and pytest, but no part of the package yet.

A mutant that takes more than twice the processor time of all tests is killed only if it loops: three looks at it or
more, 0.2 s apart, find it in the same function. Else it is given ten times as long, and loops if half of the looks do
(what it calls, or who calls it, is there in between). Counts and survivors go to
results/mutation.json; mutation.md explains each survivor, and the command fails where it does not. Linux alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import doctest
import faulthandler
import gc
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mutants import Mutant, mutants_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXPLANATIONS = HERE / "mutation.md"
MEMORY = 12 * 2**30  # address space of a mutant: one that asks for more has failed
EXAMPLES = 60  # of hypothesis, for each test
LAYOUTS = "tests/hardening/test_optimizer_layouts.py"
# File of the package -> the tests that a mutant of it must pass, after the examples in its docstrings.
TARGETS = {
    "optim/schedules.py": ["tests/optim/test_schedules.py"],
    "nn/functional.py": ["tests/nn/test_functional.py"],
    "training/checkpoint.py": ["tests/training/test_checkpoint.py", "tests/training/test_saving.py"],
    "engines/panels.py": ["tests/engines/test_panels.py"],
    "optim/rules.py": ["tests/optim/test_optimizers.py", "tests/optim/test_optim_oracles.py"],
    "optim/base.py": [
        "tests/optim/test_optimizers.py",
        "tests/optim/test_optim_oracles.py",
        f"{LAYOUTS}::test_what_cannot_be_updated_in_place_is_refused_before_any_step",
        f"{LAYOUTS}::test_a_gradient_that_is_refused_leaves_the_sum_as_it_is",
        f"{LAYOUTS}::test_a_state_that_is_refused_changes_nothing",
        f"{LAYOUTS}::test_memory_that_two_elements_share_is_refused",
        f"{LAYOUTS}::test_a_rate_that_is_no_number_is_refused",
        f"{LAYOUTS}::test_an_optimizer_comes_back_after_any_number_of_steps",
    ],
}


@dataclass
class Outcome:
    status: (
        str  # survived, killed, loops, slow (out of time, and not at one place), or unchanged: no function to change
    )
    seconds: float  # of the processor
    by: str = ""  # the first test that failed, or the function that loops


# --- a child ----------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], int], file: str, limit: float, scratch: Path, share: float = 1.0) -> Outcome:
    """What comes of `work`, run in a child of its own that may take `limit` seconds of the processor.

    Out of time it loops if so large a share of the looks at it finds it in one function.
    """
    failure, stacks = scratch / "failure", scratch / "stacks"
    failure.write_text("importing the module, or its examples")
    stacks.write_text("")
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            output = os.open(scratch / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            be_watched(limit, stacks)
            code = work()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    seconds, code = used.ru_utime + used.ru_stime, os.waitstatus_to_exitcode(status)
    by, stack = failure.read_text(), stacks.read_text()
    if code == 77:
        return Outcome("unchanged", seconds)
    if code and stack and not by.startswith("tests"):
        looping = where_it_loops(stack, file, share)
        return Outcome("loops" if looping else "slow", seconds, looping)
    return Outcome("killed" if code else "survived", seconds, (by or f"status {code}") if code else "")


def be_watched(seconds: float, stacks: Path) -> None:
    """Some times after so many seconds of the processor, 0.2 s apart, writes where this process is; then ends it.

    What waits without working is ended as well, after a long time.
    """
    file = stacks.open("w")
    faulthandler.register(signal.SIGPROF, file=file, all_threads=False)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds + 0.7), math.ceil(seconds + 0.7)))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.dump_traceback_later(60 + 20 * seconds, exit=True, file=file)


def where_it_loops(stacks: str, file: str, share: float) -> str:
    """The one function of `file` that so large a share of the stacks is in, three at least; none: "" ."""
    looks = stacks.split("most recent call first")[1:]
    inner = [re.findall(rf'catopt_xp/{re.escape(file)}", line \d+ in (\S+)', look)[:1] for look in looks]
    named = [functions[0] for functions in inner if functions]
    return named[0] if len(set(named)) == 1 and len(named) >= max(3, share * len(looks)) else ""


class MutatedModule(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from a text, whatever its file says."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)  # type: ignore[arg-type]

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, str(self.path), "exec", dont_inherit=True)


# --- the code of functions --------------------------------------------------------------------------------------

Changes = dict[tuple[str, int], CodeType]  # name and line of a function -> its new code


def changed_functions(old: CodeType, new: CodeType) -> Changes | None:
    """The functions in which two modules (or classes) differ; None where they differ in more than functions."""
    same = (old.co_code, old.co_names, len(old.co_consts)) == (new.co_code, new.co_names, len(new.co_consts))
    if not same:
        return None
    changes: Changes = {}
    for one, other in zip(old.co_consts, new.co_consts, strict=True):
        if not (isinstance(one, CodeType) and isinstance(other, CodeType)):
            if type(one) is not type(other) or repr(one) != repr(other):
                return None
        elif not one.co_flags & inspect.CO_OPTIMIZED:  # the body of a class
            inner = changed_functions(one, other)
            if inner is None:
                return None
            changes |= inner
        elif one != other:
            if one.co_name.startswith("<") and one.co_name != "<lambda>":
                return None  # a comprehension that the import runs
            changes[one.co_qualname, one.co_firstlineno] = other
    return changes


Functions = dict[tuple[str, int], list[FunctionType]]


def functions_of(path: str) -> Functions:
    """All functions that the file at `path` has made, by name and line."""
    found: Functions = {}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename == path:
            found.setdefault((thing.__code__.co_qualname, thing.__code__.co_firstlineno), []).append(thing)
    return found


def exchange(functions: Functions, changes: Changes) -> bool:
    """Gives functions their new code; False where one is not there, or closes over other variables now."""
    for key, code in changes.items():
        for function in functions.get(key, []):
            if function.__code__.co_freevars != code.co_freevars:
                return False
            function.__code__ = code
    return changes.keys() <= functions.keys()


# --- the tests --------------------------------------------------------------------------------------------------


class Quickly:
    """Writes the first failure to a file, and keeps hypothesis from shrinking it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.failed = scratch, False
        self.seconds: collections.Counter[str] = collections.Counter()

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutant", settings.get_profile("ci"), max_examples=EXAMPLES, phases=phases)
        settings.load_profile("mutant")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = True
            (self.scratch / "failure").write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            (self.scratch / "failure").write_text(f"importing {report.nodeid}")


class Session(Quickly):
    """Runs the mutants of functions where the tests would have been run, each in a child."""

    def __init__(self, scratch: Path, file: str, name: str) -> None:
        super().__init__(scratch)
        self.file, self.name = file, name
        self.items: dict[str, Any] = {}
        self.functions: Functions = {}
        self.order: list[str] = []
        self.mutants: list[tuple[Mutant, Changes]] = []
        self.found: Callable[[Mutant, Outcome], None]
        self.whole = Outcome("not run", 0.0)

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.order = list(self.items)
        self.functions = functions_of(str(sys.modules[self.name].__file__))
        self.whole = in_child(lambda: self.tested({}), self.file, 600, self.scratch)
        if self.whole.status != "survived":
            return True
        self.order = (self.scratch / "order").read_text().splitlines()  # the fastest first, then what fails most
        failures: collections.Counter[str] = collections.Counter()
        gc.freeze()
        for mutant, changes in self.mutants:
            outcome = self.of(changes, 0.5 + 2 * self.whole.seconds)
            if outcome.status == "slow":
                outcome = self.of(changes, 10 + 20 * self.whole.seconds, share=0.5)
            failures[outcome.by] += outcome.by in self.items
            self.order.sort(key=lambda name: -failures[name])
            self.found(mutant, outcome)
        return True

    def of(self, changes: Changes, limit: float, share: float = 1.0) -> Outcome:
        return in_child(lambda: self.tested(changes), self.file, limit, self.scratch, share)

    def tested(self, changes: Changes) -> int:
        """In the child: 0 where all tests pass, 77 where the functions are not to be found."""
        module = sys.modules[self.name]
        if not exchange(self.functions, changes):
            return 77
        if doctest.testmod(module).failed:
            return 1
        (self.scratch / "failure").write_text("")
        for name, following in zip(self.order, [*self.order[1:], None], strict=True):
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items.get(following or ""))
            if self.failed:
                return 1
        (self.scratch / "order").write_text("\n".join(sorted(self.order, key=lambda name: self.seconds[name])))
        return 0


def pytest_of(file: str, scratch: Path, *more: str, plugins: tuple[object, ...] = ()) -> int:
    import pytest

    # The strict backend runs the same formulas as NumPy, ten times slower.
    plain = [
        "-x",
        "-q",
        "-s",
        "--no-header",
        "-m",
        "not gpu and (hardening or not hardening)",  # a mark that is named is not left out
        "-k",
        "not strict",
        f"--basetemp={scratch / 'temporary'}",
    ]
    for plugin in ("cacheprovider", "xdist", "cov", "benchmark", "faulthandler"):
        plain += ["-p", f"no:{plugin}"]
    return int(pytest.main([*plain, *more, *TARGETS[file]], plugins=list(plugins)))


def forget(before: set[str]) -> None:
    """Forgets the modules of the package and the tests that were imported since: a child imports them anew."""
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if name.split(".")[0] == "catopt_xp" or Path(path).is_relative_to(Path.cwd()):
            del sys.modules[name]


def imported(file: str, name: str, source: str, scratch: Path) -> int:
    """In a child without the package: 0 where the module has this source and all its tests pass."""
    sys.meta_path.insert(0, MutatedModule(name, Path.cwd() / "catopt_xp" / file, source))
    if doctest.testmod(importlib.import_module(name)).failed:
        return 1
    (scratch / "failure").write_text("")
    return pytest_of(file, scratch, plugins=(Quickly(scratch),))


# --- a file -----------------------------------------------------------------------------------------------------


def check(file: str, scratch: Path, log: Any, known: set[str]) -> dict[str, Any]:
    """All mutants of a file: counts, survivors and loops; `known`: those that an earlier run killed."""
    path, before = Path.cwd() / "catopt_xp" / file, set(sys.modules)
    source, name = path.read_text(encoding="utf-8"), "catopt_xp." + file.removesuffix(".py").replace("/", ".")
    code = compile(source, str(path), "exec", dont_inherit=True)
    outcomes: dict[str, Outcome] = {}

    def found(mutant: Mutant, outcome: Outcome) -> None:
        outcomes[mutant.name] = outcome
        told = (f"{file} {outcome.status} {mutant.name}", f"{outcome.seconds:.1f} s", outcome.by)
        print(*told, sep="\t", file=log, flush=True)

    mutants, session = mutants_of(source), Session(scratch, file, name)
    session.found = found
    for mutant in mutants:
        changes = changed_functions(code, compile(mutant.source, str(path), "exec", dont_inherit=True))
        if f"{file} killed {mutant.name}" in known:
            outcomes[mutant.name] = Outcome("killed", 0.0)
        elif changes:
            session.mutants.append((mutant, changes))
    status = pytest_of(file, scratch, plugins=(session,))
    if session.whole.status != "survived":
        told = (scratch / "output").read_text() if (scratch / "output").exists() else f"pytest ended with {status}"
        raise SystemExit(f"{file}: the tests fail without a mutation: {session.whole.by}\n{told}")
    forget(before)
    for mutant in mutants:
        if outcomes.get(mutant.name, Outcome("unchanged", 0.0)).status == "unchanged":
            for limit in (5 + 2 * session.whole.seconds, 20 + 20 * session.whole.seconds):
                outcome = in_child(lambda: imported(file, name, mutant.source, scratch), file, limit, scratch)  # noqa: B023
                if outcome.status != "slow":
                    break
            found(mutant, outcome)
    by_status = {
        status: [m.name for m in mutants if outcomes[m.name].status == status]
        for status in ("loops", "survived", "slow")
    }
    survivors = by_status["survived"] + by_status["slow"]
    killed = len(mutants) - len(survivors)
    print(f"{file}: {killed} of {len(mutants)} killed", flush=True)
    return {
        "mutants": len(mutants),
        "killed": killed,
        "killed_by_looping": len(by_status["loops"]),
        "survived": len(survivors),
        "killed_percent": round(100 * killed / len(mutants), 1),
        "survivors": survivors,
        "loops": by_status["loops"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--log", default=os.devnull, help="a file for a line about every mutant")
    parser.add_argument("--known", type=Path, help="such a file of an earlier run: what was killed is not run again")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "mutation.json")
    arguments = parser.parse_args()
    results, log = arguments.results.resolve(), Path(arguments.log).resolve()
    known = {line.split("\t")[0] for line in arguments.known.read_text().splitlines()} if arguments.known else set()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["CI"] = "true"
    warnings.simplefilter("ignore", SyntaxWarning)  # of mutants such as `x is 1`
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, log.open("a") as lines:
        copy, scratch = Path(folder, "copy"), Path(folder, "scratch")
        scratch.mkdir()
        for part in ("catopt_xp", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        for file in arguments.files or TARGETS:
            found = check(file, scratch, lines, known)
            stored = json.loads(results.read_text()) if results.exists() else {"files": {}}
            stored |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
            stored["files"][file] = found
            results.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
        os.chdir(ROOT)
    explained = EXPLANATIONS.read_text(encoding="utf-8")
    stored = json.loads(results.read_text())["files"]
    left = [f"{file}: {name}" for file in stored for name in stored[file]["survivors"] if name not in explained]
    if left:
        raise SystemExit("\n".join([*left, f"these survived, and {EXPLANATIONS} does not explain them"]))


if __name__ == "__main__":
    main()
