"""The optimizer update alone, over the 4.5 million parameters of the reference network: ours, and PyTorch's fused one.

Both read a gradient that lies ready and change parameters and moments in place. RMSProp has PyTorch's form here (eps
outside the root, no correction), so that both compute the same; PyTorch has no fused one of it and takes its default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from catopt_xp import Backend, BaseOptimizer, DeepNetwork, get_backend, make_optimizer
from catopt_xp.nn.parameters import Parameters

LAYOUT = [224 * 224 * 3, 30, 20, 20, 1]
ACTIVATIONS = ["relu", "relu", "relu", "sigmoid"]
RATES = {"gd": 1e-3, "momentum": 1e-3, "rmsprop": 1e-5, "adam": 1e-5}
OPTIONS: dict[str, dict[str, Any]] = {"rmsprop": {"eps": 1e-8, "eps_mode": "outside", "correct_param": False}}
STEPS, BOUND = 5, 1e-3  # of the check; weights of size 1, rounded to float32, moved by 5e-5: hence this bound
ROUNDS, WARMUP = 20, 3


def seeded_gradient(like: Parameters) -> Parameters:
    """A gradient of the size that the reference network has at its start, on the device of the parameters."""
    gradient, rng = like.zeros_like(), np.random.Generator(np.random.PCG64(1))
    gradient.copy_from({name: 1e-2 * rng.standard_normal(p.shape, dtype=np.float32) for name, p in like.items()})
    return gradient


def our_update(name: str, layout: list[int], backend: Backend) -> tuple[BaseOptimizer, Parameters]:
    """The optimizer of a new network on the device, and a gradient for it."""
    model = DeepNetwork(layout, ACTIVATIONS).to(backend)
    return make_optimizer(name, model.save(), RATES[name], **OPTIONS.get(name, {})), seeded_gradient(model.save())


def torch_update(torch: Any, name: str, start: Mapping[str, Any], gradient: Parameters) -> tuple[Any, dict[str, Any]]:
    """PyTorch's optimizer of the same rule, and its parameters: copies of `start`, with the gradient in place."""
    weights = {key: torch.tensor(p) for key, p in start.items()}
    for key, weight in weights.items():
        weight.grad = torch.tensor(gradient[key])
    values, rate = list(weights.values()), RATES[name]
    if name == "adam":
        return torch.optim.Adam(values, rate, eps=1e-8, fused=True), weights
    if name == "rmsprop":
        return torch.optim.RMSprop(values, rate, alpha=0.9, eps=1e-8), weights
    beta = 0.9 if name == "momentum" else 0.0
    return torch.optim.SGD(values, rate * (1 - beta), momentum=beta, fused=True), weights


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], start: Mapping[str, Any]) -> float:
    """The largest difference of parameters, relative to the longest way that one has gone."""
    way = max(float(np.abs(ours[key] - start[key]).max()) for key in start)
    return max(float(np.abs(ours[key] - np.asarray(theirs[key])).max()) for key in start) / way


@pytest.fixture(scope="module")
def torch(threads: int) -> Iterator[Any]:
    """PyTorch with as many threads as ours."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed, so it is no peer here")
    before = module.get_num_threads()
    module.set_num_threads(threads)
    yield module
    module.set_num_threads(before)


def measure(benchmark: Any, update: Callable[[], object], optimizer: BaseOptimizer) -> None:
    """Times updates; notes what must be read and written for one, and how fast that was."""
    benchmark.pedantic(update, rounds=ROUNDS, warmup_rounds=WARMUP)
    parameters = sum(math.prod(p.shape) for p in optimizer.param_dict.values())
    arrays = 3 + 2 * len(optimizer.moment_names)  # the gradient is read, all others are read and written
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "parameters": parameters,
        "bytes_per_update": 4 * arrays * parameters,
        "gigabytes_per_second": round(4 * arrays * parameters / seconds / 1e9, 2),
    }


@pytest.mark.parametrize("name", RATES)
def test_ours(benchmark: Any, name: str, backend: Backend) -> None:
    benchmark.group = f"update, {name}"
    optimizer, gradient = our_update(name, LAYOUT, backend)

    def update() -> None:
        optimizer.update(gradient)
        backend.synchronize()

    with backend.activate():
        measure(benchmark, update, optimizer)
    assert optimizer.steps == ROUNDS + WARMUP
    assert bool(backend.xp.isfinite(optimizer.param_dict["W0"]).all())


@pytest.mark.parametrize("name", RATES)
def test_torch(benchmark: Any, name: str, torch: Any) -> None:
    """PyTorch on the CPU, once it is seen to make the same updates."""
    benchmark.group = f"update, {name}"
    optimizer, gradient = our_update(name, LAYOUT, get_backend("cpu"))
    start = {key: p.copy() for key, p in optimizer.param_dict.items()}
    peer, weights = torch_update(torch, name, optimizer.param_dict, gradient)
    for _ in range(STEPS):
        optimizer.update(gradient)
        peer.step()
    assert difference(optimizer.param_dict, {key: p.numpy() for key, p in weights.items()}, start) <= BOUND
    benchmark.extra_info["fused"] = name != "rmsprop"
    measure(benchmark, peer.step, optimizer)
