"""The chapter's four optimizers: gradient descent, Momentum, RMSProp, Adam.

Each rule stands here twice, one above the other: in array operations, which every array module runs, and in
CUDA C++ (`kernel`), which CuPy runs as one launch over all parameters. A test holds the two equal value by value.

In the equations g is the gradient, lr the learning rate of this epoch, t the number of steps, this one included, and
`c = 1 - beta**t` the bias correction (1 where it is off). All moments start at zero.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from catopt_xp.backend.xp import Array, dtype_name
from catopt_xp.optim.averages import bias_correction
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler, const_lr

EPS_MODES = ("inside", "outside", "hat")


class GradientDescent(BaseOptimizer):
    """Gradient descent: `p -= lr * g`.

    `param_dict`: `model.save()` or a dict of float arrays, updated in place; `learning_rate`: per step. Keyword options
    as for `BaseOptimizer`.

    >>> import numpy as np
    >>> p = {"W0": np.array([[1.0]])}
    >>> optimizer = GradientDescent(p, 0.5)
    >>> optimizer.add_grad({"W0": np.array([[1.0]])})
    >>> optimizer.step()
    >>> p["W0"]
    array([[0.5]])
    """

    @staticmethod
    def rule(xp: Any, p: Array, g: Array, *, lr: float) -> None:
        """`p -= lr * g`"""
        p -= lr * g

    kernel = "p -= lr * g;"

    def scalars(self) -> dict[str, float]:
        return {"lr": self.learning_rate}


class Momentum(BaseOptimizer):
    """Gradient descent along a moving average of the gradient: `v = beta*v + (1-beta)*g; p -= lr * v/c`.

    `beta`: in [0, 1). `from_scratch`: accepted and needless. `nesterov`: look ahead, `p -= lr*(beta*v + (1-beta)*g)`
    with the new v. `correct_param`: divide v by its bias correction (off in the chapter). `rate_inside`: v is the step
    itself, as scikit-learn and Keras have it: `v = beta*v + lr*g; p -= v` (Nesterov: `p -= beta*v + lr*g`), so that a
    change of the learning rate is felt by and by; beta may be 1 then. The rest as for `BaseOptimizer`.
    The chapter's form (an average, not a sum): PyTorch's SGD takes the same path with `lr*(1-beta)`.

    >>> import numpy as np
    >>> p = {"W0": np.array([[1.0]])}
    >>> optimizer = Momentum(p, 0.5)
    >>> optimizer.update({"W0": np.array([[2.0]])})
    >>> p["W0"]
    array([[0.9]])
    """

    moment_names = ("v",)

    def __init__(
        self,
        param_dict: Mapping[str, Array],
        learning_rate: float,
        beta: float = 0.9,
        from_scratch: bool = False,
        *,
        nesterov: bool = False,
        correct_param: bool = False,
        rate_inside: bool = False,
        lr_scheduler: Scheduler = const_lr,
        **options: Any,
    ) -> None:
        super().__init__(param_dict, learning_rate, lr_scheduler, **options)
        self.beta = 1.0 if rate_inside and beta == 1.0 else _fraction("Momentum", "beta", beta)
        self.nesterov, self.correct_param, self.rate_inside = bool(nesterov), bool(correct_param), bool(rate_inside)
        if correct_param and (nesterov or rate_inside):
            form = "nesterov" if nesterov else "rate_inside"
            raise ValueError(f"Momentum: {form} has no bias-corrected form; choose one of the two")

    @staticmethod
    def rule(xp: Any, p: Array, g: Array, v: Array, *, rate: float, beta: float, alpha: float, nesterov: float) -> None:
        """`v = beta*v + alpha*g; p -= rate*v`: alpha = 1 - beta, rate = lr/c; rate inside: alpha = lr, rate = 1"""
        v *= beta
        v += alpha * g
        if nesterov:
            p -= rate * (beta * v + alpha * g)
        else:
            p -= rate * v

    kernel = "v = beta * v + alpha * g; p -= rate * (nesterov ? beta * v + alpha * g : v);"

    def scalars(self) -> dict[str, float]:
        c = bias_correction(self.beta, self.steps) if self.correct_param else 1.0
        rate, alpha = self.learning_rate / c, 1.0 - self.beta
        if self.rate_inside:
            rate, alpha = 1.0, rate
        return {"rate": rate, "beta": self.beta, "alpha": alpha, "nesterov": float(self.nesterov)}

    @property
    def options(self) -> dict[str, Any]:
        own = {"beta": self.beta, "nesterov": self.nesterov, "correct_param": self.correct_param}
        # Named where it is on, so that runs without it look as they always did to a checkpoint.
        return super().options | own | ({"rate_inside": True} if self.rate_inside else {})

    @classmethod
    def preset(cls, convention: str, param_dict: Mapping[str, Array], learning_rate: float, **options: Any) -> Self:
        """As `BaseOptimizer.preset`; PyTorch and Keras sum the velocity, which is a rate 1/(1-beta) times larger."""
        if convention != "chapter":
            learning_rate = learning_rate / (1.0 - options.get("beta", 0.9))
        return super().preset(convention, param_dict, learning_rate, **options)


class RMSProp(BaseOptimizer):
    """Steps scaled by the gradient's running size: `s = beta*s + (1-beta)*g*g; p -= lr * g / sqrt(s/c + eps)`.

    `beta`: in [0, 1). `eps`: above 0, inside the root as in the chapter. `from_scratch`: accepted and needless.
    `correct_param`: divide s by its bias correction c (on in the chapter). `eps_mode`: "inside" the root, "outside" of
    it, `sqrt(s/c) + eps`, or "hat", outside with the correction folded into lr alone. The rest as for `BaseOptimizer`.

    >>> import numpy as np
    >>> p = {"W0": np.array([[1.0]])}
    >>> optimizer = RMSProp(p, 0.5, eps=1e-12)
    >>> optimizer.update({"W0": np.array([[2.0]])})
    >>> p["W0"]
    array([[0.5]])
    """

    moment_names = ("s",)
    conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "chapter": {},
        "torch": {"beta": 0.99, "eps": 1e-8, "eps_mode": "outside", "correct_param": False},
        "keras": {"beta": 0.9, "eps": 1e-7, "eps_mode": "inside", "correct_param": False},
    }

    def __init__(
        self,
        param_dict: Mapping[str, Array],
        learning_rate: float,
        beta: float = 0.9,
        eps: float = 1e-6,
        from_scratch: bool = False,
        correct_param: bool = True,
        *,
        eps_mode: str = "inside",
        lr_scheduler: Scheduler = const_lr,
        **options: Any,
    ) -> None:
        super().__init__(param_dict, learning_rate, lr_scheduler, **options)
        self.beta = _fraction("RMSProp", "beta", beta)
        self.eps, self.eps_mode = _eps("RMSProp", eps, eps_mode, param_dict)
        self.correct_param = bool(correct_param)

    @staticmethod
    def rule(
        xp: Any,
        p: Array,
        g: Array,
        s: Array,
        *,
        rate: float,
        beta: float,
        alpha: float,
        c: float,
        eps_in: float,
        eps_out: float,
    ) -> None:
        """`s = beta*s + alpha*g*g; p -= rate * g / (sqrt(s/c + eps_in) + eps_out)`, with alpha = 1 - beta"""
        s *= beta
        square = g * g
        square *= alpha
        s += square
        step = g / _root(xp, s, c, eps_in, eps_out)
        step *= rate
        p -= step

    kernel = "s = beta * s + alpha * (g * g); p -= rate * (g / (sqrt(s / c + eps_in) + eps_out));"

    def scalars(self) -> dict[str, float]:
        c = bias_correction(self.beta, self.steps) if self.correct_param else 1.0
        rate, c = _placed(self.learning_rate, c, self.eps_mode)
        alpha = 1.0 - self.beta
        return {"rate": rate, "beta": self.beta, "alpha": alpha, "c": c} | _eps_scalars(self.eps, self.eps_mode)

    @property
    def options(self) -> dict[str, Any]:
        own = {"beta": self.beta, "eps": self.eps, "eps_mode": self.eps_mode, "correct_param": self.correct_param}
        return super().options | own


class Adam(BaseOptimizer):
    """Algorithm 1 of Kingma & Ba (2015): both averages, both corrected, `p -= lr * (m/c1) / (sqrt(v/c2) + eps)`.

    `m = beta1*m + (1-beta1)*g; v = beta2*v + (1-beta2)*g*g`. `beta1`, `beta2`: in [0, 1). `eps`: above 0, outside the
    root. `from_scratch`: accepted and needless. `correct_param=False` leaves c1 = c2 = 1. `eps_mode`: "outside",
    "inside", `sqrt(v/c2 + eps)`, or "hat", the corrections folded into lr but not into eps, as Keras and scikit-learn
    have it.
    With `weight_decay` it is AdamW. The rest as for `BaseOptimizer`.

    >>> import numpy as np
    >>> p = {"W0": np.array([[1.0]])}
    >>> optimizer = Adam(p, 0.5, eps=1e-12)
    >>> optimizer.update({"W0": np.array([[2.0]])})
    >>> p["W0"]
    array([[0.5]])
    """

    moment_names = ("m", "v")
    conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "chapter": {},
        "torch": {},
        "keras": {"eps": 1e-7, "eps_mode": "hat"},
    }

    def __init__(
        self,
        param_dict: Mapping[str, Array],
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        from_scratch: bool = False,
        correct_param: bool = True,
        lr_scheduler: Scheduler = const_lr,
        *,
        eps_mode: str = "outside",
        **options: Any,
    ) -> None:
        super().__init__(param_dict, learning_rate, lr_scheduler, **options)
        self.beta1, self.beta2 = _fraction("Adam", "beta1", beta1), _fraction("Adam", "beta2", beta2)
        self.eps, self.eps_mode = _eps("Adam", eps, eps_mode, param_dict)
        self.correct_param = bool(correct_param)

    @staticmethod
    def rule(
        xp: Any,
        p: Array,
        g: Array,
        m: Array,
        v: Array,
        *,
        rate: float,
        beta1: float,
        alpha1: float,
        beta2: float,
        alpha2: float,
        c2: float,
        eps_in: float,
        eps_out: float,
    ) -> None:
        """`m, v` as above; `p -= rate * m / (sqrt(v/c2 + eps_in) + eps_out)`, with rate = lr/c1 and alpha = 1 - beta"""
        m *= beta1
        m += alpha1 * g
        v *= beta2
        square = g * g
        square *= alpha2
        v += square
        step = m / _root(xp, v, c2, eps_in, eps_out)
        step *= rate
        p -= step

    kernel = (
        "m = beta1 * m + alpha1 * g; v = beta2 * v + alpha2 * (g * g);"
        " p -= rate * (m / (sqrt(v / c2 + eps_in) + eps_out));"
    )

    def scalars(self) -> dict[str, float]:
        c1 = bias_correction(self.beta1, self.steps) if self.correct_param else 1.0
        c2 = bias_correction(self.beta2, self.steps) if self.correct_param else 1.0
        rate, c2 = _placed(self.learning_rate / c1, c2, self.eps_mode)
        betas = {"beta1": self.beta1, "alpha1": 1.0 - self.beta1, "beta2": self.beta2, "alpha2": 1.0 - self.beta2}
        return {"rate": rate, **betas, "c2": c2} | _eps_scalars(self.eps, self.eps_mode)

    @property
    def options(self) -> dict[str, Any]:
        own = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        return super().options | own | {"eps_mode": self.eps_mode, "correct_param": self.correct_param}


def _root(xp: Any, s: Array, c: float, eps_in: float, eps_out: float) -> Array:
    """`sqrt(s/c + eps_in) + eps_out`; one of the two is 0, and adding it is spared, as is dividing by 1."""
    s_hat = s if c == 1.0 else s / c
    if eps_in:
        return xp.sqrt(s_hat + eps_in)
    root = xp.sqrt(s_hat)
    root += eps_out
    return root


def _placed(rate: float, c: float, eps_mode: str) -> tuple[float, float]:
    """Rate and correction of the second moment; "hat" moves the latter into the former and leaves eps as it is."""
    return (rate * math.sqrt(c), 1.0) if eps_mode == "hat" else (rate, c)


def _eps_scalars(eps: float, eps_mode: str) -> dict[str, float]:
    inside = eps_mode == "inside"
    return {"eps_in": eps if inside else 0.0, "eps_out": 0.0 if inside else eps}


def _fraction(owner: str, name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: {name} is {value}; it must be at least 0 and below 1")
    return float(value)


def _eps(owner: str, eps: float, eps_mode: str, param_dict: Mapping[str, Array]) -> tuple[float, str]:
    """Checked eps: where it rounds to 0 a parameter whose gradient is always 0 would become 0/0."""
    for name, p in param_dict.items():
        if not (math.isfinite(eps) and np.dtype(dtype_name(p)).type(eps) > 0):
            raise ValueError(
                f"{owner}: eps is {eps}, which is not above 0 in {name}'s {dtype_name(p)}; give a larger one"
            )
    if eps_mode not in EPS_MODES:
        raise ValueError(f"{owner}: unknown eps_mode {eps_mode!r}; choose {', '.join(EPS_MODES)}")
    return float(eps), eps_mode


# Name on the command line -> class and the chapter's learning rate for it.
OPTIMIZERS: dict[str, tuple[type[BaseOptimizer], float]] = {
    "gd": (GradientDescent, 1e-3),
    "momentum": (Momentum, 1e-3),
    "rmsprop": (RMSProp, 1e-5),
    "adam": (Adam, 1e-5),
}


def make_optimizer(
    name: str, param_dict: Mapping[str, Array], learning_rate: float | None = None, **options: Any
) -> BaseOptimizer:
    """An optimizer by name: gd, momentum, rmsprop or adam (or the name of its class, in any case).

    `learning_rate`: None takes the chapter's, 1e-3 for gd and momentum, 1e-5 for rmsprop and adam. `options`: keyword
    options of the class. Raises ValueError for an unknown name, listing the known ones, and for an unknown option.

    >>> import numpy as np
    >>> make_optimizer("Adam", {"W0": np.zeros((1, 1))}).learning_rate
    1e-05
    """
    for known, (cls, default_rate) in OPTIMIZERS.items():
        if name.lower() in (known, cls.__name__.lower()):
            for option in options:
                if option not in _option_names(cls):
                    raise ValueError(f"{known} has no option {option!r}; it takes {', '.join(_option_names(cls))}")
            return cls(param_dict, default_rate if learning_rate is None else learning_rate, **options)
    raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(OPTIMIZERS)}")


def _option_names(cls: type[BaseOptimizer]) -> list[str]:
    """What may be given by name besides parameters and learning rate, the class's own options first."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if issubclass(base, BaseOptimizer):
            names |= dict.fromkeys(inspect.signature(base.__init__).parameters)
    return [name for name in names if name not in ("self", "param_dict", "learning_rate", "options", "from_scratch")]
