"""Trained networks as files of other programs: ONNX to run, safetensors to read.

ONNX files are of opset 17 and IR version 8, which onnxruntime 1.17 and later read. They hold the weights as training
left them; pixels are scaled behind the first product, as everywhere in this library. onnx and safetensors are imported
here alone, and only when a file is made or read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.data.dataset import checked_img_shape
from catopt_xp.estimators.parameters import HIDDEN
from catopt_xp.io.files import write_whole
from catopt_xp.nn.functional import OUTPUT_ACTIVATIONS, PIXEL_SCALE
from catopt_xp.nn.network import DeepNetwork, checked_layout
from catopt_xp.nn.parameters import check_matches, layer_shapes
from catopt_xp.training.checkpoint import ARCHITECTURE, Checkpoint, CheckpointError, is_finite
from catopt_xp.training.train import TrainResult
from catopt_xp.version import __version__

# What a doctored or foreign checkpoint may raise where its parts are used.
DAMAGE = (LookupError, AttributeError, TypeError, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Trained:
    """A network, and what is known besides.

    `classes`: by label, names or, of an estimator, whatever its labels are; empty where they are not known.
    `img_shape`: (width, height) of the pictures that it takes, or None. `tells_classes`: whether it answers as
    scikit-learn's classifiers of one label do, with a probability for every class and with the class itself.
    """

    network: DeepNetwork
    classes: tuple[Any, ...] = ()
    img_shape: tuple[int, int] | None = None
    tells_classes: bool = False

    @property
    def output(self) -> str:
        """The network's last activation."""
        return self.network.activation_func[-1]

    @property
    def classifies(self) -> bool:
        """Whether it answers with probabilities, not with numbers of other kinds."""
        return OUTPUT_ACTIVATIONS[self.output].classifies


def trained_of(model: Any, classes: Sequence[str] | None = None, img_shape: Sequence[int] | None = None) -> Trained:
    """The trained network of `model`: a DeepNetwork, a TrainResult, a checkpoint's file, or a fitted estimator.

    An estimator is one of ours or of scikit-learn's: what has `coefs_` and `intercepts_`. `classes`, `img_shape`: in
    place of what is known; a Trained is taken too. Raises TypeError for another model, ValueError for an estimator that
    is not fitted or a description that does not go with the network, FileNotFoundError, CheckpointError.

    >>> trained_of(DeepNetwork([12, 1], ["sigmoid"]), classes=["dog", "cat"], img_shape=(2, 2)).classes
    ('dog', 'cat')
    """
    trained = _found(model)
    if img_shape is not None:
        trained = replace(trained, img_shape=checked_img_shape(img_shape))
    if classes is not None:
        labels = max(2, trained.network.neuron_cnt[-1]) if trained.classifies else 0
        if len(classes) != labels:
            raise ValueError(f"classes: {len(classes)} are named, the network tells {labels or 'none'}")
        trained = replace(trained, classes=tuple(map(str, classes)))
    return trained


def _found(model: Any) -> Trained:
    if isinstance(model, Trained):
        return model
    if isinstance(model, str | os.PathLike):
        network, run = read_trained(os.fspath(model))
        return Trained(network, tuple(run["classes"]), run["img_shape"])
    if isinstance(model, TrainResult):
        run = model.history.run
        shape = run.get("img_shape")
        return Trained(_known(model.model), tuple(run.get("classes") or ()), shape and checked_img_shape(shape))
    if hasattr(model, "hidden_layer_sizes"):
        return _of_estimator(model)
    return Trained(_known(model))


def _known(model: Any) -> DeepNetwork:
    """The model; one of another class may compute something else, which nothing here knows."""
    if type(model) is not DeepNetwork:
        raise TypeError(
            f"{type(model).__name__} is not known here; give a DeepNetwork, what train returned, a checkpoint's file,"
            " or a fitted MLPClassifier or MLPRegressor"
        )
    return model


def _of_estimator(estimator: Any) -> Trained:
    """From what scikit-learn makes public, so that its own estimators are taken too."""
    name = type(estimator).__name__
    if not hasattr(estimator, "coefs_"):
        raise ValueError(f"this {name} is not fitted yet; call fit first")
    weights, biases = estimator.coefs_, estimator.intercepts_  # (n_in, n_out) and (n_out,)
    output = "sigmoid" if estimator.out_activation_ == "logistic" else estimator.out_activation_
    units = [len(weights[0]), *map(len, biases)]
    names = [*[HIDDEN[estimator.activation]] * (len(units) - 2), output]
    network = DeepNetwork(units, names, seed=None, dtype=weights[0].dtype)
    arrays = {f"W{k}": np.asarray(x).T for k, x in enumerate(weights)}
    network.load(arrays | {f"b{k}": np.asarray(x).reshape(-1, 1) for k, x in enumerate(biases)})
    if not hasattr(estimator, "classes_"):
        return Trained(network)
    if len(estimator.classes_) < 2:
        raise ValueError(f"this {name} was fitted with one class, and has nothing to tell; fit it with several")
    one_label = output == "softmax" or units[-1] == 1
    return Trained(network, tuple(estimator.classes_.tolist()), tells_classes=one_label)


def read_trained(file: str) -> tuple[DeepNetwork, Mapping[str, Any]]:
    """The trained network of a checkpoint, and what it says of its data, as `trained_on` has it.

    Raises FileNotFoundError, and CheckpointError naming the file.
    """
    checkpoint = Checkpoint.read(file)
    try:
        model, trained = checkpoint.trained_model(), trained_on(checkpoint)
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from error
    labels = max(2, model.neuron_cnt[-1])
    if trained["classes"] and len(trained["classes"]) < labels:
        raise _damaged(checkpoint, ValueError(f"{len(trained['classes'])} classes for {labels} labels"))
    return model, trained


def trained_on(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint says of its run: "data" (name) and "classes" (by label), may be empty; "img_shape" or None; the
    rest as it stands there. Raises CheckpointError where these are of another type."""
    run: Any = checkpoint.run_state().history.get("run", {})
    try:
        data, classes, img_shape = run.get("data") or "", run.get("classes") or [], run.get("img_shape") or None
        if not isinstance(data, str) or not isinstance(classes, list) or not all(isinstance(x, str) for x in classes):
            raise TypeError("data or classes are no names")
        shape = None if img_shape is None else checked_img_shape(img_shape)
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from error
    return {**run, "data": data, "classes": classes, "img_shape": shape}


def _damaged(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    if isinstance(error, MemoryError):  # that is no fault of the file
        raise error
    told = f"its meta does not fit ({type(error).__name__}: {error})"
    return CheckpointError(f"{checkpoint.path}: {told}; the file is damaged or foreign")


OPSET, IR_VERSION = 17, 8
LARGEST = 2**31 - 2**20  # bytes of weights: Protocol Buffers end at 2 GiB, and the graph needs some of them
FORMATS = ("onnx", "safetensors")
INPUTS = {
    "float32": "float32 (batch, n_x), numbers as the network sees them: pixels divided by 255",
    "float64": "float64 (batch, n_x), numbers as the network sees them: pixels divided by 255",
    "uint8": "uint8 (batch, n_x), pixels from 0 to 255",
    "images": "uint8 (batch, height, width, 3), pixels from 0 to 255, red first",
}
"""What `input` of `export_onnx` may be, and what the file takes then."""
OPERATORS = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "identity": "Identity",
    "softmax": "Softmax",
    "exp": "Exp",
}
"""Activations -> operators of ONNX."""

PathLike = str | os.PathLike[str]
HostArrays = dict[str, np.ndarray[Any, Any]]


# --- ONNX -------------------------------------------------------------------------------------------------------------


def export_onnx(
    model: Any,
    filename: PathLike,
    input: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    img_shape: Sequence[int] | None = None,
) -> Path:
    """Writes a trained network as one ONNX file, whole or not at all; returns its path.

    `model`: a DeepNetwork, what `train` returned, a checkpoint's file, or a fitted MLPClassifier or MLPRegressor (also
    scikit-learn's). `filename`: `.onnx` is appended when missing. `input`: what the file takes as `X`: "float32",
    "float64", (batch, n_x) numbers; "uint8", (batch, n_x) pixels, seen as X/255; "images", (batch, height, width, 3)
    uint8 pixels, red first; None: the network's dtype. `classes`: names by label, where the model does not know them;
    `img_shape`: (width, height), likewise.

    A classifier's file gives `probabilities` (batch, n_out), in the network's dtype, and `label`, int64: the class
    number (batch,), or of several labels 0 or 1 (batch, n_out). Of an estimator these are what `predict_proba` and
    `predict` answer. A network that predicts numbers gives `predictions` (batch, n_out). The metadata have neuron_cnt,
    activation_func, classes and img_shape, each as JSON.

    Raises ImportError without onnx; TypeError or ValueError for a model or an input that cannot be exported, and for
    weights of more than 2 GiB; FloatingPointError for weights that are not finite; FileNotFoundError, CheckpointError;
    OSError when the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(DeepNetwork([12, 3, 1], ["relu", "sigmoid"]), f"{folder}/cats", input="uint8").name
    'cats.onnx'
    """
    try:
        from onnx import checker
    except ImportError as error:
        raise ImportError(f'an ONNX file needs onnx ({error}): pip install "catopt-xp[onnx]"') from error
    path, trained = _with_ending(filename, ".onnx"), trained_of(model, classes, img_shape)
    proto = _as_proto(trained, _checked_input(trained, input), _weights(trained.network, path, LARGEST))
    checker.check_model(proto, full_check=True)
    write_whole(path, lambda file: file.write(proto.SerializeToString(deterministic=True)))
    return path


def _checked_input(trained: Trained, input: str | None) -> str:
    """What the file is to take; ValueError where this network cannot."""
    if input is None:
        return str(trained.network.dtype)
    if input not in INPUTS:
        raise ValueError(f"input is {input!r}; choose {', '.join(INPUTS)}")
    if input == "images":
        if trained.img_shape is None:
            raise ValueError("input is images, and it is not known how large they are; give img_shape")
        width, height = trained.img_shape
        n_x = trained.network.neuron_cnt[0]
        if n_x != 3 * width * height:
            raise ValueError(
                f"the network takes {n_x} numbers a sample, an image of {width}x{height} has {3 * width * height};"
                " give another img_shape"
            )
    return input


@dataclass
class _Graph:
    """Nodes in order, each with one output, and the constants that they use. Of ONNX it knows the operators' names."""

    constants: dict[str, Any]
    nodes: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = field(default_factory=list)

    def then(self, output: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        self.nodes.append((operator, inputs, output, attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        """Adds a constant, and returns its name."""
        self.constants[name] = np.asarray(value)
        return name


@dataclass
class _Value:
    """What a file takes or gives: name, dtype or "text", shape, and a sentence about it."""

    name: str
    dtype: str
    shape: list[str | int]
    text: str


def _layers(graph: _Graph, network: DeepNetwork, input: str, answer: str) -> None:
    """The layers from `X` to `answer`: `Z_k = A_k W_k^T + b_k; A_{k+1} = f_k(Z_k)`, a sample a row."""
    pixels = input in ("uint8", "images")
    A = graph.then("rows", "Flatten", "X", axis=1) if input == "images" else "X"
    if input != network.dtype:
        A = graph.then("A0", "Cast", A, to=network.dtype)
    for k, activation in enumerate(network.activation_func):
        product = graph.then(f"product{k}", "Gemm", A, f"W{k}", transB=1)
        if pixels and k == 0:
            scale = graph.constant("pixel_scale", np.array(PIXEL_SCALE, dtype=network.dtype))
            product = graph.then("scaled_product0", "Mul", product, scale)
        # Not by Gemm: with an activation behind it, onnxruntime 1.17 fuses a Gemm of float64 into one it does not have.
        Z = graph.then(f"Z{k}", "Add", product, f"b{k}")
        output = answer if k == len(network.activation_func) - 1 else f"A{k + 1}"
        A = graph.then(output, OPERATORS[activation], Z, **({"axis": 1} if activation == "softmax" else {}))


def _answers(graph: _Graph, trained: Trained, input: str) -> list[_Value]:
    """The whole graph, from `X` to what the file gives, which is returned."""
    network, units = trained.network, trained.network.neuron_cnt[-1]
    if not trained.classifies:
        _layers(graph, network, input, "predictions")
        return [_Value("predictions", network.dtype, ["batch", units], "predicted numbers")]
    two_columns = trained.tells_classes and units == 1
    of_label = "probability_of_second" if two_columns else "probabilities"
    _layers(graph, network, input, of_label)
    if two_columns:
        one = graph.constant("one", np.ones((), dtype=network.dtype))
        first = graph.then("probability_of_first", "Sub", one, of_label)
        graph.then("probabilities", "Concat", first, of_label, axis=1)
    text = "of each class" if two_columns or trained.output == "softmax" else "that each label is 1"
    shape: list[str | int] = ["batch", 2 if two_columns else units]
    return [_Value("probabilities", network.dtype, shape, text), _label(graph, trained, of_label)]


def _label(graph: _Graph, trained: Trained, probabilities: str) -> _Value:
    """`label`: numbers of classes or labels of 0 and 1, or for an estimator the classes themselves."""
    units, number = trained.network.neuron_cnt[-1], "label_number" if trained.tells_classes else "label"
    if trained.output == "softmax":
        graph.then(number, "ArgMax", probabilities, axis=1, keepdims=0)
    else:
        half = graph.constant("half", np.array(0.5, dtype=trained.network.dtype))
        holds = graph.then("label_holds", "Greater", probabilities, half)
        if units > 1:
            graph.then("label", "Cast", holds, to="int64")
            return _Value("label", "int64", ["batch", units], "0 or 1 for each label")
        column = graph.then("label_column", "Cast", holds, to="int64")
        graph.then(number, "Squeeze", column, graph.constant("columns", [1]))
    if not trained.tells_classes:
        return _Value("label", "int64", ["batch"], "number of the most probable class")
    classes = np.asarray(trained.classes)
    texts = classes.dtype.kind == "U"
    if not (texts or classes.dtype.kind in "biuf"):
        raise ValueError(
            f"the classes {list(trained.classes)} are neither all texts nor all numbers; name them by classes="
        )
    graph.then("label", "Gather", graph.constant("classes", classes.astype(object) if texts else classes), number)
    return _Value("label", "text" if texts else classes.dtype.name, ["batch"], "the most probable class")


def _as_proto(trained: Trained, input: str, weights: HostArrays) -> Any:
    """The network as a ModelProto that takes `input`."""
    from onnx import TensorProto, helper, numpy_helper

    def kind(dtype: str) -> int:
        return int(TensorProto.STRING if dtype == "text" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def described(value: _Value) -> Any:
        return helper.make_tensor_value_info(value.name, kind(value.dtype), value.shape, value.text)

    network = trained.network
    layers = "-".join(map(str, network.neuron_cnt))
    graph = _Graph({name: x.reshape(-1) if name.startswith("b") else x for name, x in weights.items()})
    outputs = _answers(graph, trained, input)
    shape: list[str | int] = ["batch", network.neuron_cnt[0]]
    if input == "images":
        width, height = trained.img_shape or (0, 0)
        shape = ["batch", height, width, 3]
    X = _Value("X", "uint8" if input == "images" else input, shape, INPUTS[input])
    nodes = []
    for operator, inputs, output, attributes in graph.nodes:
        given = {key: kind(value) if key == "to" else value for key, value in attributes.items()}
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}_{output}", **given))
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            f"network_{layers.replace('-', '_')}",
            [described(X)],
            [described(value) for value in outputs],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="catopt_xp",
        producer_version=__version__,
        doc_string=f"Fully connected network {layers} ({', '.join(network.activation_func)}). X: {INPUTS[input]}.",
    )
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in _facts(trained).items()})
    return proto


# --- safetensors ------------------------------------------------------------------------------------------------------


def export_safetensors(
    model: Any,
    filename: PathLike,
    *,
    classes: Sequence[str] | None = None,
    img_shape: Sequence[int] | None = None,
) -> Path:
    """Writes the weights `W0, W1, …` (n_out, n_in), `b0, b1, …` (n_out, 1) as one safetensors file; returns its path.

    The file is written whole or not at all. `model`, `classes`, `img_shape`: as for `export_onnx`; `filename`:
    `.safetensors` is appended when missing. The metadata have `architecture`, what `DeepNetwork(**architecture)` needs,
    and, where they are known, classes and img_shape, each as JSON. `load_safetensors` reads it back.

    Raises ImportError without safetensors; RuntimeError where what safetensors wrote is not what it was given;
    otherwise as `export_onnx`.

    >>> import tempfile
    >>> model = DeepNetwork([2, 1], ["sigmoid"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_safetensors(model, f"{folder}/cats")
    ...     bool((load_safetensors(path).save().flat == model.save().flat).all())
    True
    """
    path, trained = _with_ending(filename, ".safetensors"), trained_of(model, classes, img_shape)
    architecture = trained.network.architecture
    facts = {"architecture": architecture} | {k: v for k, v in _facts(trained).items() if k not in architecture}
    data = tensor_bytes(_weights(trained.network, path), {key: json.dumps(value) for key, value in facts.items()})
    write_whole(path, lambda file: file.write(data))
    return path


def tensor_bytes(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Host arrays of any layout as the content of a safetensors file, read back and compared.

    safetensors 0.8 writes other numbers, without an error, for an array that is not C-contiguous, and may read beyond
    its end: it is given contiguous ones alone. Raises ImportError without safetensors, RuntimeError where what is read
    back differs.

    >>> content = tensor_bytes({"W0": np.zeros((2, 3), dtype=np.float32).T}, {"made": "here"})
    >>> len(content) > 6 * 4
    True
    """
    numpy_face = _safetensors().numpy
    packed = {name: np.asarray(x, dtype=x.dtype.newbyteorder("="), order="C") for name, x in arrays.items()}
    data: bytes = numpy_face.save(packed, dict(metadata))
    found = numpy_face.load(data)
    for name, x in packed.items():
        if found[name].dtype != x.dtype or not np.array_equal(found[name], x):
            version = _safetensors().__version__
            raise RuntimeError(f"safetensors {version} wrote {name} otherwise than it was given; nothing was saved")
    return data


def load_safetensors(filename: PathLike) -> DeepNetwork:
    """The network of a file that `export_safetensors` wrote, on the CPU.

    Raises ImportError without safetensors; FileNotFoundError; CheckpointError for a file that is damaged or foreign.
    """
    library = _safetensors()
    path = Path(filename)
    path = path if path.exists() else _with_ending(path, ".safetensors")
    if not path.exists():
        raise FileNotFoundError(f"no safetensors file at {path}")
    if not path.is_file() and not path.is_dir():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is no file but a pipe or a device; give a .safetensors file")
    try:
        with library.safe_open(path, framework="np") as file:
            architecture = json.loads((file.metadata() or {})["architecture"])
            units, _ = checked_layout(architecture["neuron_cnt"], architecture["activation_func"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_matches(arrays, layer_shapes(units), "weights")  # before a network of that size is made
        if not set(architecture) <= ARCHITECTURE:
            raise ValueError(f"unknown {', '.join(set(architecture) - ARCHITECTURE)}")
        for name, array in arrays.items():
            if not is_finite(array):
                raise ValueError(f"{name} has values that are not finite")
        network = DeepNetwork(**architecture)
        network.load(arrays)
    except (*DAMAGE, OSError, library.SafetensorError) as error:
        told = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: no network can be read from it ({told}); it is damaged or foreign") from error
    return network


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'a safetensors file needs safetensors ({error}): pip install "catopt-xp[safetensors]"'
        ) from error
    return safetensors


# --- both -------------------------------------------------------------------------------------------------------------


def _facts(trained: Trained) -> dict[str, Any]:
    """What a file says of the network besides its weights, JSON-able; what is not known is left out."""
    known = {"classes": list(trained.classes), "img_shape": trained.img_shape}
    return trained.network.architecture | {name: value for name, value in known.items() if value}


def _weights(network: DeepNetwork, path: Path, largest: float = np.inf) -> HostArrays:
    """The parameters on the host; refused where they are larger than `largest` bytes, or not finite."""
    size = network.save().flat.shape[0] * np.dtype(network.dtype).itemsize
    if size > largest:
        raise ValueError(
            f"the weights are {size / 2**30:.1f} GiB, and an ONNX file holds less than 2; export them as safetensors"
        )
    weights = {name: network.backend.to_host(x) for name, x in network.save().items()}  # sync
    for name, x in weights.items():
        if not is_finite(x):
            raise FloatingPointError(f"{name} has values that are not finite, so nothing was saved to {path}")
    return weights


def _with_ending(filename: PathLike, ending: str) -> Path:
    """The file that `filename` means: with its ending appended when missing, so that no checkpoint is written over."""
    path = Path(filename)
    return path if path.suffix == ending else path.with_name(path.name + ending)
