"""What every optimizer shares: learning rate and schedule, gradients, moments, decay, clipping, save and load.

The rules themselves are in `rules.py`. This module applies a rule to all parameters: on a CPU slice by slice,
each slice small enough to stay in cache for the whole rule; on a GPU as one kernel launch.
"""

from __future__ import annotations

import abc
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np

from catopt_xp.backend.threads import deal
from catopt_xp.backend.xp import Array, Backend, as_array, backend_of, dtype_name
from catopt_xp.io.console import warn
from catopt_xp.nn.parameters import Parameters, check_matches, is_bias
from catopt_xp.optim.schedules import Scheduler, const_lr, describe

# Elements per slice of an update on a CPU: the arrays of a slice stay in cache for the whole rule, and each operation
# is long enough that threads seldom wait for one another.
SLICE = 65536
# A moment whose gradient has become 0 shrinks until it is subnormal and stays there, and a CPU works on such numbers
# many times slower: every so many steps they are set to 0 (a GPU's kernels never form them).
FLUSH_EVERY = 32
MOST_STEPS = 1 << 53  # which nobody makes: a larger number in a file is no number of steps or epochs
CLIP_EPS = 1e-6  # keeps a zero gradient's norm from dividing by zero; PyTorch's value


@dataclass
class _Group:
    """Arrays that are updated together: the first `decayed` elements are weights, the rest biases."""

    parameter: Array
    moments: tuple[Array, ...]
    decayed: int

    def slices(self) -> list[tuple[Any, bool]]:
        """Pieces of at most SLICE elements, each with whether decay applies; the caller's own arrays come whole."""
        p = self.parameter
        if p.ndim != 1:  # an array of the caller's, of any strides
            return [(..., self.decayed > 0)]
        bounds = [*range(0, self.decayed, SLICE), *range(self.decayed, p.shape[0], SLICE), p.shape[0]]
        return [(slice(a, b), b <= self.decayed) for a, b in itertools.pairwise(bounds)]


class BaseOptimizer(abc.ABC):
    """Common to every optimizer: the learning rate and its schedule, accumulated gradients, moments, save and load.

    `param_dict`: `model.save()`, or any dict of float arrays; they are updated in place. Names `b0, b1, …` are biases.
    `learning_rate`: at epoch 0, per step, positive. `lr_scheduler`: `(learning_rate, epoch) -> learning rate`.
    `weight_decay`: decoupled, `p -= lr*weight_decay*p` before the step (Loshchilov & Hutter 2019); `l2`: coupled,
    `g += l2*p`; both leave biases alone. `clip_norm`: the global gradient norm is scaled down to this.
    `l2_per_batch`: `l2` belongs to the sum of a batch's losses, as scikit-learn's alpha does: `g += l2/samples * p`.

    Raises ValueError for a number out of range, TypeError for a schedule that is no function, ValueError or TypeError
    for what cannot be updated in place.
    """

    moment_names: ClassVar[tuple[str, ...]] = ()
    kernel: ClassVar[str] = ""  # the rule in CUDA C++: p, g, the moments by name, scalars by name
    conventions: ClassVar[dict[str, dict[str, Any]]] = {"chapter": {}, "torch": {}, "keras": {}}
    samples: float = 1.0
    """Samples of the batch that the next step is made from, or the sum of their weights; set by the engine."""

    def __init__(
        self,
        param_dict: Mapping[str, Array],
        learning_rate: float,
        lr_scheduler: Scheduler = const_lr,
        *,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        clip_norm: float | None = None,
        l2_per_batch: bool = False,
    ) -> None:
        name = type(self).__name__
        self.param_dict = param_dict
        for key, array in {} if isinstance(param_dict, Parameters) else param_dict.items():
            _check_parameter(f"{name}: {key}", array)
        self.learning_rate_zero = _number(name, "learning_rate", learning_rate, "positive")
        if not callable(lr_scheduler):
            raise TypeError(f"{name}: lr_scheduler is {lr_scheduler!r}; give a function (learning_rate, epoch) -> rate")
        self.lr_scheduler = lr_scheduler
        self.weight_decay = _number(name, "weight_decay", weight_decay, "at least 0")
        self.l2 = _number(name, "l2", l2, "at least 0")
        self.l2_per_batch = bool(l2_per_batch)
        self.clip_norm = None if clip_norm is None else _number(name, "clip_norm", clip_norm, "positive")
        self.epoch: float = 0
        self.steps = 0
        self._moments: dict[str, Mapping[str, Array]] = {k: _zeros_like(param_dict) for k in self.moment_names}
        self._gradient: Mapping[str, Array] | None = None

    @classmethod
    def preset(cls, convention: str, param_dict: Mapping[str, Array], learning_rate: float, **options: Any) -> Self:
        """This optimizer with the defaults of a convention: "chapter", "torch" or "keras"; `options` override them.

        The learning rate is the one that library would be given. Raises ValueError for an unknown convention.
        """
        if convention not in cls.conventions:
            raise ValueError(f"unknown convention {convention!r}; choose {', '.join(cls.conventions)}")
        return cls(param_dict, learning_rate, **(cls.conventions[convention] | options))

    # --- the rule -----------------------------------------------------------------------------------------------

    rule: ClassVar[Callable[..., None]]
    """`rule(xp, p, g, *moments, **scalars)`: updates p and the moments in place, in array operations."""

    @abc.abstractmethod
    def scalars(self) -> dict[str, float]:
        """The numbers of the rule at the present step and epoch, computed in float64 on the host."""

    @property
    def _has_kernel(self) -> bool:
        """Whether the class that wrote this rule wrote its CUDA text too: a rule alone runs as array operations."""
        writer = next(kind for kind in type(self).__mro__ if "rule" in vars(kind))
        return "kernel" in vars(writer)

    # --- learning rate ------------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The learning rate now: the schedule at the present epoch (a fraction when scheduled by step)."""
        rate = float(self.lr_scheduler(self.learning_rate_zero, self.epoch))
        if not 0.0 <= rate < math.inf:
            told = f"the schedule {describe(self.lr_scheduler)} gives {rate} at epoch {self.epoch:g}"
            raise ValueError(f"{told}; a learning rate is finite and not negative")
        return rate

    @property
    def step_l2(self) -> float:
        """The factor of coupled L2 in the next step: `l2`, or `l2 / samples` with `l2_per_batch`."""
        return self.l2 / self.samples if self.l2_per_batch else self.l2

    def increase_epoch(self) -> None:
        """Says that an epoch has ended, for the schedule."""
        self.epoch = math.floor(self.epoch) + 1

    # --- gradients and step -------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forgets the accumulated gradient."""
        for array in _arrays(self._gradient or {}):
            array[...] = 0

    def add_grad(self, grad_dict: Mapping[str, Array], weight: float = 1.0) -> None:
        """Adds `weight * gradient` to the sum that the next `step` uses; the arrays are copied, not kept.

        Raises ValueError, naming the key, when names or shapes differ from those of the parameters, TypeError for what
        is no array of real numbers; nothing is added then.
        """
        grad_dict = _taken(grad_dict, self.param_dict, f"{type(self).__name__}.add_grad")
        if self._gradient is None:
            self._gradient = _zeros_like(self.param_dict)
        for total, gradient in _pairs(self._gradient, grad_dict):
            total += gradient if weight == 1.0 else gradient * weight

    def step(self) -> None:
        """One update with the accumulated gradient. Raises RuntimeError when there is none."""
        if self._gradient is None:
            raise RuntimeError(f"{type(self).__name__}.step: there is no gradient; call add_grad first")
        self.update(self._gradient)

    def update(self, grad_dict: Mapping[str, Array]) -> None:
        """One update with this gradient, read where it lies: `zero_grad, add_grad, step` without the copy."""
        gradients = _in_groups(grad_dict, self.param_dict)
        scalars = self.advance()
        clip = self._clip_factor(gradients)
        for group, gradient in zip(self._groups(), gradients, strict=True):
            self._update_group(group, gradient, scalars, clip)

    def advance(self) -> dict[str, float]:
        """Counts a step and returns its numbers: the first half of `update`, for an engine that updates by parts."""
        self.steps += 1
        return self.scalars()

    def update_after(self, name: str, gradient: Parameters, scalars: dict[str, float]) -> None:
        """Updates all parameters but the first, `name`, which an engine updates itself; without clipping.

        `gradient`: of the layout of the parameters, which are a model's; `scalars`: what `advance` returned.
        """
        (group,) = self._groups()
        rest = slice(math.prod(gradient.shapes[name]), None)
        others = _Group(group.parameter[rest], tuple(m[rest] for m in group.moments), group.decayed - rest.start)
        self._update_group(others, gradient.flat[rest], scalars, None)

    def flat_state(self) -> list[Array]:
        """The parameters and each of their moments as flat arrays, in which a model's lie one behind the other."""
        (group,) = self._groups()
        return [group.parameter, *group.moments]

    def _update_group(self, group: _Group, gradient: Array, scalars: dict[str, float], clip: Array | None) -> None:
        backend = backend_of(group.parameter)
        if backend.fuses and self._has_kernel:
            self._update_fused(backend, group, gradient, scalars, clip)
        else:
            self._update_sliced(backend, group, gradient, scalars, clip)

    def _clip_factor(self, gradients: list[Array]) -> Array | None:
        """`min(1, clip_norm / norm)` over all gradients, 0-d, left on the device; None without clipping."""
        if self.clip_norm is None:
            return None
        xp = backend_of(gradients[0]).xp
        # In order of the elements, however they lie in memory: sums have the same bits then.
        squares = [xp.sum(xp.square(xp.reshape(g, (-1,)))) for g in gradients]
        norm = xp.sqrt(xp.sum(xp.stack(squares)))
        return xp.clip(self.clip_norm / (norm + CLIP_EPS), None, 1.0)

    def _update_sliced(
        self, backend: Backend, group: _Group, g: Array, scalars: dict[str, float], clip: Array | None
    ) -> None:
        """The rule over slices that stay in cache, dealt into tasks; values do not depend on how it is cut."""
        p, moments = group.parameter, group.moments
        shrink, l2 = 1.0 - self.learning_rate * self.weight_decay, self.step_l2

        def update(slices: Sequence[tuple[Any, bool]]) -> None:
            for part, decayed in slices:
                weights, gradient = p[part], g[part]
                if clip is not None:
                    gradient = gradient * clip
                if l2 and decayed:
                    penalty = l2 * weights
                    penalty += gradient
                    gradient = penalty
                if self.weight_decay and decayed:
                    weights *= shrink
                state = [moment[part] for moment in moments]
                self.rule(backend.xp, weights, gradient, *state, **scalars)
                if self.steps % FLUSH_EVERY == 0:
                    flush_subnormals(backend.xp, state)

        slices = group.slices()
        if len(slices) < backend.tasks:
            update(slices)
        else:
            backend.run([partial(update, share) for share in deal(slices, backend.tasks)])

    def _update_fused(
        self, backend: Backend, group: _Group, g: Array, scalars: dict[str, float], clip: Array | None
    ) -> None:
        """One kernel launch over the whole group; scalars travel as kernel arguments."""
        values = scalars | {"l2": self.step_l2, "shrink": 1.0 - self.learning_rate * self.weight_decay}
        body = (
            ("T g = gradient * clip[0]; " if clip is not None else "T g = gradient; ")
            + "if (i < decayed) { g += l2 * p; p *= shrink; } "
            + self.kernel
        )
        inputs = ["T gradient", "int64 decayed", *(f"T {name}" for name in values)]
        arguments = [g, group.decayed, *values.values()]
        if clip is not None:
            inputs.append("raw T clip")
            arguments.append(clip)
        outputs = ", ".join(["T p", *(f"T {name}" for name in self.moment_names)])
        name = f"catopt_xp_{type(self).__name__.lower()}"
        launch = backend.elementwise(name, ", ".join(inputs), outputs, body)
        with backend.activate():
            launch(*arguments, group.parameter, *group.moments)

    # --- state --------------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options by name, JSON-able: what a checkpoint says of this optimizer."""
        described = {
            "learning_rate": self.learning_rate_zero,
            "lr_scheduler": describe(self.lr_scheduler),
            "weight_decay": self.weight_decay,
            "l2": self.l2,
            "clip_norm": self.clip_norm,
        }
        return described | ({"l2_per_batch": True} if self.l2_per_batch else {})

    def save(self) -> dict[str, Any]:
        """State by name: `steps`, `epoch`, and a live array for each moment of each parameter (`m/W0`, …)."""
        moments = {f"{k}/{name}": x for k, by_name in self._moments.items() for name, x in by_name.items()}
        return {"name": type(self).__name__, "steps": self.steps, "epoch": self.epoch, **moments}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a saved state, copying into the live arrays.

        The state of another kind of optimizer gives its epoch alone: moments and steps start at zero, with a warning.
        Raises ValueError naming a missing, foreign or misshapen key, TypeError for what is no array of real numbers;
        nothing is changed then.
        """
        own, saved = type(self).__name__, str(state_dict.get("name", type(self).__name__))
        for key in ("steps", "epoch"):
            if key not in state_dict:
                raise ValueError(f"{own}.load: {key} is missing")
            number, is_number = state_dict[key], isinstance(state_dict[key], Real)
            if not is_number or not 0 <= number < MOST_STEPS:
                raise ValueError(f"{own}.load: {key} is {number!r}; it must be a number of at least 0")
        moments = {k: v for k, v in state_dict.items() if k not in ("name", "steps", "epoch")}
        if saved != own:
            self.epoch = state_dict["epoch"]
            self.reset()
            warn(f"the state is that of {saved}, this is {own}: its moments and step count start at zero")
            return
        steps, epoch = int(state_dict["steps"]), state_dict["epoch"]
        here = {k: x for k, x in self.save().items() if "/" in k}
        check_matches(moments, {k: tuple(x.shape) for k, x in here.items()}, f"{own}.load")
        values = {key: backend_of(array).asarray(moments[key], dtype=array.dtype) for key, array in here.items()}
        for key, array in here.items():
            array[...] = values[key]
        self.steps, self.epoch = steps, epoch

    def reset(self) -> None:
        """Moments and step count back to zero; the epoch stays."""
        self.steps = 0
        for moments in self._moments.values():
            for array in _arrays(moments):
                array[...] = 0

    def on(self, param_dict: Parameters) -> Self:
        """A copy of this optimizer, state included, for the same parameters on another device."""
        twin = copy.copy(self)
        twin.param_dict, twin._gradient = param_dict, None
        twin._moments = {k: _zeros_like(param_dict) for k in self.moment_names}
        twin.load(self.save())
        return twin

    def _groups(self) -> list[_Group]:
        """What is updated together: all parameters of a network, or each array of a dict."""
        moments = list(self._moments.values())
        if isinstance(self.param_dict, Parameters):
            flats = tuple(m.flat for m in moments if isinstance(m, Parameters))
            return [_Group(self.param_dict.flat, flats, self.param_dict.n_weights)]
        return [
            _Group(backend_of(p).asarray(p), tuple(m[name] for m in moments), 0 if is_bias(name) else p.size)
            for name, p in self.param_dict.items()
        ]


def flush_subnormals(xp: Any, arrays: Sequence[Array]) -> None:
    """Sets to 0, in place, what is nearer to 0 than the dtype's smallest normal number.

    >>> import numpy as np
    >>> x = np.array([1e-40, -1e-40, 1e-30, 0.5], dtype=np.float32)
    >>> flush_subnormals(np, [x])
    >>> int(np.count_nonzero(x))
    2
    """
    for x in arrays:
        subnormal = xp.abs(x) < float(xp.finfo(x.dtype).smallest_normal)  # false for a NaN, which stays
        x[...] = xp.where(subnormal, xp.zeros_like(x), x)


def _number(owner: str, name: str, value: float, wanted: str) -> float:
    """The value as a Python float, which leaves dtypes alone; ValueError unless it is finite and as wanted."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{owner}: {name} is {value!r}; it must be a number") from error
    if not (0.0 <= number < math.inf) or (wanted == "positive" and number == 0.0):
        raise ValueError(f"{owner}: {name} is {value}; it must be {wanted}")
    return number


def _check_parameter(name: str, array: Any) -> None:
    """Raises TypeError or ValueError unless this is an array of floats that can be updated in place."""
    kind = dtype_name(array) if hasattr(array, "dtype") and not isinstance(array, np.generic) else ""
    if not kind.startswith("float"):
        held = f"an array of {kind}" if kind else f"a {type(array).__name__}"
        raise TypeError(f"{name} is {held}; give an array of floats, which is updated in place")
    if isinstance(array, np.ndarray):
        as_array(array, name)  # refuses masked values
        if not array.flags.writeable:
            raise ValueError(f"{name} is read-only, and parameters are updated in place; give a copy")
        if array.size and any(step == 0 and count > 1 for step, count in zip(array.strides, array.shape, strict=True)):
            raise ValueError(f"{name} has elements that share memory (a stride of 0); give a copy")


def _shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in arrays.items()}


def _zeros_like(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    if isinstance(arrays, Parameters):
        return arrays.zeros_like()
    return {name: backend_of(x).zeros(tuple(x.shape), dtype_name(x)) for name, x in arrays.items()}


def _arrays(arrays: Mapping[str, Array]) -> list[Array]:
    """The arrays themselves, or the one that holds them all."""
    return [arrays.flat] if isinstance(arrays, Parameters) else list(arrays.values())


def _pairs(to: Mapping[str, Array], source: Mapping[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Arrays of the same names, or the two flat ones."""
    if isinstance(to, Parameters) and isinstance(source, Parameters):
        yield to.flat, source.flat
        return
    for name, array in to.items():
        yield array, source[name]


def _in_groups(gradient: Mapping[str, Array], like: Mapping[str, Array]) -> list[Array]:
    """Gradients in the order and form of the groups made of `like`. Raises ValueError naming a key that is off."""
    if isinstance(like, Parameters) and isinstance(gradient, Parameters):
        return [gradient.flat]
    if isinstance(like, Parameters):
        joined = like.zeros_like()
        joined.copy_from(gradient, "gradient")
        return [joined.flat]
    taken = _taken(gradient, like, "gradient")
    # In the parameters' dtype, as `add_grad` has it: the square of a gradient of uint8 or float16 would overflow.
    return [backend_of(p).asarray(taken[name], dtype=dtype_name(p)) for name, p in like.items()]


def _taken(gradient: Mapping[str, Array], like: Mapping[str, Array], what: str) -> Mapping[str, Array]:
    """A gradient that goes with the parameters; TypeError or ValueError, naming the key, where it does not."""
    check_matches(gradient, _shapes(like), what)
    if isinstance(gradient, Parameters):
        return gradient
    return {name: as_array(x, f"{what}: {name}", backend_of(x)) for name, x in gradient.items()}
