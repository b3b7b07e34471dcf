"""Networks as ONNX and safetensors: read back by onnxruntime and safetensors, held to the network's own answers."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession
from safetensors import safe_open
from safetensors.numpy import load, load_file, save_file
from short_runs import N_X, M, fit, small_network, small_set

import catopt_xp
from catopt_xp.backend.xp import Backend
from catopt_xp.commands import export
from catopt_xp.commands.export import (
    FORMATS,
    INPUTS,
    OPERATORS,
    OPSET,
    export_onnx,
    export_safetensors,
    load_safetensors,
    trained_of,
)
from catopt_xp.commands.main import main
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor
from catopt_xp.nn.functional import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam
from catopt_xp.training.checkpoint import CheckpointError, RunState, save_run, save_state_dict

Array = np.ndarray[Any, Any]
SHAPE, PIXELS = (4, 3), 36  # width and height of pictures, and their numbers
# Distance from the network's own answers, over the largest of them: roundings of some short sums in another order.
CLOSE = {"float32": 3e-6, "float64": 1e-14}


def network(hidden: str = "relu", output: str = "sigmoid", units: int = 1, **options: Any) -> DeepNetwork:
    """With biases that are not 0, so that a forgotten one shows."""
    model = DeepNetwork([PIXELS, 8, 7, units], [hidden, hidden, output], **({"seed": 3} | options))
    rng = np.random.default_rng(0)
    for k in range(3):
        model.save()[f"b{k}"] = rng.normal(0.0, 0.3, model.save()[f"b{k}"].shape)
    return model


def pixels(m: int = 50, n_x: int = PIXELS, seed: int = 1) -> Array:
    """(m, n_x) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (m, n_x), dtype=np.uint8)


def samples(input: str, m: int = 50) -> tuple[Array, Array]:
    """What a file takes, and the same for `forward`, (n_x, m)."""
    rows = pixels(m)
    if input in ("uint8", "images"):
        width, height = SHAPE
        return (rows.reshape(m, height, width, 3) if input == "images" else rows), rows.T
    numbers = (rows / 255).astype(input)
    return numbers, numbers.T


def run(path: Path, X: Array) -> dict[str, Array]:
    """The outputs of an ONNX file, by name, as onnxruntime computes them."""
    session = InferenceSession(path)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, {"X": X}), strict=True))


def distance(answer: Array, expected: Array) -> float:
    assert answer.shape == expected.shape
    return float(np.abs(answer - expected).max() / np.abs(expected).max())


# --- ONNX: the numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("output", OUTPUT_ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN_ACTIVATIONS)
def test_onnxruntime_answers_as_the_network(hidden: str, output: str, input: str, dtype: str, tmp_path: Path) -> None:
    model = network(hidden, output, 3, dtype=dtype)
    X, own = samples(input)
    answers = run(export_onnx(model, tmp_path / "a", input, img_shape=SHAPE), X)
    name = "probabilities" if OUTPUT_ACTIVATIONS[output].classifies else "predictions"
    assert list(answers) == ([name, "label"] if name == "probabilities" else [name])
    assert answers[name].dtype == dtype
    assert distance(answers[name], model.forward(own, train_mode=False).T) < CLOSE[dtype]


def test_every_activation_has_its_operator() -> None:
    assert set(OPERATORS) == set(HIDDEN_ACTIVATIONS) | set(OUTPUT_ACTIVATIONS)


@pytest.mark.parametrize("input", ["float32", "images"])
def test_the_reference_evaluator_answers_as_the_network(input: str, tmp_path: Path) -> None:
    model = network("tanh", "softmax", 3)
    X, own = samples(input, 5)
    proto = onnx.load(export_onnx(model, tmp_path / "a", input, img_shape=SHAPE))
    found, label = ReferenceEvaluator(proto).run(None, {"X": X})
    expected = model.forward(own, train_mode=False).T
    assert distance(found, expected) < CLOSE["float32"]
    assert np.array_equal(label, expected.argmax(axis=1))


@pytest.mark.parametrize("input", ["float32", "uint8", "images"])
def test_a_thousand_pictures(input: str, tmp_path: Path) -> None:
    X, Y = pixels(1000, 32 * 32 * 3), np.arange(1000).reshape(1, -1) % 2
    result = fit(X=X.T, Y=Y, total_epoch=2, hidden=(30, 20, 20), optimizer="adam", learning_rate=0.01)
    path = export_onnx(result, tmp_path / "a", input, img_shape=(32, 32))
    taken = {"float32": (X / np.float32(255)).astype(np.float32), "uint8": X, "images": X.reshape(-1, 32, 32, 3)}
    answers = run(path, taken[input])
    expected = result.model.forward(X.T, train_mode=False).T
    assert np.ptp(expected) > 0.1
    assert np.abs(answers["probabilities"] - expected).max() < 3e-6
    sure = np.abs(expected - 0.5)[:, 0] > 1e-5
    assert np.array_equal(answers["label"][sure], (expected[sure, 0] > 0.5))


def test_a_batch_may_have_any_length(tmp_path: Path) -> None:
    model = network()
    session = InferenceSession(export_onnx(model, tmp_path / "a", "uint8"))
    assert session.get_inputs()[0].shape == ["batch", PIXELS]
    assert [output.shape for output in session.get_outputs()] == [["batch", 1], ["batch"]]
    for m in (1, 7, 130):
        rows = pixels(m)
        probabilities, label = session.run(None, {"X": rows})
        assert (probabilities.shape, label.shape, label.dtype) == ((m, 1), (m,), np.int64)
        assert distance(probabilities, model.forward(rows.T, train_mode=False).T) < CLOSE["float32"]


def test_dropout_and_one_layer_alone_are_exported(tmp_path: Path) -> None:
    for model in (network(dropout=0.5), DeepNetwork([PIXELS, 4], ["softmax"], seed=1)):
        rows = pixels()
        answers = run(export_onnx(model, tmp_path / "a", "uint8"), rows)
        assert distance(answers["probabilities"], model.forward(rows.T, train_mode=False).T) < CLOSE["float32"]


# --- ONNX: labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "units"), [("sigmoid", 1), ("sigmoid", 3), ("softmax", 3)])
def test_the_label_is_the_number_of_the_class(output: str, units: int, tmp_path: Path) -> None:
    model, rows = network("relu", output, units), pixels(200)
    answers = run(export_onnx(model, tmp_path / "a", "uint8"), rows)
    P, label = answers["probabilities"], answers["label"]
    assert label.dtype == np.int64
    expected = P.argmax(axis=1) if output == "softmax" else P > 0.5
    assert np.array_equal(label, expected.reshape(label.shape))
    assert label.shape == ((200, 3) if (output, units) == ("sigmoid", 3) else (200,))
    assert len(np.unique(label)) > 1


# --- ONNX: the file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input", INPUTS)
def test_the_checker_of_onnx_finds_nothing(input: str, tmp_path: Path) -> None:
    path = export_onnx(network("tanh", "softmax", 3), tmp_path / "a", input, img_shape=SHAPE)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
    assert (proto.ir_version, proto.producer_name, proto.producer_version) == (8, "catopt_xp", catopt_xp.__version__)
    assert proto.doc_string == f"Fully connected network 36-8-7-3 (tanh, tanh, softmax). X: {INPUTS[input]}."
    assert f"opset {OPSET} and IR version {proto.ir_version}" in str(export.__doc__)
    shape = InferenceSession(path).get_inputs()[0].shape
    assert shape == (["batch", 3, 4, 3] if input == "images" else ["batch", PIXELS])


@pytest.mark.parametrize("input", INPUTS)
def test_the_file_has_the_weights_as_they_are(input: str, tmp_path: Path) -> None:
    model = network()
    proto = onnx.load(export_onnx(model, tmp_path / "a", input, img_shape=SHAPE))
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, x in model.save().items():
        assert np.array_equal(found[name], x if name.startswith("W") else x[:, 0]), name


def test_the_input_is_by_default_of_the_networks_dtype(tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        proto = onnx.load(export_onnx(network(dtype=dtype), tmp_path / "a"))
        kind = proto.graph.input[0].type.tensor_type.elem_type
        assert onnx.helper.tensor_dtype_to_np_dtype(kind) == dtype
        assert "Cast" not in [node.op_type for node in proto.graph.node if "label" not in node.name]


def test_the_metadata_describe_the_network(tmp_path: Path) -> None:
    model = network("tanh", "sigmoid", seed=8)
    path = export_onnx(model, tmp_path / "a", classes=["dog", "cat"], img_shape=SHAPE)
    found = InferenceSession(path).get_modelmeta().custom_metadata_map
    told = {"classes": ["dog", "cat"], "img_shape": [4, 3]}
    assert {key: json.loads(text) for key, text in found.items()} == model.architecture | told
    assert "classes" not in InferenceSession(export_onnx(model, path)).get_modelmeta().custom_metadata_map


def test_equal_networks_give_equal_files(tmp_path: Path) -> None:
    for write in (export_onnx, export_safetensors):
        first, second = write(network(), tmp_path / "a"), write(network(), tmp_path / "b")
        assert first.read_bytes() == second.read_bytes()


def test_a_network_on_any_device_gives_the_same_file(backend: Backend, tmp_path: Path) -> None:
    model = network()
    there = model.to(backend)
    for write in (export_onnx, export_safetensors):
        assert write(there, tmp_path / "there").read_bytes() == write(model, tmp_path / "here").read_bytes()


# --- what can be exported ---------------------------------------------------------------------------------------------


def test_a_result_and_its_checkpoint_are_exported_as_the_model(tmp_path: Path) -> None:
    result = fit(save_dir=tmp_path)
    assert result.checkpoint is not None
    X, _ = small_set()
    expected = result.model.forward(X, train_mode=False).T
    for model in (result, result.checkpoint, str(result.checkpoint), result.model):
        answers = run(export_onnx(model, tmp_path / "a", "uint8"), X.T)
        assert distance(answers["probabilities"], expected) < CLOSE["float32"]
        read = load_safetensors(export_safetensors(model, tmp_path / "a"))
        assert np.array_equal(read.forward(X, train_mode=False).T, expected)


def test_what_a_run_knows_of_its_pictures_goes_into_the_file(tmp_path: Path) -> None:
    data = catopt_xp.get_drawn_set(SHAPE, 4, 0)
    result = fit(X=None, Y=None, data=data, save_dir=tmp_path, total_epoch=1)
    assert result.checkpoint is not None
    for model in (result, result.checkpoint):
        trained = trained_of(model)
        assert (trained.classes, trained.img_shape) == (("dog", "cat"), SHAPE)
        path = export_onnx(model, tmp_path / "a", "images")
        images = data.train_X.T.reshape(-1, 3, 4, 3)
        expected = result.model.forward(data.train_X, train_mode=False).T
        assert distance(run(path, images)["probabilities"], expected) < CLOSE["float32"]


def test_the_best_weights_of_a_checkpoint_are_exported(tmp_path: Path) -> None:
    model, best = network(), network(seed=4)
    path = save_run(model, Adam(model.save(), 1e-3), tmp_path / "a", RunState(best=best.save()))
    assert np.array_equal(load_safetensors(export_safetensors(path, tmp_path / "b")).save().flat, best.save().flat)


ESTIMATED: dict[str, Any] = {
    "two names": np.array(["left", "right"])[pixels()[:, 0] // 128],
    "three names": np.array(["a", "b", "ü"])[pixels()[:, 0] % 3],
    "names as objects": np.array(["no", "yes"], dtype=object)[pixels()[:, 0] // 128],
    "numbers": np.array([5, 7])[pixels()[:, 0] // 128],
    "three numbers": np.array([-1.0, 2.0, 3.0])[pixels()[:, 0] % 3],
    "booleans": pixels()[:, 0] > 127,
    "several labels": (pixels()[:, :3] > 127).astype(int),
}


def estimator(kind: Any = MLPClassifier, **given: Any) -> Any:
    options = {"hidden_layer_sizes": (9, 8), "activation": "tanh", "max_iter": 30, "random_state": 0, "tol": 0.0}
    return kind(**(options | given))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("labels", ESTIMATED)
@pytest.mark.parametrize("library", ["ours", "scikit-learn's"])
def test_a_classifier_s_file_answers_as_predict_proba_and_predict(library: str, labels: str, tmp_path: Path) -> None:
    from sklearn.neural_network import MLPClassifier as Original

    y, X = ESTIMATED[labels], pixels() / 255
    model = estimator(MLPClassifier if library == "ours" else Original).fit(X, y)
    answers = run(export_onnx(model, tmp_path / "a"), X)
    assert np.abs(answers["probabilities"] - model.predict_proba(X)).max() < 1e-14
    assert answers["label"].tolist() == model.predict(X).tolist()
    assert len(np.unique(answers["label"])) > 1
    known = InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == model.classes_.tolist()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("options", [{}, {"loss": "poisson"}, {"activation": "logistic", "solver": "lbfgs"}])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regressor_s_file_answers_as_predict(options: dict[str, Any], outputs: int, tmp_path: Path) -> None:
    X = pixels() / 255
    model = estimator(MLPRegressor, **options).fit(X, X[:, 0] if outputs == 1 else X[:, :2])
    answers = run(export_onnx(model, tmp_path / "a"), X)
    assert list(answers) == ["predictions"]
    assert distance(answers["predictions"], model.predict(X).reshape(-1, outputs)) < CLOSE["float64"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_estimator_of_pixels_takes_pixels_as_a_file_too(tmp_path: Path) -> None:
    model = estimator(pixels=True).fit(pixels(), ESTIMATED["two names"])
    names = {"classes": ["links", "rechts"], "img_shape": SHAPE}
    answers = run(export_onnx(model, tmp_path / "a", "images", **names), pixels().reshape(-1, 3, 4, 3))
    assert np.abs(answers["probabilities"] - model.predict_proba(pixels())).max() < 1e-6
    translated = {"left": "links", "right": "rechts"}
    assert answers["label"].tolist() == [translated[name] for name in model.predict(pixels())]


# --- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_safetensors_reads_the_weights_by_their_names(dtype: str, tmp_path: Path) -> None:
    model = network("tanh", "softmax", 3, dtype=dtype, dropout=0.25)
    path = export_safetensors(model, tmp_path / "a", classes=["a", "b", "c"], img_shape=SHAPE)
    assert path == tmp_path / "a.safetensors"
    found = load_file(path)
    assert set(found) == set(model.save())
    for name, x in model.save().items():
        assert found[name].dtype == dtype
        assert np.array_equal(found[name], x), name
    with safe_open(path, framework="np") as file:
        told = {key: json.loads(text) for key, text in file.metadata().items()}
    assert told == {"architecture": model.architecture, "classes": ["a", "b", "c"], "img_shape": [4, 3]}


def test_the_network_comes_back_from_its_file_alone(tmp_path: Path) -> None:
    for model in (network(), network("tanh", "softmax", 3, dtype="float64", dropout=0.25), network(output="exp")):
        export_safetensors(model, tmp_path / "a")
        for name in ("a", "a.safetensors"):
            built = load_safetensors(tmp_path / name)
            assert built.architecture == model.architecture
            assert np.array_equal(built.save().flat, model.save().flat)
            assert np.array_equal(built.forward(pixels().T, False), model.forward(pixels().T, False))


@st.composite
def arrays_of_any_layout(draw: st.DrawFn) -> Array:
    """Slices, reversals, permutations of axes and Fortran order, in either byte order."""
    kind = draw(st.sampled_from(["<f4", ">f4", "<f8", ">f8"]))
    finite = st.floats(-1e6, 1e6, width=32)
    array = draw(npst.arrays(np.dtype(kind), npst.array_shapes(max_dims=3, max_side=5), elements=finite))
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    array = array[draw(npst.basic_indices(array.shape, allow_ellipsis=False))]
    return np.transpose(array, draw(st.permutations(range(np.ndim(array)))))


@given(st.dictionaries(st.sampled_from(["W0", "W1", "b0"]), arrays_of_any_layout(), min_size=1))
def test_arrays_of_any_layout_are_written_as_they_are(arrays: dict[str, Array]) -> None:
    found = load(export.tensor_bytes(arrays, {}))
    assert set(found) == set(arrays)
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype.newbyteorder("=")
        assert np.array_equal(found[name], x), name


def test_what_safetensors_writes_wrongly_is_noticed_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_safetensors(network(seed=1), tmp_path / "a")
    before, save = path.read_bytes(), safetensors.numpy.save
    for spoil in (lambda x: x[..., ::-1].copy(), lambda x: x.astype("float64")):

        def wrong(arrays: dict[str, Array], metadata: Any, spoil: Any = spoil) -> bytes:
            return save(arrays | {"W1": spoil(arrays["W1"])}, metadata)

        monkeypatch.setattr(safetensors.numpy, "save", wrong)
        with pytest.raises(RuntimeError, match=r"^safetensors \S+ wrote W1 otherwise than it was given; nothing was"):
            export_safetensors(network(), path)
        assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(st.data())
def test_a_file_cut_short_or_of_noise_is_refused(data: st.DataObject) -> None:
    whole = export.tensor_bytes(network().save(), {"architecture": json.dumps(network().architecture)})
    content = whole[: data.draw(st.integers(0, len(whole) - 1))] if data.draw(st.booleans()) else b""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.safetensors")
        file.write_bytes(content or data.draw(st.binary(max_size=200)))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: no network can be read from it \("):
            load_safetensors(file)


@pytest.mark.parametrize(
    ("arrays", "architecture", "told"),
    [
        ({"W9": np.zeros((1, 1))}, {}, "W9 is not a parameter here"),
        ({"W0": np.zeros((8, 5))}, {}, r"W0 has shape \(8, 5\), expected \(8, 36\)"),
        ({"b2": np.full((1, 1), np.nan, dtype=np.float32)}, {}, "b2 has values that are not finite"),
        ({}, {"neuron_cnt": [36, 10**15, 10**15, 1]}, r"expected \(1000000000000000, 36\)"),
        ({}, {"activation_func": ["relu"]}, "4 layer sizes and 1 activations"),
        ({}, {"dtype": "float7"}, "float7"),
        ({}, {"colour": 1}, "colour"),
        ({}, {"neuron_cnt": 7}, "neuron_cnt is 7"),
    ],
)
def test_a_doctored_file_is_named_with_what_is_wrong(
    arrays: dict[str, Array], architecture: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = network()
    path = tmp_path / "a.safetensors"
    save_file(dict(model.save()) | arrays, path, {"architecture": json.dumps(model.architecture | architecture)})
    with pytest.raises(CheckpointError, match=f"a.safetensors: no network can be read from it .*{told}"):
        load_safetensors(path)


def test_a_foreign_or_missing_file_is_named(tmp_path: Path) -> None:
    save_file({"W0": np.zeros((1, 1))}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"foreign.safetensors: no network .* \(KeyError: 'architecture'\)"):
        load_safetensors(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match=r"^no safetensors file at .*missing\.safetensors$"):
        load_safetensors(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no network can be read"):
        load_safetensors(tmp_path)


# --- what cannot be exported ------------------------------------------------------------------------------------------


class Doubled(DeepNetwork):
    """Computes something that is not in its architecture."""


@pytest.mark.parametrize("write", [export_onnx, export_safetensors])
def test_models_that_are_not_known_are_refused_in_one_line(write: Any, tmp_path: Path) -> None:
    wanted = "is not known here; give a DeepNetwork, what train returned, a checkpoint's file, or a fitted MLP"
    for model in (Doubled([4, 1], ["sigmoid"]), None, 7):
        with pytest.raises(TypeError, match=f"^{type(model).__name__} {wanted}"):
            write(model, tmp_path / "a")
    result = fit(model=small_network(), total_epoch=1)
    result.model = Doubled([N_X, 1], ["sigmoid"])
    with pytest.raises(TypeError, match=f"^Doubled {wanted}"):
        write(result, tmp_path / "a")
    with pytest.raises(ValueError, match=r"^this MLPClassifier is not fitted yet; call fit first$"):
        write(MLPClassifier(), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        write(tmp_path / "missing.npz", tmp_path / "a")
    (tmp_path / "foreign.npz").write_bytes(b"PK but no more")
    with pytest.raises(CheckpointError, match=r"foreign\.npz: the archive cannot be read"):
        write(tmp_path / "foreign.npz", tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["foreign.npz"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_estimator_of_one_class_or_of_odd_ones_is_refused(tmp_path: Path) -> None:
    model = estimator().fit(pixels(), np.zeros(50))
    with pytest.raises(ValueError, match=r"^this MLPClassifier was fitted with one class, and has nothing to tell"):
        export_onnx(model, tmp_path / "a")
    model = estimator().fit(pixels(), ESTIMATED["two names"])
    model.classes_ = np.array([None, 3], dtype=object)
    with pytest.raises(ValueError, match=r"^the classes \[None, 3\] are neither all texts nor all numbers; name them"):
        export_onnx(model, tmp_path / "a")
    assert "label" in run(export_onnx(model, tmp_path / "a", classes=["none", "three"]), pixels() / 255)


def test_an_input_that_does_not_go_with_the_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^input is 'int8'; choose {', '.join(INPUTS)}$"):
        export_onnx(network(), tmp_path / "a", "int8")
    with pytest.raises(ValueError, match=r"^input is images, and it is not known how large they are; give"):
        export_onnx(network(), tmp_path / "a", "images")
    with pytest.raises(ValueError, match=r"^the network takes 36 numbers a sample, an image of 5x3 has 45; give"):
        export_onnx(network(), tmp_path / "a", "images", img_shape=(5, 3))
    with pytest.raises(ValueError, match=r"^img_shape: must be \(width, height\)"):
        export_onnx(network(), tmp_path / "a", img_shape=(0, 3))
    for model, labels in ((network(), "2"), (network(output="softmax", units=3), "3"), (network(output="exp"), "none")):
        with pytest.raises(ValueError, match=f"^classes: 4 are named, the network tells {labels}$"):
            export_safetensors(model, tmp_path / "a", classes=list("abcd"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export_onnx, export_safetensors])
def test_weights_that_are_not_finite_are_not_written_over_good_ones(write: Any, tmp_path: Path) -> None:
    model = network()
    path = write(model, tmp_path / "a")
    before = path.read_bytes()
    model.save()["W1"][0, 0] = np.nan
    told = f"W1 has values that are not finite, so nothing was saved to {path}"
    with pytest.raises(FloatingPointError, match=f"^{re.escape(told)}$"):
        write(model, tmp_path / "a")
    assert path.read_bytes() == before


def test_weights_that_protocol_buffers_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", network().save().flat.nbytes)
    export_onnx(network(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"^the weights are 0\.0 GiB, and an ONNX file holds less than 2; export"):
        export_onnx(network(dtype="float64"), tmp_path / "b")


@pytest.mark.parametrize("write", [export_onnx, export_safetensors])
def test_a_folder_that_is_missing_is_one_line(write: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*missing.a\.\w+: No such file or directory; choose another"):
        write(network(), tmp_path / "missing" / "a")


@pytest.mark.parametrize(
    ("module", "write", "told"),
    [
        ("onnx", export_onnx, 'an ONNX file needs onnx .*: pip install "catopt-xp.onnx."$'),
        ("safetensors", export_safetensors, 'file needs safetensors .*: pip install "catopt-xp.safetensors."$'),
    ],
)
def test_without_its_library_a_line_names_the_extra(
    module: str, write: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=told):
        write(network(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = network()
    return save_state_dict(model, Adam(model.save(), 1e-3), tmp_path / "model_latest")


def test_the_command_writes_beside_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {name: checkpoint.with_suffix(f".{name}") for name in FORMATS}
    assert main(["export", str(checkpoint)]) == 0
    takes = "it takes X, float32 (batch, n_x), numbers as the network sees them: pixels divided by 255"
    assert capsys.readouterr().out.splitlines() == [f"onnx: {written['onnx']}", takes]
    assert main(["export", str(checkpoint.with_suffix("")), "--format", "safetensors"]) == 0
    assert capsys.readouterr().out == f"safetensors: {written['safetensors']}\n"
    assert np.array_equal(load_safetensors(written["safetensors"]).save().flat, network().save().flat)
    rows = pixels()
    expected = network().forward(rows.T, train_mode=False).T
    for words, X in (
        (["-o", "rows.onnx", "--input", "uint8"], rows),
        (["--out", "rows", "--input", "images", "--img-shape", "4x3"], rows.reshape(-1, 3, 4, 3)),
    ):
        words[1] = str(checkpoint.parent / words[1])
        assert main(["export", str(checkpoint), *words]) == 0
        written_to, taken = capsys.readouterr().out.splitlines()
        assert (written_to, taken) == (f"onnx: {checkpoint.parent / 'rows.onnx'}", f"it takes X, {INPUTS[words[3]]}")
        assert distance(run(checkpoint.parent / "rows.onnx", X)["probabilities"], expected) < CLOSE["float32"]


def test_the_format_is_known_by_the_ending_unless_it_is_named(checkpoint: Path) -> None:
    for words, written in (
        (["-o", "a.safetensors"], "a.safetensors"),
        (["-o", "model_latest.npz"], "model_latest.npz.onnx"),
        (["-o", "b", "--format", "safetensors"], "b.safetensors"),
    ):
        words[1] = str(checkpoint.parent / words[1])
        assert main(["export", str(checkpoint), *words]) == 0
        assert (checkpoint.parent / written).stat().st_size > 1000
    assert catopt_xp.load_model(checkpoint).neuron_cnt == [PIXELS, 8, 7, 1]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("--format pickle", 2, "argument --format: invalid choice: 'pickle'"),
        ("--input int8", 2, "argument --input: invalid choice: 'int8'"),
        ("--format safetensors --input uint8", 2, "--input goes with --format onnx alone"),
        ("-o a.safetensors --input uint8", 2, "--input goes with --format onnx alone"),
        ("--input images", 1, "it is not known how large they are; give --img-shape"),
        ("--input images --img-shape 5x3", 1, "an image of 5x3 has 45; give another --img-shape"),
        ("-o missing/a.onnx", 1, "No such file or directory; choose another place"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(
    words: str,
    status: int,
    told: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    try:
        ended: Any = main(["export", str(checkpoint), *words.split()])
    except SystemExit as stop:
        ended = stop.code
    said = capsys.readouterr().err
    assert ended == status, said
    assert said.count("\n") == 1
    assert said.startswith("catopt-xp: error: ")
    assert told in said
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_file_that_is_no_checkpoint_is_named_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, X=np.zeros((M, N_X)))
    assert main(["export", str(foreign)]) == 1
    assert capsys.readouterr().err.startswith(f"catopt-xp: error: {foreign}: meta is missing; it is not a checkpoint")
    assert main(["export", str(tmp_path / "missing.npz")]) == 1
    assert capsys.readouterr().err == f"catopt-xp: error: no checkpoint at {tmp_path / 'missing.npz'}\n"
