"""Write the golden values: what independent libraries compute from the same inputs.

Run ``python tests/helpers/golden/make_golden.py`` with PyTorch (CPU), optax, jax and scikit-learn installed; the
tests need none of them. It writes ``optimizers.json``, ``gradients.json`` and ``schedules.json`` beside
itself. Nothing of the library under test is imported here. All numbers are float64.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optimizer_paths as paths
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
VERSIONS = {name: version(name) for name in ("torch", "optax", "jax", "scikit-learn", "numpy")}


SAMPLES, INPUTS = 5, 3
OUTPUTS = {"sigmoid": 1, "multi-label": 3, "softmax": 4}
NUMBERS = {"identity": 2, "exp": 2}  # outputs that predict numbers
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda Z: Z,
}


def gradient_case(depth: int, activation: str, output: str, rng: np.random.Generator) -> dict[str, Any]:
    """One network of ``depth`` layers: its inputs, loss and all gradients by automatic differentiation."""
    units = [INPUTS, *[4] * (depth - 1), (OUTPUTS | NUMBERS)[output]]
    params = {}
    for k, (n_in, n_out) in enumerate(itertools.pairwise(units)):
        params[f"W{k}"] = torch.tensor((rng.standard_normal((n_out, n_in)) * math.sqrt(2 / n_in)).round(3))
        params[f"b{k}"] = torch.tensor((rng.standard_normal((n_out, 1)) * 0.3).round(3))
    for param in params.values():
        param.requires_grad_(True)
    X = rng.standard_normal((INPUTS, SAMPLES)).round(3)
    Z = torch.tensor(X)
    for k in range(depth):
        Z = params[f"W{k}"] @ (ACTIVATIONS[activation](Z) if k else Z) + params[f"b{k}"]  # (n_out, m)
    if output == "softmax":
        Y = rng.integers(0, OUTPUTS[output], (1, SAMPLES))
        loss = F.cross_entropy(Z.T, torch.tensor(Y[0]))
    elif output == "identity":
        Y = rng.standard_normal((units[-1], SAMPLES)).round(3)
        loss = F.mse_loss(Z, torch.tensor(Y), reduction="sum") / (2 * SAMPLES)
    elif output == "exp":
        Y = rng.integers(0, 4, (units[-1], SAMPLES))
        counts = torch.tensor(Y, dtype=Z.dtype)
        known = torch.special.xlogy(counts, counts) - counts  # the part of the deviance that no weight changes
        loss = (F.poisson_nll_loss(Z, counts, reduction="sum") + known.sum()) / SAMPLES
    else:
        Y = rng.integers(0, 2, (OUTPUTS[output], SAMPLES))
        loss = F.binary_cross_entropy_with_logits(Z, torch.tensor(Y, dtype=Z.dtype), reduction="sum") / SAMPLES
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "name": f"{activation} {output} depth {depth}",
        "neuron_cnt": units,
        "activation_func": [activation] * (depth - 1) + ["sigmoid" if output == "multi-label" else output],
        "X": X.tolist(),
        "Y": Y.tolist(),
        "loss": loss.item(),
        "parameters": {name: param.tolist() for name, param in params.items()},
        "gradients": {name: param.grad.tolist() for name, param in params.items() if param.grad is not None},
    }


def gradient_cases() -> list[dict[str, Any]]:
    rng = np.random.Generator(np.random.PCG64(21))
    cases = [
        gradient_case(depth, activation, output, rng)
        for depth in range(1, 6)
        for activation in ("relu", "sigmoid", "tanh")
        for output in OUTPUTS
        if depth > 1 or activation == "relu"  # one layer has no hidden activation
    ]
    cases += [gradient_case(depth, "identity", output, rng) for depth in (2, 3) for output in OUTPUTS]
    return cases + [gradient_case(depth, "tanh", output, rng) for depth in (1, 2, 3) for output in NUMBERS]


def schedule_case(text: str, schedule: Callable[[torch.optim.Optimizer], Any], epochs: int = 30) -> dict[str, Any]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return {"name": text, "learning_rate_zero": 0.1, "rates": rates}


def schedule_cases() -> list[dict[str, Any]]:
    s = torch.optim.lr_scheduler
    return [
        schedule_case("exponential(0.9)", lambda o: s.ExponentialLR(o, 0.9)),
        schedule_case("staircase(0.5, 7)", lambda o: s.StepLR(o, 7, 0.5)),
        schedule_case("cosine(29)", lambda o: s.CosineAnnealingLR(o, 29)),
        schedule_case("cosine(29, 0.1)", lambda o: s.CosineAnnealingLR(o, 29, eta_min=0.01)),
        schedule_case("warmup(const, 5, 0.25)", lambda o: s.LinearLR(o, 0.25, 1.0, 5)),
        schedule_case("warmup(const, 8)", lambda o: s.LambdaLR(o, lambda epoch: min(epoch / 8, 1.0))),
    ]


def write(name: str, head: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Write one case a line; the file appears whole or not at all."""
    head = {"made by": "tests/helpers/golden/make_golden.py", "versions": VERSIONS, **head}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in cases)
    text = "{\n" + ",\n".join(lines) + ',\n"cases": [\n' + rows + "\n]\n}\n"
    with tempfile.NamedTemporaryFile("w", dir=HERE, suffix=".tmp", delete=False, encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, HERE / name)
    print(f"{name}: {len(cases)} cases, {len(text) / 1000:.0f} kB")


def main() -> None:
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    head = {
        "about": "parameters (W0 by rows, then b0) after kept_steps; an epoch is steps_per_epoch steps",
        "kept_steps": paths.KEPT_STEPS,
        "steps_per_epoch": paths.STEPS_PER_EPOCH,
        "shapes": paths.SHAPES,
        "start": paths.flat(paths.START),
        "gradients": [paths.flat(gradient) for gradient in paths.GRADIENTS],
    }
    write("optimizers.json", head, paths.all_cases())
    write("gradients.json", {"about": "loss is the mean over samples, summed over labels"}, gradient_cases())
    write("schedules.json", {"about": "rates at epochs 0, 1, 2, ..."}, schedule_cases())


if __name__ == "__main__":
    main()
