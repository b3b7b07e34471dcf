"""Saved and loaded is what it was, bit for bit: models, optimizers, runs, histories, estimators, and what goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward_arrays import Array
from hypothesis import example, given
from hypothesis import strategies as st
from panel_runs import OPTIONS
from properties import Tally, prove, times
from short_runs import small_network, small_set
from states import SCHEDULES, bits

from catopt_xp.commands.export import export_safetensors, load_safetensors
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.optim.rules import GradientDescent, make_optimizer
from catopt_xp.optim.schedules import restore
from catopt_xp.training.callbacks import EarlyStopping
from catopt_xp.training.checkpoint import Checkpoint, RunState, load_model, load_state_dict, save_run, save_state_dict
from catopt_xp.training.history import History

Record = Callable[..., None]


def spread(flat: Array, seed: int) -> None:
    """Fills with finite numbers of every magnitude: subnormal ones, the largest, zeros of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, flat.nbytes, dtype=np.uint8).view(flat.dtype)
    info = np.finfo(flat.dtype)
    flat[...] = np.where(np.isfinite(raw), raw, info.max)
    ends = np.array([0.0, -0.0, info.smallest_subnormal, -info.smallest_normal, info.max, info.min], flat.dtype)
    flat[: min(len(flat), 6)] = ends[: len(flat)]


# --- models and optimizers --------------------------------------------------------------------------------------------

layouts = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.sampled_from(["relu", "sigmoid", "tanh", "identity"]), min_size=3, max_size=3),
    st.sampled_from(["sigmoid", "softmax", "identity", "exp"]),
    st.integers(2, 5),
)


def drawn_network(layout: Any, dtype: str, dropout: float, seed: int) -> DeepNetwork:
    units, hidden, output, outputs = layout
    network = DeepNetwork([*units, outputs], [*hidden[: len(units) - 1], output], seed, dtype, dropout=dropout)
    spread(network.parameters.flat, seed % 1000)
    return network


networks = st.builds(
    drawn_network,
    layouts,
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([0.0, 0.1, 1 / 3]),
    st.integers(0, 2**70),
)


@times(80, 4000)
def test_a_model_and_its_optimizer_come_back_bit_for_bit(examples: int, record: Record, tmp_path: Path) -> None:
    tally = Tally()
    file = tmp_path / "state.npz"

    @given(
        networks,
        st.sampled_from(sorted(OPTIONS)),
        st.sampled_from(SCHEDULES),
        st.floats(5e-324, 1e3),
        st.integers(0, 2**52),
        st.one_of(st.integers(0, 10**6), st.floats(0.0, 1e6)),
        st.integers(0, 999),
    )
    def holds(network: DeepNetwork, name: str, schedule: Any, rate: float, steps: int, epoch: float, seed: int) -> None:
        kind, options = OPTIONS[name]
        optimizer = make_optimizer(kind, network.save(), rate, lr_scheduler=schedule, weight_decay=rate, **options)
        for k, moment in enumerate(optimizer.flat_state()[1:]):
            spread(moment, seed + k)
        optimizer.steps, optimizer.epoch = steps, epoch
        save_state_dict(network, optimizer, file)
        written = Checkpoint.read(file)

        built = load_model(file)
        assert built.architecture == network.architecture
        assert bits(dict(built.save())) == bits(dict(network.save()))
        kept = dict(written.meta["optimizer"]["options"])
        learning_rate, text = kept.pop("learning_rate"), kept.pop("lr_scheduler")
        twin = make_optimizer(kind, built.save(), learning_rate, lr_scheduler=restore(text), **kept)
        load_state_dict(built, twin, file)
        assert twin.options == optimizer.options
        assert twin.learning_rate == optimizer.learning_rate
        assert (twin.steps, twin.epoch, type(twin.epoch)) == (steps, epoch, type(epoch))
        assert bits(twin.save()) == bits(optimizer.save())
        before = file.read_bytes()
        assert save_state_dict(built, twin, file).read_bytes() == before
        tally(kind)

    prove(holds, examples, record, tally)


@times(40, 2000)
def test_copies_and_pickles_of_a_joined_pair_go_on_alike(examples: int, record: Record) -> None:
    tally = Tally()

    @given(
        st.sampled_from(sorted(OPTIONS)),
        st.integers(1, 40),
        st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]),
        st.sampled_from([0.0, 0.3]),
    )
    def holds(name: str, steps: int, copied: Any, dropout: float) -> None:
        kind, options = OPTIONS[name]
        network = small_network(seed=steps, dropout=dropout)
        pair = network, make_optimizer(kind, network.save(), 0.01, l2=0.01, **options)
        X, Y = small_set()

        def learn(model: DeepNetwork, optimizer: Any) -> None:
            for _ in range(steps):
                model.forward(X)
                model.backward(Y)
                optimizer.add_grad(model.get_grad_dict())
                optimizer.step()
                optimizer.zero_grad()
                optimizer.increase_epoch()

        learn(*pair)
        twin = copied(pair)
        for one in (pair, twin):
            learn(*one)
        assert bits(dict(twin[0].save())) == bits(dict(pair[0].save()))
        assert bits(twin[1].save()) == bits(pair[1].save())
        assert (twin[1].steps, twin[1].epoch) == (2 * steps, 2 * steps)
        tally(kind)

    prove(holds, examples, record, tally)


class Named(BaseRegressionModel):
    """A model of one's own, with parameters of any names."""

    def __init__(self, names: list[str]) -> None:
        self.arrays = {name: np.arange(3.0) + k for k, name in enumerate(names)}

    def forward(self, X: Any, train_mode: bool = True) -> Any:
        raise NotImplementedError

    def backward(self, Y: Any) -> Any:
        raise NotImplementedError

    def get_grad_dict(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def save(self) -> Mapping[str, Any]:
        return self.arrays

    def load(self, state_dict: Mapping[str, Any]) -> None:
        for name, x in self.arrays.items():
            x[...] = state_dict[name]


@times(100, 4000)
def test_parameters_of_any_names_come_back_under_them_or_are_refused(
    examples: int, record: Record, tmp_path: Path
) -> None:
    tally = Tally()
    file = tmp_path / "named.npz"

    @given(st.lists(st.text(max_size=6), min_size=1, max_size=4, unique=True))
    @example(["a/b", "../x", "", ".npy", "meta"])
    @example(["W\0x"])  # an archive's names end at a zero
    @example(["W\\x", "W/x"])
    @example(["\ud800"])
    def holds(names: list[str]) -> None:
        model, twin = Named(names), Named(names)
        optimizers = [GradientDescent(one.save(), 0.1) for one in (model, twin)]
        for x in twin.arrays.values():
            x[...] = -1.0
        file.unlink(missing_ok=True)
        if any("\0" in name or (not name.isascii() and "\udfff" >= max(name) >= "\ud800") for name in names):
            with pytest.raises(ValueError, match="cannot be a name in an archive"):
                save_state_dict(model, optimizers[0], file)
            assert not file.exists()
            tally("refused")
            return
        save_state_dict(model, optimizers[0], file)
        load_state_dict(twin, optimizers[1], file)
        assert bits(twin.arrays) == bits(model.arrays)
        tally("kept")

    prove(holds, examples, record, tally)


# --- runs and histories -----------------------------------------------------------------------------------------------

floats = st.floats(width=64)
texts = st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@times(80, 4000)
def test_a_place_in_a_run_comes_back_as_it_was(examples: int, record: Record, tmp_path: Path) -> None:
    tally = Tally()
    network = small_network()
    optimizer = make_optimizer("adam", network.save())

    @given(
        st.integers(0, 2**40),
        st.integers(0, 5),
        floats,
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=9),
        st.dictionaries(texts, anything, max_size=4),
        st.booleans(),
        st.integers(0, 99),
    )
    def holds(
        epoch: int, batches: int, seconds: float, losses: list[float], run: dict[str, Any], early: bool, seed: int
    ) -> None:
        stopping = EarlyStopping(3)
        spread(network.parameters.flat, seed)
        stopping.keep(network.save())
        stopping.best_loss, stopping.best_epoch, stopping.waited = seconds, epoch, batches
        place = RunState(
            epoch,
            batches,
            seconds,
            np.array(losses[:batches], np.float32) if batches else None,
            np.array(losses, np.float32),
            {"run": run, "epoch": [0, 1], "timings": {"train": seconds}},
            stopping.save() if early else None,
            stopping.best if early else None,
            {"device": "cpu"},
        )
        back = Checkpoint.read(save_run(network, optimizer, tmp_path / "run", place)).run_state()
        for field in dataclasses.fields(RunState):
            was, now = getattr(place, field.name), getattr(back, field.name)
            if field.name in ("losses", "mini_batch_loss"):
                assert (was is None) == (now is None)
                assert was is None or bits({"x": was}) == bits({"x": now})
            elif field.name == "best":
                assert (was is None) == (now is None)
                assert was is None or bits(dict(was)) == bits(now)
            else:
                assert json.dumps(was) == json.dumps(now), field.name
        if early:
            twin = EarlyStopping(3)
            assert back.early_stopping is not None
            twin.load(back.early_stopping, back.best or {}, network.save())
            assert json.dumps(twin.save()) == json.dumps(stopping.save())
            assert bits(dict(twin.best or {})) == bits(dict(stopping.best or {}))
        tally("early stopping" if early else "without")

    prove(holds, examples, record, tally)


@times(80, 4000)
def test_a_history_of_any_numbers_comes_back_from_json_and_csv(examples: int, record: Record, tmp_path: Path) -> None:
    tally = Tally()
    file = tmp_path / "history.csv"

    @given(st.integers(0, 4), st.lists(floats, min_size=32, max_size=32), st.dictionaries(texts, anything, max_size=4))
    def holds(epochs: int, numbers: list[float], run: dict[str, Any]) -> None:
        draw = iter(numbers)
        along: dict[str, Any] = {
            name: [next(draw) for _ in range(epochs)]
            for name in ("learning_rate", "seconds", "train_loss", "train_accuracy", "full_train_loss", "dev_loss")
        }
        history = History(epoch=list(range(epochs)), eval_epoch=list(range(epochs)), **along, run=run)
        history.mini_batch_loss = list(draw)
        back = History.from_json(history.to_json())
        assert json.dumps(dataclasses.asdict(back)) == json.dumps(dataclasses.asdict(history))
        history.to_csv(file)
        listed = History.from_csv(file)
        for name in ("epoch", "eval_epoch", *along):
            assert json.dumps(getattr(listed, name)) == json.dumps(getattr(history, name)), name
        tally("kept")

    prove(holds, examples, record, tally)


@times(30, 2000)
def test_weights_come_back_from_safetensors_with_all_that_is_known(
    examples: int, record: Record, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    tally = Tally()

    @given(networks)
    def holds(network: DeepNetwork) -> None:
        back = load_safetensors(export_safetensors(network, tmp_path / "weights"))
        assert back.architecture == network.architecture
        assert bits(dict(back.save())) == bits(dict(network.save()))
        tally("kept")

    prove(holds, examples, record, tally)
