"""Scripts in the words of the course chapter, whose imports alone have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import some
from PIL import Image

from catopt_xp import (
    Adam,
    BaseRegressionModel,
    DeepNetwork,
    GradientDescent,
    Momentum,
    RMSProp,
    const_lr,
    get_cat_set,
    get_hyperbola_func,
    load_model,
    load_state_dict,
    save_state_dict,
    train,
)

Sets = tuple[Any, Any, Any, Any]

# As the chapter builds them, by position and by keyword.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "gradient descent": lambda p: GradientDescent(p, 1e-3),
    "momentum": lambda p: Momentum(p, 1e-3, 0.9, True),
    "momentum from scratch": lambda p: Momentum(p, 1e-3, from_scratch=True),
    "rmsprop": lambda p: RMSProp(p, 1e-5, 0.9, 1e-6, True, True),
    "rmsprop from scratch": lambda p: RMSProp(p, 1e-5, from_scratch=True),
    "adam": lambda p: Adam(p, 1e-5, 0.9, 0.999, 1e-8, True, True, const_lr),
    "adam from scratch": lambda p: Adam(p, 1e-5, from_scratch=True),
    "adam with decay": lambda p: Adam(p, 1e-5, from_scratch=True, lr_scheduler=get_hyperbola_func(0.2)),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chapter's words name no device; what they mean here does not depend on the machine."""
    monkeypatch.setenv("CATOPT_XP_DEVICE", "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chapter's folders, eight photographs of each kind to train on: cats are bright, dogs dark."""
    folder, rng = tmp_path_factory.mktemp("dataset"), np.random.default_rng(0)
    for split, count in (("training_set", 8), ("test_set", 3)):
        for animals, level in (("cats", 150), ("dogs", 20)):
            (folder / split / animals).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level, level + 100, (10, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / animals / f"{animals[:-1]}.{number}.png")
    return folder


@pytest.fixture(scope="module")
def sets(root: Path) -> Sets:
    return get_cat_set(root, img_shape=(8, 8), train_size=6, test_size=2)


def chapter_network(n_x: int) -> DeepNetwork:
    return DeepNetwork([n_x, 30, 20, 20, 1], ["relu", "relu", "relu", "sigmoid"])


def test_the_chapter_s_set(sets: Sets, root: Path) -> None:
    train_X, train_Y, dev_X, dev_Y = sets
    assert (train_X.shape, train_Y.shape, dev_X.shape, dev_Y.shape) == ((192, 12), (1, 12), (192, 4), (1, 4))
    assert train_Y.tolist() == [[1] * 6 + [0] * 6]
    assert dev_Y.tolist() == [[1, 1, 0, 0]]
    assert train_X.dtype == np.uint8
    values, *_ = get_cat_set(root, (8, 8), 6, 2, dtype="float32")
    assert values.dtype == np.float32
    assert np.allclose(values * 255, train_X)


@pytest.mark.parametrize("optimizer_name", some(OPTIMIZERS, ["momentum", "adam with decay"], pytest.mark.hardening))
def test_the_chapter_s_script_and_its_second_call(optimizer_name: str, sets: Sets, tmp_path: Path) -> None:
    train_X, train_Y, dev_X, dev_Y = sets
    n_x = train_X.shape[0]
    save_dir = str(tmp_path / "work_dirs")

    model = chapter_network(n_x)
    optimizer = OPTIMIZERS[optimizer_name](model.save())
    first = train(
        model,
        optimizer,
        train_X,
        train_Y,
        20,
        batch_size=64,
        model_name="model",
        save_dir=save_dir,
        recover_from=None,
        print_interval=10,
        dev_X=dev_X,
        dev_Y=dev_Y,
    )
    assert first.history.epoch == list(range(20))
    assert first.history.eval_epoch == [0, 10, 19]
    assert first.history.full_train_loss[-1] < first.history.full_train_loss[0]
    assert optimizer.epoch == 20
    accuracy, loss = model.evaluate(dev_X, dev_Y, return_loss=True)  # type: ignore[misc]
    assert accuracy == first.history.dev_accuracy[-1]
    # The panel engine adds the first layer's products in another order than the model itself does.
    assert loss == pytest.approx(first.history.dev_loss[-1], rel=4 * 2**-23)

    model = chapter_network(n_x)
    optimizer = OPTIMIZERS[optimizer_name](model.save())
    recover_from = f"{save_dir}/model_latest.npz"
    second = train(
        model,
        optimizer,
        train_X,
        train_Y,
        40,
        64,
        "model",
        save_dir,
        recover_from,
        10,
        dev_X,
        dev_Y,
        False,
        device="cpu",
    )
    assert second.history.epoch == list(range(40))
    assert second.history.train_loss[:20] == first.history.train_loss
    assert second.history.train_loss[-1] < first.history.train_loss[-1]
    assert np.array_equal(load_model(recover_from).save()["W0"], model.save()["W0"])
    if "decay" in optimizer_name:
        assert second.history.learning_rate == [1e-5 / (1 + 0.2 * epoch) for epoch in range(40)]


def test_a_run_goes_on_with_another_optimizer_and_its_warning(sets: Sets, tmp_path: Path) -> None:
    train_X, train_Y, *_ = sets
    model = chapter_network(len(train_X))
    train(model, GradientDescent(model.save(), 1e-3), train_X, train_Y, 3, save_dir=tmp_path, verbose=False)
    parameters = model.save()
    before = parameters["W0"].copy()
    optimizer = Adam(parameters, 1e-5, from_scratch=True)
    with pytest.warns(UserWarning, match="the state is that of GradientDescent, this is Adam"):
        result = train(
            model,
            optimizer,
            train_X,
            train_Y,
            5,
            save_dir=tmp_path,
            recover_from=tmp_path / "model_latest.npz",
            verbose=False,
        )
    assert result.history.epoch == [0, 1, 2, 3, 4]
    assert optimizer.steps == 2
    assert not np.array_equal(parameters["W0"], before)


def run_epochs(model: BaseRegressionModel, optimizer: Any, X: Any, Y: Any, epochs: int) -> list[float]:
    """The chapter's own loop, without `train`: the cost before each step."""
    costs, batch_size = [], 4
    for _ in range(epochs):
        for start in range(0, X.shape[1], batch_size):
            batch_X, batch_Y = X[:, start : start + batch_size], Y[:, start : start + batch_size]
            Y_hat = model.forward(batch_X)
            costs.append(model.loss(batch_Y, Y_hat))
            model.backward(batch_Y)
            optimizer.zero_grad()
            optimizer.add_grad(model.get_grad_dict())
            optimizer.step()
        optimizer.increase_epoch()
    return costs


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_chapter_s_loop_saves_and_goes_on(optimizer_name: str, sets: Sets, tmp_path: Path) -> None:
    X, Y, *_ = sets
    straight = chapter_network(len(X))
    optimizer = OPTIMIZERS[optimizer_name](straight.save())
    costs = run_epochs(straight, optimizer, X, Y, 4)
    assert optimizer.epoch == 4
    assert np.mean(costs[-3:]) < np.mean(costs[:3])

    model = chapter_network(len(X))
    optimizer = OPTIMIZERS[optimizer_name](model.save())
    run_epochs(model, optimizer, X, Y, 2)
    save_state_dict(model, optimizer, str(tmp_path / "state.npz"))

    model = DeepNetwork([len(X), 30, 20, 20, 1], ["relu", "relu", "relu", "sigmoid"], seed=1)
    optimizer = OPTIMIZERS[optimizer_name](model.save())
    load_state_dict(model, optimizer, str(tmp_path / "state.npz"))
    run_epochs(model, optimizer, X, Y, 2)
    assert np.array_equal(model.parameters.flat, straight.parameters.flat)
    assert isinstance(model.evaluate(X, Y), float)
