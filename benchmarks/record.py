"""Records what a user sees of the package, and compares two records: before and after a refactoring.

A record has the bits of short runs and fits, the CUDA sources, the public names with their signatures, the help texts,
and the files of the wheel. Bits differ from machine to machine, so both records are made on one.

    python -m benchmarks.record write FILE.json
    python -m benchmarks.record compare OLD.json NEW.json
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import catopt_xp
from catopt_xp.backend.threads import limited_threads
from catopt_xp.engines.cuda.launches import StepGeometry
from catopt_xp.engines.cuda.source import source
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["train", "evaluate", "predict", "export", "compare", "tune", "bench", "plot", "paths", "info"]
N_X, M, WINDOW = 1100, 62, 13  # two panels, the second ragged; the last batch short; windows of so many rows
RUN: dict[str, Any] = {"total_epoch": 5, "batch_size": 6, "hidden": (8, 6), "learning_rate": 0.01}
RUN |= {"save_dir": None, "verbose": False, "device": "cpu", "threads": 2}
RULES: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS}
RULES["nesterov"] = {"optimizer": "momentum", "optimizer_options": {"nesterov": True}}
RULES |= {name: {"optimizer": "adam", "optimizer_options": {name: 0.1}} for name in ("weight_decay", "l2")}
OPTIONS: dict[str, dict[str, Any]] = {  # on the uint8 set, with Adam
    "clip_norm": {"optimizer_options": {"clip_norm": 0.1}},  # this and the next are for the plain engine
    "accumulate": {"accumulate": 2},
    "dropout": {"dropout": 0.2},
    "drop_last": {"drop_last": True},
    "shuffle once": {"shuffle": "once"},
    "hyperbola": {"schedule_by": "step", "lr_scheduler": catopt_xp.get_hyperbola_func(0.5)},
    "resumed": {},
}
FIT: dict[str, Any] = {"hidden_layer_sizes": (8, 6), "max_iter": 20, "random_state": 0, "device": "cpu"}
SOLVERS = ["sgd", "adam", "lbfgs", "momentum", "rmsprop", "adamw"]
# The network's type, the set's, and whether tensor cores may be used.
PRODUCTS = [("float32", "uint8", True), ("float32", "uint8", False), ("float32", "float32", False)]
PRODUCTS += [("float64", "uint8", False), ("float64", "float64", False)]
# Neurons, hidden activation, optimizer, batch size, and whether the set is aligned.
STEPS: list[tuple[tuple[int, ...], str, type[BaseOptimizer], int, bool]]
STEPS = [((150528, 30, 20, 20, 1), "relu", x, n, True) for x, _ in OPTIMIZERS.values() for n in (8, 64, 2000)]
STEPS += [((150528, 30, 20, 20, 1), "relu", Adam, 64, False), ((3072, 128, 10), "relu", Adam, 8, True)]
STEPS += [((784, 1), "relu", Adam, 2000, True), ((785, 40, 30, 20, 10), "tanh", Adam, 64, True)]


def digest(arrays: Mapping[str, Any]) -> str:
    """Takes names, types, shapes and bytes into account."""
    total = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        array = np.asarray(value)
        total.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return total.hexdigest()


def sets(folder: Path, dtype: str) -> dict[str, dict[str, Any]]:
    """Makes sets of each kind, as arguments of `train`; files are written into `folder`."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (M, N_X), dtype=np.uint8), random.integers(0, 2, (1, M))
    np.save(folder / "rows.npy", pixels)
    np.save(folder / "rows_labels.npy", labels[0])
    for kind, ending in (("cat", "jpg"), ("dog", "png")):
        (folder / "photographs" / kind).mkdir(parents=True)
        for k in range(12):
            picture = Image.fromarray(random.integers(0, 256, (30, 26, 3), dtype=np.uint8))
            picture.save(folder / "photographs" / kind / f"{k}.{ending}")
    return {
        "uint8": {"X": pixels.T, "Y": labels},
        "floats": {"X": random.standard_normal((M, N_X)).astype(dtype).T, "Y": labels},
        "softmax": {"X": pixels.T, "Y": np.arange(M).reshape(1, -1) % 3},
        "streamed": {"data": folder / "rows.npy", "memory_limit": 2 * 4 * WINDOW * N_X},
        "photographs": {"data": folder / "photographs", "img_shape": (20, 20)},
    }


def trained(arguments: dict[str, Any]) -> str:
    """Digests the weights, the optimizer's state and the mini-batch losses of a run."""
    result = catopt_xp.train(**RUN | arguments)
    assert result.engine == arguments["engine"]
    assert (result.history.run["window"] is None) == ("memory_limit" not in arguments), "streamed, or not"
    arrays = {f"optimizer/{name}": value for name, value in result.optimizer.save().items()}
    return digest({**result.model.save(), **arrays, "losses": result.history.mini_batch_loss})


def fitted(model: Any, X: Any, y: Any, weights: Any = None) -> str:
    """Digests the coefficients and the loss curve of an estimator."""
    model.fit(X, y, weights)
    arrays = {f"W{k}": x for k, x in enumerate(model.coefs_)} | {f"b{k}": x for k, x in enumerate(model.intercepts_)}
    return digest(arrays | {"losses": getattr(model, "loss_curve_", [])})


def bits(folder: Path, dtype: str) -> dict[str, str]:
    """Lists the digests of runs and fits by case."""
    folder.mkdir()
    kinds, found = sets(folder, dtype), {}
    for engine in ("plain", "panels"):
        for (kind, given), (name, rule) in product(kinds.items(), RULES.items()):
            found[f"{kind}, {name}, {engine}, {dtype}"] = trained({**given, **rule, "engine": engine, "dtype": dtype})
        for name in list(OPTIONS)[0 if engine == "plain" else 2 :]:
            given = {**kinds["uint8"], **OPTIONS[name], "engine": engine, "dtype": dtype}
            if name == "resumed":
                half = catopt_xp.train(**RUN | given | {"total_epoch": 2, "save_dir": folder, "model_name": engine})
                given["recover_from"] = half.checkpoint
            found[f"{name}, {engine}, {dtype}"] = trained(given)
    random = np.random.default_rng(1)
    X, y, weights = random.standard_normal((M, 12)).astype(dtype), np.arange(M) % 7 % 3, random.random(M)
    for solver in SOLVERS:
        found[f"classifier, {solver}, {dtype}"] = fitted(catopt_xp.MLPClassifier(**FIT, solver=solver), X, y)
        found[f"regressor, {solver}, {dtype}"] = fitted(catopt_xp.MLPRegressor(**FIT, solver=solver), X, X[:, 0] ** 2)
    found[f"classifier, weighed, {dtype}"] = fitted(catopt_xp.MLPClassifier(**FIT), X, y, weights)
    for option, value in (("early_stopping", True), ("class_weight", "balanced")):
        found[f"classifier, {option}, {dtype}"] = fitted(catopt_xp.MLPClassifier(**FIT | {option: value}), X, y)
    return found


def cuda() -> dict[str, str]:
    """Lists the digests of the CUDA sources by network, rule and batch size."""
    found = {}
    for (neurons, hidden, optimizer, batch_size, aligned), products in product(STEPS, PRODUCTS):
        activations = (*[hidden] * (len(neurons) - 2), "softmax" if neurons[-1] > 1 else "sigmoid")
        text = source(StepGeometry(neurons, batch_size, *products), activations, optimizer, aligned)
        name = f"{neurons} {hidden} {optimizer.__name__} {batch_size} {products} aligned={aligned}"
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def names() -> dict[str, str]:
    """Lists the signatures of public names, without addresses of defaults."""
    found = dict.fromkeys(sorted(catopt_xp.__all__), "")  # type: ignore[attr-defined]  # the stub has none
    for name in found:
        with contextlib.suppress(TypeError, ValueError):  # the version, and exceptions that take what Exception does
            found[name] = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(getattr(catopt_xp, name))))
    return found


def run(*arguments: str) -> str:
    """Runs a module in the checkout and returns its stdout."""
    command, environment = [sys.executable, "-m", *arguments], os.environ | {"COLUMNS": "120"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def wheel(folder: Path) -> dict[str, int]:
    """Builds the wheel in `folder` and lists the sizes of its files."""
    run("hatchling", "build", "-t", "wheel", "-d", str(folder))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return {x.filename: x.file_size for x in archive.infolist()}


def write(file: Path) -> None:
    """Writes a record into `file`."""
    assert Path(catopt_xp.__file__).is_relative_to(ROOT), f"{catopt_xp.__file__} is another checkout's"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), limited_threads(2):
        warnings.simplefilter("ignore")  # so few epochs do not converge
        folder = Path(name)
        os.environ["CATOPT_XP_CACHE"] = str(folder / "cache")
        record: dict[str, dict[str, Any]] = {"bits": bits(folder / "32", "float32") | bits(folder / "64", "float64")}
        record |= {"cuda": cuda(), "names": names(), "wheel": wheel(folder)}
        record["help"] = {x: run("catopt_xp", *x.split(), "--help") for x in ("", *COMMANDS)}
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(*(f"{len(part)} {x}" for x, part in record.items()), f"{time.perf_counter() - started:.0f} s", sep=", ")


def compare(old: Path, new: Path) -> bool:
    """Prints what differs between two records, and says whether bits, sources or names do."""
    records = [json.loads(file.read_text()) for file in (old, new)]
    parts = {"bits": "bits: {} of {} cases equal", "cuda": "CUDA sources: {} of {} equal", "names": "public names: {2}"}
    differ = False
    for part, told in parts.items():
        cases = sorted({case for record in records for case in record[part]})
        unequal = [x for x in cases if len({record[part].get(x) for record in records}) > 1]
        print(told.format(len(cases) - len(unequal), len(cases), "different" if unequal else "equal"))
        print(*(f"    {x}\n" for x in unequal), sep="", end="")
        differ |= bool(unequal)
    texts = [{f"{x} --help": text for x, text in record["help"].items()} for record in records]
    for text, record in zip(texts, records, strict=True):
        text |= {x: "".join(f"{k} {v}\n" for k, v in sorted(record[x].items())) for x in ("names", "wheel")}
    for name in sorted({name for text in texts for name in text}):
        before, after = (text.get(name, "").splitlines() for text in texts)
        for line in difflib.unified_diff(before, after, f"old {name}", f"new {name}", lineterm=""):
            print(line)
    return differ


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", file]:
            write(Path(file))
        case ["compare", old, new]:
            sys.exit(compare(Path(old), Path(new)))
        case _:
            sys.exit(__doc__)
