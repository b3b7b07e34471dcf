"""Estimators that were pickled and runs that crashed go on with the bits that they would have had."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from panel_runs import OPTIONS
from properties import Tally, prove, times
from short_runs import Crash, arguments, fit
from states import SCHEDULES, bits

from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor
from catopt_xp.training.train import train

Record = Callable[..., None]


# --- estimators -------------------------------------------------------------------------------------------------------


@times(30, 800)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_pickled_estimator_answers_and_goes_on_with_the_same_bits(examples: int, record: Record) -> None:
    tally = Tally()

    @given(
        st.sampled_from([MLPClassifier, MLPRegressor]),
        st.sampled_from(["adam", "sgd", "rmsprop", "momentum", "adamw"]),
        st.sampled_from(["float32", "float64"]),
        st.sampled_from(["two", "three", "several", "texts"]),
        st.booleans(),
        st.integers(0, 3),
        st.integers(0, 99),
    )
    def holds(kind: type[Any], solver: str, dtype: str, labels: str, early: bool, more: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        X, numbers = rng.random((24, 3)).astype(dtype), np.arange(24) % (2 if labels == "two" else 3)
        y: Any = np.array(["a", "bb", "c"])[numbers] if labels == "texts" else numbers
        y = np.stack([numbers > 0, numbers > 1], axis=1).astype(int) if labels == "several" else y
        if kind is MLPRegressor:
            y = numbers if labels == "texts" else y
        options = {"random_state": seed, "max_iter": 2, "batch_size": 7, "warm_start": True}
        model = kind(hidden_layer_sizes=(4,), solver=solver, early_stopping=early, validation_fraction=0.3, **options)
        model.fit(X, y)
        twin = pickle.loads(pickle.dumps(model))
        for one in (model, twin):
            one.set_params(early_stopping=False)
            for _ in range(more):
                one.partial_fit(X, y)
            one.fit(X, y)
        here, there = (dict(enumerate([*one.coefs_, *one.intercepts_])) for one in (model, twin))
        assert bits(here) == bits(there)  # type: ignore[arg-type]
        assert np.array_equal(model.predict(X), twin.predict(X))
        for name in ("loss_curve_", "n_iter_", "t_", "best_loss_", "validation_scores_"):
            assert getattr(model, name) == getattr(twin, name), name
        assert model.get_params() == twin.get_params()
        tally(kind.__name__)

    prove(holds, examples, record, tally)


# --- runs that go on --------------------------------------------------------------------------------------------------


@contextmanager
def crashing(updates: int) -> Iterator[None]:
    """Within it, whatever engine trains crashes after so many updates."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (PlainEngine, PanelEngine):

            def counted(engine: Any, *asked: Any, whole: Any = kind.steps, **options: Any) -> Iterator[int]:
                nonlocal updates
                for done in whole(engine, *asked, **options):
                    updates -= 1
                    if updates == 0:
                        raise Crash
                    yield done

            patch.setattr(kind, "steps", counted)
        yield


@times(20, 400)
def test_any_run_that_crashed_anywhere_keeps_its_bits(examples: int, record: Record, tmp_path: Path) -> None:
    tally = Tally()

    @given(
        st.sampled_from(["gd", "nesterov", "rmsprop outside", "adam hat"]),
        st.sampled_from(["plain", "panels"]),
        st.fixed_dictionaries(
            {
                "shuffle": st.sampled_from(["epoch", "once", "none"]),
                "drop_last": st.booleans(),
                "schedule_by": st.sampled_from(["epoch", "step"]),
                "lr_scheduler": st.sampled_from(SCHEDULES[:3]),
                "early_stopping": st.sampled_from([None, 1, 3]),
                "checkpoint_every_steps": st.sampled_from([None, 1, 2, 5]),
                "checkpoint_every": st.sampled_from([None, 1, 2]),
                "print_interval": st.sampled_from([1, 2]),
                "seed": st.integers(0, 2**40),
                "batch_size": st.sampled_from([7, 16, 60]),
            }
        ),
        st.sampled_from([0.0, 0.3]),
        st.sampled_from([1, 3]),
        st.sampled_from(["float32", "float64"]),
        st.integers(1, 25),
    )
    def holds(
        name: str, engine: str, options: dict[str, Any], dropout: float, accumulate: int, dtype: str, updates: int
    ) -> None:
        kind, of_optimizer = OPTIONS[name]
        network = {"dropout": dropout, "dtype": dtype}
        given_ = {"optimizer": kind, "optimizer_options": of_optimizer, "learning_rate": 0.01, "engine": engine}
        given_ |= options | {"accumulate": accumulate if engine == "plain" else 1, "total_epoch": 4}
        whole = fit(**given_, **network)
        folder = tmp_path / str(sum(tally.found.values()))
        try:
            with crashing(updates):
                fit(**given_, **network, save_dir=folder)
        except Crash:
            tally("crashed")
        else:
            tally("ended")
        latest = folder / "model_latest.npz"
        if not latest.exists():
            return
        again = {k: v for k, v in arguments(**given_).items() if k != "hidden"}
        resumed = train(**again | {"save_dir": folder, "recover_from": latest})
        assert bits(dict(resumed.model.save())) == bits(dict(whole.model.save()))
        assert bits(resumed.optimizer.save()) == bits(whole.optimizer.save())
        for listed in ("epoch", "learning_rate", "train_loss", "mini_batch_loss", "eval_epoch", "full_train_loss"):
            assert getattr(resumed.history, listed) == getattr(whole.history, listed), listed

    prove(holds, examples, record, tally)
