"""The optimizers of PyTorch, optax and scikit-learn, set so that their rules are ours, and their paths.

No update rule is written here: where a mapping is needed, it is a choice of the library's ``lr`` and ``eps``.
All numbers are float64. Used by ``make_golden.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from sklearn.neural_network._stochastic_optimizers import (  # type: ignore[import-untyped]
    AdamOptimizer,
    SGDOptimizer,
)
from torch.optim import lr_scheduler

STEPS = 200
KEPT_STEPS = (1, 2, 3, 10, 50, 100, 200)
STEPS_PER_EPOCH = 20  # where a schedule is followed
SHAPES = {"W0": (2, 3), "b0": (2, 1)}
LEARNING_RATE = 0.01

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
Groups = list[dict[str, Any]]
Path = list[list[float]]  # the parameters at KEPT_STEPS


def start_and_gradients() -> tuple[Arrays, list[Arrays]]:
    """Draw the first parameters and 200 gradients over four decades, rounded so that the file stays short."""
    rng = np.random.Generator(np.random.PCG64(20))
    start = {name: rng.standard_normal(shape).round(3) for name, shape in SHAPES.items()}
    gradients = []
    for _ in range(STEPS):
        gradient = {}
        for name, shape in SHAPES.items():
            draw = 10 ** rng.uniform(-4, 0, shape) * rng.choice([-1, 1], shape)
            gradient[name] = draw.round(7)
        gradients.append(gradient)
    return start, gradients


START, GRADIENTS = start_and_gradients()


def flat(arrays: Mapping[str, Any]) -> list[float]:
    return [float(x) for name in SHAPES for x in np.asarray(arrays[name]).ravel()]


def torch_path(
    optimizer_of: Callable[[Groups], torch.optim.Optimizer],
    *,
    weight_decay: float | None = None,
    before_step: Callable[[dict[str, Any], int], None] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip_norm: float | None = None,
) -> Path:
    """``weight_decay`` goes to the weights alone; ``before_step(group, t)`` may set a group's lr and eps."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
    groups: Groups = [{"params": [params["W0"]]}, {"params": [params["b0"]]}]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
        groups[1]["weight_decay"] = 0.0
    optimizer = optimizer_of(groups)
    scheduler = schedule(optimizer) if schedule else None
    kept = []
    for t, gradient in enumerate(GRADIENTS, start=1):
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        if before_step is not None:
            for group in optimizer.param_groups:
                before_step(group, t)
        optimizer.step()
        if scheduler is not None and t % STEPS_PER_EPOCH == 0:
            scheduler.step()
        if t in KEPT_STEPS:
            kept.append(flat({name: param.detach().numpy() for name, param in params.items()}))
    return kept


def optax_path(rule_at: Callable[[int], Any]) -> Path:
    """``rule_at(t)`` may change with the step as long as its state keeps its form."""
    params: Any = {name: jax.numpy.asarray(value) for name, value in START.items()}
    state = rule_at(1).init(params)
    kept = []
    for t, gradient in enumerate(GRADIENTS, start=1):
        grads: Any = {name: jax.numpy.asarray(value) for name, value in gradient.items()}
        updates, state = rule_at(t).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if t in KEPT_STEPS:
            kept.append(flat(params))
    return kept


def sklearn_path(optimizer_of: Callable[[list[Any]], Any], rate_of_epoch: Callable[[int], float] | None = None) -> Path:
    """``rate_of_epoch``: the learning rate that is set when an epoch begins."""
    params = [START[name].copy() for name in SHAPES]
    optimizer = optimizer_of(params)
    kept = []
    for t, gradient in enumerate(GRADIENTS, start=1):
        optimizer.update_params(params, [gradient[name] for name in SHAPES])
        if rate_of_epoch is not None and t % STEPS_PER_EPOCH == 0:
            optimizer.learning_rate = rate_of_epoch(t // STEPS_PER_EPOCH)
        if t in KEPT_STEPS:
            kept.append(flat(dict(zip(SHAPES, params, strict=True))))
    return kept


def chain(*rules: Any) -> Callable[[int], Any]:
    whole = optax.chain(*rules, optax.scale(-LEARNING_RATE))
    return lambda t: whole


def decoupled(decay: float) -> Any:
    return optax.add_decayed_weights(decay, mask={"W0": True, "b0": False})


def case(name: str, path: Path, optimizer: str, **arguments: Any) -> dict[str, Any]:
    """``name``: what it shows, and whose path it is; ``optimizer(**arguments)``: ours that must follow it."""
    arguments = {"learning_rate": LEARNING_RATE, **arguments}
    return {"name": name, "optimizer": optimizer, "arguments": arguments, "parameters": path}


def gradient_descent_cases() -> list[dict[str, Any]]:
    def sgd(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=LEARNING_RATE)

    def stairs(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.StepLR(optimizer, 3, 0.5)

    by_stairs = {"lr_scheduler": "staircase(0.5, 3)"}
    gd = "GradientDescent"
    return [
        case("torch SGD", torch_path(sgd), gd),
        case("torch SGD weight_decay", torch_path(sgd, weight_decay=0.1), gd, l2=0.1),
        case("torch SGD StepLR", torch_path(sgd, schedule=stairs), gd, **by_stairs),
        case("torch SGD clip_grad_norm_", torch_path(sgd, clip_norm=0.5), gd, clip_norm=0.5),
        case("optax add_decayed_weights", optax_path(chain(decoupled(0.1))), gd, weight_decay=0.1),
    ]


def momentum_cases() -> list[dict[str, Any]]:
    b = 0.9

    # v = b*v + (1-b)*g is (1-b) times PyTorch's buffer, so its lr carries that factor. Its dampening=1-b
    # would not do: the first step leaves it out.
    def heavy(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=LEARNING_RATE * (1 - b), momentum=b)

    def nesterov(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=LEARNING_RATE * (1 - b), momentum=b, nesterov=True)

    def fading(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ExponentialLR(optimizer, 0.8)

    def velocity(nesterov: bool) -> Callable[[list[Any]], Any]:
        return lambda params: SGDOptimizer(params, LEARNING_RATE, momentum=b, nesterov=nesterov)

    def stairs(epoch: int) -> float:
        return float(LEARNING_RATE * 0.5 ** (epoch // 3))

    ema, corrected = optax.ema(b, debias=False), optax.ema(b, debias=True)
    by_stairs = {"beta": b, "rate_inside": True, "lr_scheduler": "staircase(0.5, 3)"}
    by_exponential = {"beta": b, "lr_scheduler": "exponential(0.8)"}
    look_ahead_decayed = torch_path(nesterov, weight_decay=0.1)
    look_ahead = {"beta": b, "nesterov": True}
    m = "Momentum"
    return [
        case("torch SGD momentum", torch_path(heavy), m, beta=b),
        case("torch SGD momentum decay", torch_path(heavy, weight_decay=0.1), m, beta=b, l2=0.1),
        case("torch SGD momentum ExponentialLR", torch_path(heavy, schedule=fading), m, **by_exponential),
        case("torch SGD nesterov", torch_path(nesterov), m, **look_ahead),
        case("torch SGD nesterov decay", look_ahead_decayed, m, **look_ahead, l2=0.1),
        case("scikit-learn SGDOptimizer", sklearn_path(velocity(False)), m, beta=b, rate_inside=True),
        case("scikit-learn SGDOptimizer nesterov", sklearn_path(velocity(True)), m, **look_ahead, rate_inside=True),
        case("scikit-learn SGDOptimizer, rates by epoch", sklearn_path(velocity(False), stairs), m, **by_stairs),
        case("optax ema", optax_path(chain(ema)), m, beta=b),
        case("optax ema debias", optax_path(chain(corrected)), m, beta=b, correct_param=True),
        case("optax ema decayed", optax_path(chain(ema, decoupled(0.1))), m, beta=b, weight_decay=0.1),
    ]


def rmsprop_cases() -> list[dict[str, Any]]:
    lr, b, eps = LEARNING_RATE, 0.9, 1e-6

    def rms(inside: bool, corrected: bool) -> Any:
        return optax.scale_by_rms(b, eps, eps_in_sqrt=inside, bias_correction=corrected)

    def rmsprop(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=lr, alpha=b, eps=eps)

    def fold_the_correction(group: dict[str, Any], t: int) -> None:
        group["lr"] = lr * math.sqrt(1 - b**t)

    def wave(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.1 * lr)

    given = {"beta": b, "eps": eps}
    outside = {**given, "eps_mode": "outside"}
    outside_raw = {**outside, "correct_param": False}
    by_cosine = {**outside_raw, "lr_scheduler": "cosine(10, 0.1)"}
    inside_raw = {**given, "correct_param": False}
    folded = torch_path(rmsprop, before_step=fold_the_correction)
    decayed = optax_path(chain(rms(True, True), decoupled(0.1)))
    r = "RMSProp"
    return [
        case("optax rms, eps inside", optax_path(chain(rms(True, True))), r, **given),
        case("optax rms, eps inside, raw", optax_path(chain(rms(True, False))), r, **inside_raw),
        case("optax rms, eps outside", optax_path(chain(rms(False, True))), r, **outside),
        case("optax rms, eps inside, decayed", decayed, r, **given, weight_decay=0.1),
        case("torch RMSprop", torch_path(rmsprop), r, **outside_raw),
        case("torch RMSprop, correction folded into lr", folded, r, **given, eps_mode="hat"),
        case("torch RMSprop weight_decay", torch_path(rmsprop, weight_decay=0.1), r, **outside_raw, l2=0.1),
        case(
            "torch RMSprop clip_grad_norm_",
            torch_path(rmsprop, clip_norm=0.5),
            r,
            **outside_raw,
            clip_norm=0.5,
        ),
        case("torch RMSprop CosineAnnealingLR", torch_path(rmsprop, schedule=wave), r, **by_cosine),
    ]


def adam_cases() -> list[dict[str, Any]]:
    lr, b1, b2, eps = LEARNING_RATE, 0.9, 0.999, 1e-8

    def adam(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=lr, betas=(b1, b2), eps=eps)

    def adamw(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, betas=(b1, b2), eps=eps)

    def undo_the_correction(group: dict[str, Any], t: int) -> None:
        c1, root_c2 = 1 - b1**t, math.sqrt(1 - b2**t)
        group["lr"], group["eps"] = lr * c1 / root_c2, eps / root_c2

    def sklearn_adam(params: list[Any]) -> Any:
        return AdamOptimizer(params, lr, b1, b2, eps)

    def inside_raw(t: int) -> Any:
        c1, c2 = 1 - b1**t, 1 - b2**t
        rule = optax.scale_by_adam(b1, b2, eps=0.0, eps_root=eps / c2)
        return optax.chain(rule, optax.scale(-lr * c1 / math.sqrt(c2)))

    def hyperbola(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + 0.2 * epoch))

    rule = optax.scale_by_adam(b1, b2, eps)
    inside_rule = optax.scale_by_adam(b1, b2, eps=0.0, eps_root=eps)
    given: dict[str, Any] = {"beta1": b1, "beta2": b2, "eps": eps}
    raw = {**given, "correct_param": False}
    inside, hat = {"eps_mode": "inside"}, {"eps_mode": "hat"}
    slower = {**given, "lr_scheduler": "hyperbola(0.2)"}
    slower_w = torch_path(adamw, weight_decay=0.1, schedule=hyperbola)
    clipped = torch_path(adam, clip_norm=0.5)
    clipped_l2 = torch_path(adam, clip_norm=0.5, weight_decay=0.1)
    a = "Adam"
    return [
        case("torch Adam", torch_path(adam), a, **given),
        case("torch Adam weight_decay", torch_path(adam, weight_decay=0.1), a, **given, l2=0.1),
        case("torch Adam LambdaLR", torch_path(adam, schedule=hyperbola), a, **slower),
        case("torch Adam, correction undone", torch_path(adam, before_step=undo_the_correction), a, **raw),
        case("torch Adam clip_grad_norm_", clipped, a, **given, clip_norm=0.5),
        case("torch Adam clip_grad_norm_, then weight_decay", clipped_l2, a, **given, clip_norm=0.5, l2=0.1),
        case("torch AdamW", torch_path(adamw, weight_decay=0.1), a, **given, weight_decay=0.1),
        case("torch AdamW LambdaLR", slower_w, a, **slower, weight_decay=0.1),
        case("optax adam", optax_path(chain(rule)), a, **given),
        case("optax adam eps_root", optax_path(chain(inside_rule)), a, **given, **inside),
        case("optax adam eps_root, correction undone", optax_path(inside_raw), a, **raw, **inside),
        case("scikit-learn AdamOptimizer", sklearn_path(sklearn_adam), a, **given, **hat),
    ]


def preset_cases() -> list[dict[str, Any]]:
    """The libraries' own defaults, at their own learning rate."""
    lr = LEARNING_RATE
    keras_rms = optax.scale_by_rms(0.9, 1e-7)  # eps inside the root, no correction
    # Corrections folded into lr alone, with the eps of Keras.
    keras_adam = sklearn_path(lambda params: AdamOptimizer(params, lr, 0.9, 0.999, 1e-7))
    made = [
        case("torch SGD", torch_path(lambda g: torch.optim.SGD(g, lr)), "GradientDescent"),
        case("torch SGD", torch_path(lambda g: torch.optim.SGD(g, lr, momentum=0.9)), "Momentum"),
        case("torch RMSprop", torch_path(lambda g: torch.optim.RMSprop(g, lr)), "RMSProp"),
        case("torch Adam", torch_path(lambda g: torch.optim.Adam(g, lr)), "Adam"),
        case("keras RMSprop as optax has it", optax_path(chain(keras_rms)), "RMSProp"),
        case("keras Adam as scikit-learn has it", keras_adam, "Adam"),
    ]
    return [{**row, "preset": row["name"].split()[0]} for row in made]


def all_cases() -> list[dict[str, Any]]:
    """Every case, by optimizer; jax must be in float64 mode."""
    return gradient_descent_cases() + momentum_cases() + rmsprop_cases() + adam_cases() + preset_cases()
