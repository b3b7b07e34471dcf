"""Training from start to end: what is stepped, in which order, on which data."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from short_runs import N_X, RATES, Array, M, fit, flat, make_run, small_network, small_set

from catopt_xp.data.dataset import DataSet
from catopt_xp.data.order import batches, epoch_order
from catopt_xp.nn.network import DeepNetwork, dropout_masks
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import Adam, GradientDescent, make_optimizer
from catopt_xp.optim.schedules import get_table_func
from catopt_xp.training import setup as job_module
from catopt_xp.training.history import History
from catopt_xp.training.setup import NETWORK
from catopt_xp.training.train import train

# --- defaults -----------------------------------------------------------------------------------------------


def test_the_chapter_s_arguments_keep_their_order_and_defaults() -> None:
    parameters = inspect.signature(train).parameters
    positional = {k: p.default for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    chapter: dict[str, Any] = {
        "model": None,
        "optimizer": None,
        "X": None,
        "Y": None,
        "total_epoch": 100,
        "batch_size": 64,
    }
    chapter |= {"model_name": "model", "save_dir": "work_dirs", "recover_from": None, "print_interval": 10}
    chapter |= {"dev_X": None, "dev_Y": None, "plot_mini_batch": False}
    assert list(positional.items()) == list(chapter.items())
    assert {name: parameters[name].default for name in NETWORK} == dict(NETWORK)


def test_nothing_given_trains_the_reference_network_on_the_built_in_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*source: Any, **options: Any) -> DataSet:
        asked.append(source)
        return DataSet(*small_set(), *small_set(10, seed=1), classes=("dog", "cat"), name="stand-in")

    monkeypatch.setattr(job_module, "load_data", load)
    result = train(total_epoch=2, save_dir=None, device="cpu", verbose=False)
    assert asked == [(None, None, None, None)]  # data, img_shape, train_size, dev_size
    assert isinstance(result.model, DeepNetwork)
    assert result.model.neuron_cnt == [N_X, 30, 20, 20, 1]
    assert result.model.activation_func == ["relu", "relu", "relu", "sigmoid"]
    assert (type(result.optimizer), result.optimizer.learning_rate) == (Adam, 1e-5)
    assert result.history.run["batch_size"] == 60  # 64 is more than there are
    assert len(result.history.dev_loss) == 2
    assert (result.device, result.engine, result.checkpoint) == ("cpu", "panels", None)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("gd", 1e-3), ("momentum", 1e-3), ("rmsprop", 1e-5), ("adam", 1e-5), ("GradientDescent", 1e-3)],
)
def test_a_named_optimizer_has_the_chapter_s_learning_rate(name: str, rate: float) -> None:
    result = fit(optimizer=name, total_epoch=1)
    assert result.history.learning_rate == [rate]
    assert fit(optimizer=name, total_epoch=1, learning_rate=0.5).history.learning_rate == [0.5]


# --- steps --------------------------------------------------------------------------------------------------


def by_hand(model: DeepNetwork, optimizer: BaseOptimizer, epochs: int, batch_size: int) -> list[float]:
    """The definition: forward, backward, zero_grad, add_grad, step, over the orders of seed 0; every loss."""
    X, Y = small_set()
    losses = []
    for epoch in range(epochs):
        order = epoch_order(M, epoch, 0)
        for part in batches(M, batch_size):
            rows = order[part]
            model.forward(X[:, rows])
            losses.append(float(model.backward(Y[:, rows])))
            optimizer.zero_grad()
            optimizer.add_grad(model.get_grad_dict())
            optimizer.step()
        optimizer.increase_epoch()
    return losses


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"l2": 0.1}, {"clip_norm": 0.05}], ids=str)
@pytest.mark.parametrize("name", RATES)
def test_training_is_the_loop_written_by_hand_bit_for_bit(name: str, options: dict[str, float]) -> None:
    model = small_network()
    losses = by_hand(model, make_optimizer(name, model.save(), RATES[name], **options), epochs=3, batch_size=16)
    result = fit(optimizer=name, learning_rate=RATES[name], optimizer_options=options, engine="plain")
    assert result.history.mini_batch_loss == losses
    assert np.array_equal(flat(result.model), flat(model))
    if options:
        other = fit(optimizer=name, learning_rate=RATES[name], engine="plain")
        assert not np.array_equal(flat(result.model), flat(other.model))


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "lengths"),
    [
        (16, False, [16, 16, 16, 12]),
        (16, True, [16, 16, 16]),
        (59, False, [59, 1]),
        (59, True, [59]),
        (60, True, [60]),
        (1, False, [1] * 60),
        (1000, False, [60]),
        ("auto", False, [60]),
    ],
)
def test_every_batch_size_and_a_loss_that_weighs_batches_by_length(
    batch_size: int | str, drop_last: bool, lengths: list[int]
) -> None:
    result = fit(batch_size=batch_size, drop_last=drop_last, optimizer="gd", total_epoch=2)
    losses = np.array(result.history.mini_batch_loss).reshape(2, len(lengths))
    assert result.history.train_loss == [pytest.approx(np.average(e, weights=lengths), rel=1e-14) for e in losses]
    assert result.history.run["batch_size"] == lengths[0]
    said = " ".join(result.notices)
    assert ("batch size 1000 is more than the 60 samples there are: 60 is used" in said) == (batch_size == 1000)
    assert ("batch size 60: fewer than 2000 samples are taken whole" in said) == (batch_size == "auto")


@pytest.mark.parametrize("shuffle", ["epoch", "once", "none"])
def test_orders_are_those_of_seed_and_epoch(shuffle: str) -> None:
    seen: list[Array] = []

    class Watched(DeepNetwork):
        def forward_rows(self, samples: Any, rows: Any, train_mode: bool = True) -> Any:
            seen.append(rows)
            return super().forward_rows(samples, rows, train_mode)

    fit(model=Watched([N_X, 3, 1], ["relu", "sigmoid"]), shuffle=shuffle, seed=5)
    orders = np.concatenate(seen).reshape(3, M)
    assert np.array_equal(orders, [epoch_order(M, epoch, 5, shuffle) for epoch in range(3)])
    assert len(np.unique(orders, axis=0)) == (3 if shuffle == "epoch" else 1)
    assert (np.array_equal(orders[0], np.arange(M))) == (shuffle == "none")


def test_one_seed_gives_one_result_and_another_gives_another() -> None:
    one, same, other = (flat(fit(seed=seed, optimizer="gd").model) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("together", [2, 3, 100])
@pytest.mark.parametrize("name", RATES)
def test_accumulated_batches_equal_one_large_batch(name: str, together: int) -> None:
    common: dict[str, Any] = {"optimizer": name, "learning_rate": RATES[name], "dtype": "float64"}
    common |= {"engine": "plain"}
    small = fit(batch_size=8, accumulate=together, **common)
    large = fit(batch_size=8 * together, **common)
    assert np.abs(flat(small.model) - flat(large.model)).max() < 1e-12
    assert small.optimizer.steps == large.optimizer.steps
    assert small.history.train_loss == pytest.approx(large.history.train_loss, rel=1e-12)


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_schedule_moves_by_epoch_or_by_step(by: str) -> None:
    asked: list[float] = []

    def schedule(learning_rate_zero: float, epoch: float) -> float:
        asked.append(epoch)
        return learning_rate_zero / (1 + epoch)

    result = fit(optimizer="gd", learning_rate=0.1, lr_scheduler=schedule, schedule_by=by, accumulate=2)
    starts = [0, 0.5] if by == "step" else [0]  # four batches, two updates
    assert sorted(set(asked)) == [epoch + start for epoch in range(3) for start in starts]
    assert result.history.learning_rate == [0.1 / (1 + epoch) for epoch in range(3)]
    assert result.optimizer.epoch == 3


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_takes_a_schedule(name: str) -> None:
    table = get_table_func({0: 1e-3, 2: 1e-4})
    assert fit(optimizer=name, lr_scheduler=table).history.learning_rate == [1e-3, 1e-3, 1e-4]


class SignDescent(GradientDescent):
    """A rule of the user's own: it overrides `step`, as the chapter's readers do."""

    calls = 0

    def step(self) -> None:
        assert self._gradient is not None
        type(self).calls += 1
        for name, p in self.param_dict.items():
            p -= self.learning_rate * np.sign(self._gradient[name])


def test_an_optimizer_with_its_own_step_is_called_by_protocol() -> None:
    model, expected = small_network(), small_network()
    SignDescent.calls = 0
    fit(model=model, optimizer=SignDescent(model.save(), 0.001), total_epoch=2)
    assert SignDescent.calls == 2 * 4
    by_hand(expected, SignDescent(expected.save(), 0.001), epochs=2, batch_size=16)
    assert np.array_equal(flat(model), flat(expected))


# --- data ---------------------------------------------------------------------------------------------------


def test_pixels_and_their_values_in_0_to_1_train_alike() -> None:
    X, _ = small_set()
    pixels, values = fit(learning_rate=0.01), fit(X=(X.T.astype(np.float32) / 255).T, learning_rate=0.01)
    assert np.allclose(flat(pixels.model), flat(values.model), atol=1e-4)
    assert values.history.train_loss == pytest.approx(pixels.history.train_loss, rel=1e-4)
    assert pixels.history.train_loss[-1] < pixels.history.train_loss[0]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_only_a_feature_major_set_is_copied_once_with_a_notice(dtype: str) -> None:
    X, Y = small_set()
    sample_major = X.T.astype(dtype).T
    if dtype == "float32":
        sample_major /= 255
    loop = make_run(X=sample_major, dev_X=sample_major, dev_Y=Y).loop
    assert np.shares_memory(loop.engine.samples, sample_major)
    assert loop.sets.dev is not None
    assert np.shares_memory(loop.sets.dev.samples, sample_major)
    assert not loop.report.notices
    turned = np.ascontiguousarray(sample_major)
    loop = make_run(X=turned).loop
    assert loop.engine.samples.flags.c_contiguous
    assert loop.engine.samples is loop.sets.train.samples
    assert np.array_equal(loop.engine.samples, turned.T)
    assert [notice.count("copied once into sample-major memory") for notice in loop.report.notices] == [1]


@pytest.mark.parametrize("interval", [1, 2, 10])
def test_history_has_a_value_for_each_epoch_and_each_evaluation(interval: int) -> None:
    dev_X, dev_Y = small_set(20, seed=1)
    result = fit(total_epoch=6, print_interval=interval, dev_X=dev_X, dev_Y=dev_Y, learning_rate=0.01)
    history, evaluated = result.history, [e for e in range(6) if e % interval == 0 or e == 5]
    assert history.epoch == list(range(6))
    assert history.eval_epoch == evaluated
    by_epoch = (history.learning_rate, history.seconds, history.train_loss)
    by_evaluation = (history.train_accuracy, history.full_train_loss, history.dev_loss, history.dev_accuracy)
    assert {len(values) for values in by_epoch} == {6}
    assert {len(values) for values in by_evaluation} == {len(evaluated)}
    assert len(history.mini_batch_loss) == 6 * 4
    assert result.model.evaluate(dev_X, dev_Y, return_loss=True) == (
        history.dev_accuracy[-1],
        history.dev_loss[-1],
    )
    assert set(history.timings) == {"read", "decode", "move", "train", "wait", "evaluate", "save"}
    assert history.timings["train"] == pytest.approx(sum(history.seconds))
    assert History.from_json(history.to_json()) == history


def test_labels_of_three_classes_build_and_train_a_softmax() -> None:
    X, _ = small_set()
    Y = (X.reshape(3, 4, M).mean(axis=1)).argmax(axis=0)[None]
    result = fit(Y=Y, total_epoch=40, learning_rate=0.02, print_interval=39)
    assert isinstance(result.model, DeepNetwork)
    assert (result.model.neuron_cnt[-1], result.model.activation_func[-1]) == (3, "softmax")
    assert result.history.train_accuracy[-1] > 0.8
    named = fit(data=DataSet(X, Y, classes=("a", "b", "c", "d")), X=None, Y=None, total_epoch=1)
    assert named.history.run["classes"] == ["a", "b", "c", "d"]
    assert named.model.save()["b2"].shape == (4, 1)


def test_dropout_is_drawn_from_the_seed_and_left_out_of_evaluation() -> None:
    with_dropout, again, without = (fit(dropout=p, learning_rate=0.01) for p in (0.5, 0.5, 0.0))
    assert np.array_equal(flat(with_dropout.model), flat(again.model))
    assert not np.array_equal(flat(with_dropout.model), flat(without.model))
    X, Y = small_set()
    expected = with_dropout.history.train_accuracy[-1], with_dropout.history.full_train_loss[-1]
    assert with_dropout.model.evaluate(X, Y, return_loss=True) == expected


def test_every_step_has_a_dropout_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bytes] = []

    def watched(model: DeepNetwork, count: int) -> Any:
        drawn = dropout_masks(model, count)
        assert drawn is not None
        masks.append(drawn[0][:, :12].tobytes())  # the last batch has 12 samples
        return drawn

    monkeypatch.setattr("catopt_xp.nn.network.dropout_masks", watched)
    fit(model=DeepNetwork([N_X, 6, 1], ["relu", "sigmoid"], dropout=0.5))
    assert len(masks) == len(set(masks)) == 3 * 4
