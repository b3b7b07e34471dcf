"""The chapter's nine curves on the built-in drawings as one JSON: cost by epoch, and the hidden units still alive.

The runs are those of `catopt-xp compare`; finished ones in the folder are not trained again. Half an hour or so on two
quiet cores for the three seeds.

    python -m benchmarks.chapter [--seeds 0,1,2] [--save-dir DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import catopt_xp
from catopt_xp.training.history import History

SAMPLES = 500  # evenly spaced ones of the training set, through which a unit counts as alive


def summary(history: History, model: catopt_xp.DeepNetwork, samples: np.ndarray) -> dict[str, Any]:
    """Cost at the evaluated epochs, final accuracies, and the units of each hidden layer that are not always 0."""
    parameters, A, alive = model.save(), samples.T.astype(np.float32) / 255, []  # A: (n_x, m)
    for k in range(len(model.activation_func) - 1):
        A = np.maximum(parameters[f"W{k}"] @ A + parameters[f"b{k}"], 0)
        alive.append(int((A > 0).any(axis=1).sum()))
    return {
        "epochs": history.eval_epoch,
        "cost": [round(x, 4) for x in history.full_train_loss],
        "train_accuracy": round(history.train_accuracy[-1], 4),
        "dev_accuracy": round(history.dev_accuracy[-1], 4),
        "alive_units": alive,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="the first gets all comparisons, the others the batch sizes")
    parser.add_argument("--save-dir", type=Path, default=Path("compare"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--train-size", type=int, help="drawings per class, for a trial")
    arguments = parser.parse_args()
    data = catopt_xp.get_drawn_set(train_size=arguments.train_size or 1000)  # once, for all seeds
    samples = data.train_X.T[:: max(1, data.train_X.shape[1] // SAMPLES)]
    sets = {}
    for place, seed in enumerate(map(int, arguments.seeds.split(","))):
        runs, folder = {}, arguments.save_dir / f"seed{seed}"
        for kind in ("batch-size",) if place else ("batch-size", "optimizers", "decay"):
            catopt_xp.compare(kind, data, arguments.epochs, folder, seed=seed)
        for file in sorted(folder.glob("*.json")):
            model = catopt_xp.load_model(file.with_name(f"{file.stem}_latest.npz"))
            runs[file.stem] = summary(History.from_json(file), model, samples)
        sets[f"seed {seed}"] = runs
    if arguments.json:
        what = f"{data.name}, {data.train_X.shape[1]} samples, plain engine on the CPU"
        arguments.json.write_text(json.dumps({"what": what, "sets": sets}, indent=1) + "\n")


if __name__ == "__main__":
    main()
