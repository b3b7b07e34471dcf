"""The flags of `catopt-xp`: how each is read, and which command has which."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from catopt_xp.backend.machine import memory_size
from catopt_xp.commands.bench import BATCH_SIZES, QUICK_BATCH_SIZES
from catopt_xp.commands.export import FORMATS, INPUTS
from catopt_xp.data.dataset import ON_ERROR
from catopt_xp.data.order import SHUFFLES
from catopt_xp.engines.choose import ENGINES
from catopt_xp.nn.functional import HIDDEN_ACTIVATIONS
from catopt_xp.optim.rules import EPS_MODES, OPTIMIZERS
from catopt_xp.optim.schedules import Scheduler, parse
from catopt_xp.version import __version__


def _number(text: str, kind: Callable[[str], Any], good: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    return int(_number(text, int, lambda n: n >= 1, "a whole number of at least 1"))


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return int(_number(text, int, lambda n: n >= 0, "a whole number of at least 0"))


seed = whole


def positive(text: str) -> float:
    """A finite number above 0."""
    return float(_number(text, float, lambda x: 0.0 < x < math.inf, "a number above 0"))


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    return float(_number(text, float, lambda x: 0.0 <= x < math.inf, "a number of at least 0"))


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return float(_number(text, float, lambda x: 0.0 <= x < 1.0, "a number of at least 0 and below 1"))


def batch_size(text: str) -> int | str:
    """A whole number of at least 1, or "auto"."""
    if text == "auto":
        return text
    return int(_number(text, int, lambda n: n >= 1, "a whole number of at least 1, or auto"))


def name(text: str) -> str:
    """The name of a file or folder, which is not empty: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is expected, the text is empty")
    return text


def path(text: str) -> Path:
    """A path, from a text that is not empty."""
    return Path(name(text))


def file_name(text: str) -> str:
    """A file name without a folder."""
    if text in ("", "..") or not text.isprintable() or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain file name, without a folder")
    return text


def layers(text: str) -> tuple[int, ...]:
    """Units of the hidden layers: "30,20,20"; "none" for none."""
    if text == "none":
        return ()
    return tuple(count(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1: "8,64"."""
    return tuple(count(part) for part in text.split(","))


def shape(text: str) -> tuple[int, int]:
    """Width and height in pixels: "224x224"."""
    width, cross, height = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 224x224")
    return count(width), count(height)


def memory(text: str) -> int:
    """Bytes, with a unit or without: "500MB"."""
    try:
        return memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def schedule(text: str) -> Scheduler:
    """A learning-rate schedule, as `schedules.parse` reads it."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


NAME = "catopt-xp"
FROM_CHECKPOINT = "resumed: the checkpoint's"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} (see {self.prog} --help)\n")


def add_data(parser: Parser, default: str = "built-in drawings", resumes: bool = False, streams: bool = False) -> None:
    """`resumes`: there may be a checkpoint, which knows the size of its pictures; `streams`: sets may exceed memory."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=name,
        metavar="PATH",
        help="folder of photographs, .npz with X and Y, or NAME.npy of rows with NAME_labels.npy beside it (default:"
        f" {default})",
    )
    known = "the checkpoint's where it has one, else " if resumes else ""
    group.add_argument(
        "--img-shape",
        type=shape,
        metavar="WxH",
        help=f"pixels, e.g. 64x64 (default: {known}224x224; small photographs of one size stay as they are)",
    )
    group.add_argument(
        "--train-size", type=count, metavar="N", help="training pictures per class (default: all; 1000 drawings)"
    )
    group.add_argument(
        "--dev-size",
        type=whole,
        metavar="N",
        help="dev pictures per class (default: all of test_set, or 20%% of each class where a folder has neither"
        " training_set nor test_set; 200 drawings)",
    )
    group.add_argument("--on-error", choices=ON_ERROR, default="raise", help="at a broken photograph (default: raise)")
    if streams:
        group.add_argument(
            "--memory-limit",
            type=memory,
            metavar="SIZE",
            help="e.g. 500MB or 1GB, of which the set takes half at most: a larger one, in rows in an .npy file or in"
            " the cache of photographs, is streamed in windows (default: what is free)",
        )


def add_network(parser: Parser) -> None:
    """How the network is built."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden", type=layers, default=(30, 20, 20), metavar="N,N,...", help="hidden units (default: 30,20,20)"
    )
    network.add_argument(
        "--activation", choices=sorted(HIDDEN_ACTIVATIONS), default="relu", help="of hidden layers (default: relu)"
    )
    network.add_argument("--dropout", type=share, default=0.0, metavar="P", help="of hidden units (default: 0)")
    network.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="of the weights (default: float32)"
    )


def add_optimizer(parser: Parser) -> None:
    """The optimizer, its options and its schedule."""
    group = parser.add_argument_group(
        "optimizer",
        "Options that an optimizer does not have are refused. Those not given are the chapter's;\n"
        "where a run is resumed without --optimizer, they are the checkpoint's.",
    )
    group.add_argument(
        "--optimizer", choices=sorted(OPTIMIZERS), help="method (default: adam; resumed: the checkpoint's)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive,
        metavar="X",
        help="per step (default: 1e-3 for gd and momentum, 1e-5 for rmsprop and adam; resumed: the checkpoint's)",
    )
    group.add_argument(
        "--schedule",
        dest="lr_scheduler",
        type=schedule,
        metavar="S",
        help="in quotes: const, hyperbola(RATE), exponential(BASE), sqrt(K), staircase(FACTOR, EVERY), "
        "table({EPOCH: LR, ...}), cosine(EPOCHS[, FINAL]) or, around any of them, warmup(SCHEDULE, EPOCHS[, START]); "
        "the text of a history is taken too (default: const; resumed: the checkpoint's)",
    )
    group.add_argument(
        "--schedule-by", choices=("epoch", "step"), help=f"its clock (default: epoch; {FROM_CHECKPOINT})"
    )
    group.add_argument("--weight-decay", type=not_negative, metavar="X", help="decoupled, of weights (default: 0)")
    group.add_argument("--l2", type=not_negative, metavar="X", help="added to the gradient (default: 0)")
    group.add_argument("--clip-norm", type=positive, metavar="X", help="largest gradient norm (default: no limit)")
    group.add_argument("--beta", type=share, metavar="X", help="of momentum and rmsprop (default: 0.9)")
    group.add_argument("--beta1", type=share, metavar="X", help="of adam (default: 0.9)")
    group.add_argument("--beta2", type=share, metavar="X", help="of adam (default: 0.999)")
    group.add_argument(
        "--eps", type=positive, metavar="X", help="guard of the division (default: 1e-6 for rmsprop, 1e-8 for adam)"
    )
    group.add_argument(
        "--eps-mode", choices=EPS_MODES, help="place of eps and root (default: inside for rmsprop, outside for adam)"
    )
    group.add_argument("--nesterov", action="store_true", default=None, help="momentum that looks ahead (default: off)")
    group.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        help="of the moving averages (default: on for rmsprop and adam, off for momentum)",
    )


def add_run(run: argparse._ArgumentGroup) -> None:
    """Batches, their order, and when a run is evaluated or ends early; into the group of the run."""
    run.add_argument(
        "--batch-size", type=batch_size, metavar="N", help=f"samples, or auto (default: 64; {FROM_CHECKPOINT})"
    )
    run.add_argument(
        "--accumulate", type=count, metavar="N", help=f"batches per update, averaged (default: 1; {FROM_CHECKPOINT})"
    )
    run.add_argument(
        "--shuffle",
        choices=SHUFFLES,
        help=f"a new order every epoch, one for all, none (default: epoch; {FROM_CHECKPOINT})",
    )
    run.add_argument(
        "--drop-last",
        action=argparse.BooleanOptionalAction,
        help=f"leave out a short last batch (default: off; {FROM_CHECKPOINT})",
    )
    run.add_argument("--seed", type=seed, metavar="N", help=f"of weights and orders (default: 0; {FROM_CHECKPOINT})")
    run.add_argument(
        "--early-stopping", type=count, metavar="N", help="stop after N evaluations without a lower cost (default: off)"
    )
    run.add_argument(
        "--print-interval",
        type=count,
        metavar="N",
        help=f"epochs between evaluations (default: 10; {FROM_CHECKPOINT})",
    )


def add_run_folder(parser: Parser) -> None:
    """Where the files go, and from which checkpoint to go on."""
    folder = parser.add_argument_group("run folder")
    folder.add_argument(
        "--save-dir",
        type=path,
        default=Path("work_dirs"),
        metavar="DIR",
        help="where the files go (default: work_dirs)",
    )
    folder.add_argument(
        "--model-name", type=file_name, default="model", metavar="NAME", help="of the files (default: model)"
    )
    folder.add_argument(
        "--recover-from",
        type=name,
        metavar="FILE",
        help="go on from this checkpoint, which remembers its network, optimizer and the flags that say so here, but"
        " not its data: give --data again (default: start anew)",
    )
    folder.add_argument(
        "--checkpoint-every", type=count, metavar="N", help="epochs between checkpoints (default: when evaluated)"
    )
    folder.add_argument(
        "--checkpoint-every-steps", type=count, metavar="N", help="also every N steps within epochs (default: never)"
    )
    folder.add_argument("--plot-mini-batch", action="store_true", help="also draw the cost of every mini-batch")
    folder.add_argument("--no-figure", action="store_true", help="do not draw the history at the end")
    folder.add_argument(
        "--tensorboard",
        type=path,
        metavar="DIR",
        help="also write events for TensorBoard, to DIR/NAME; needs the extra of that name (default: none)",
    )


def add_epochs(group: argparse._ArgumentGroup, text: str) -> None:
    """`--epochs`, with this help, into a group."""
    group.add_argument("--epochs", "--total-epoch", dest="total_epoch", type=count, default=100, metavar="N", help=text)


def add_device(parser: Parser, trains: bool = False, spreads: bool = False) -> None:
    """The device; for what `trains` also the engine and its threads; whether it `spreads` over processes."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--strict-device", action="store_true", default=None, help="fail where a GPU asked for cannot be used"
    )
    if trains:
        group.add_argument("--engine", choices=ENGINES, default="auto", help="how steps are made (default: auto)")
        group.add_argument(
            "--threads",
            type=count,
            metavar="N",
            help="at most so many (default: OMP_NUM_THREADS or NUMBA_NUM_THREADS, else one per processor)",
        )
    if spreads:
        group.add_argument(
            "--distributed",
            action="store_true",
            help="spread the features over the processes that mpiexec -n N started, each on a GPU of its own if all "
            "have one, else all on CPUs; needs the extra of that name",
        )


def add_output(parser: Parser) -> None:
    """What is printed."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a bar (default: when stderr is a terminal)"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")


COMPARISONS = ("batch-size", "optimizers", "decay")
EPILOG = """\
exit status:
  0    done
  1    failed: data or files that cannot be read or written, a run that diverged, a device that is missing
  2    bad usage: an unknown flag or command, a flag's value out of range, options that do not go together
  130  interrupted (Ctrl-C, SIGTERM){interrupted}

One line says what is wrong; --debug shows the traceback too."""
RESUMES = """; once training has begun, what was trained is saved, and the
       command that resumes it is printed"""
ENVIRONMENT = """\
environment:
  CATOPT_XP_DEVICE         cpu, cuda or cuda:N: the device of --device auto
  CATOPT_XP_STRICT_DEVICE  1: as --strict-device
  CATOPT_XP_CACHE          folder where drawings and decoded photographs are kept (default: catopt_xp in the
                           system's folder for caches, on Linux ~/.cache or XDG_CACHE_HOME)

"""
COMPARE = """
The runs are of --epochs each: batch-size has 4 (5 with --stochastic), optimizers 4, decay 3. On the full-size set of
drawings a run takes minutes; --img-shape, --train-size and --epochs make it shorter."""
BENCH = """
The workload is seeded noise of the reference network's size. Both engines train from the same weights on the same rows
in the same order, which is checked first. It takes two minutes or so, --quick half a minute; let no other program run
meanwhile. Other libraries are timed from a checkout of the sources: python -m benchmarks.peers."""

EXPORT = """
An ONNX file takes X and gives probabilities and label, the class number. A safetensors file has the weights W0, b0, …;
catopt_xp.load_safetensors reads it back."""


# Of `train`, what a resumed run takes from its checkpoint when the flag is absent, and a new one from here.
REMEMBERED = {
    "batch_size": 64,
    "accumulate": 1,
    "shuffle": "epoch",
    "drop_last": False,
    "seed": 0,
    "print_interval": 10,
    "schedule_by": "epoch",
}

# Flag -> the optimizer's option, for flags that only some optimizers take.
OPTIMIZER_OPTIONS = {
    "weight_decay": "weight_decay",
    "l2": "l2",
    "clip_norm": "clip_norm",
    "beta": "beta",
    "beta1": "beta1",
    "beta2": "beta2",
    "eps": "eps",
    "eps_mode": "eps_mode",
    "nesterov": "nesterov",
    "bias_correction": "correct_param",
}


# Argument or option of an optimizer -> its flag, where that has another name.
RENAMED = {option: flag for flag, option in OPTIMIZER_OPTIONS.items() if flag != option} | {"lr_scheduler": "schedule"}


def with_flags(text: str, names: Iterable[str]) -> str:
    """A message about arguments, with the flags that set them in their place; files and folders keep their names.

    >>> with_flags("in batch_size/x.npz: a larger memory_limit, or correct_param", ["batch_size", "memory_limit"])
    'in batch_size/x.npz: a larger --memory-limit, or correct_param'
    """
    for argument in names:
        flag = f"--{RENAMED.get(argument, argument)}".replace("_", "-")
        text = re.sub(rf"(?<![\w./\\-]){argument}(?![\w/\\-]|\.\w)", flag, text)
    return text


def parse_words(words: Sequence[str], prog: str) -> argparse.Namespace:
    """The flags of a command line; the help that an error points to is that of the command.

    >>> parse_words(["info", "--json"], "catopt-xp").json
    True
    """
    args, unknown = make_parser(prog).parse_known_args(words)
    if unknown:
        Parser(prog=f"{prog} {args.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def make_parser(prog: str) -> Parser:
    """The parser of all commands; the parsed `command` names the one given.

    >>> make_parser("catopt-xp").parse_args(["train", "--epochs", "3"]).total_epoch
    3
    """
    parser = Parser(
        prog=prog,
        description="Train fully connected classifiers of images from scratch, on NumPy or on a GPU with CuPy.",
        epilog=ENVIRONMENT + EPILOG.format(interrupted=""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"catopt_xp {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, text: str, more: str = "", trains: bool = False) -> Parser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + "." + more,
            epilog=EPILOG.format(interrupted=RESUMES if trains else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # Not set when absent, so that it may stand before the command too.
        told = "show the traceback of an error"
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=told)
        return added

    text = "train a network; with no flags the reference network on the built-in drawings"
    _add_train(command("train", text, trains=True))
    _add_evaluate(command("evaluate", "print accuracy and cost of a checkpoint over a data set"))
    _add_predict(command("predict", "print the class of each image, and its probability"))
    text = "run one of the three comparisons: batch size, optimizers, learning-rate decay"
    _add_compare(command("compare", text, COMPARE, trains=True))
    _add_tune(command("tune", "time real training steps at several batch sizes, and choose one"))
    _add_export(command("export", "write a checkpoint's network as ONNX, or its weights as safetensors", EXPORT))
    text = "time an epoch against batch size: each engine, and what this machine could do at best"
    add_bench(command("bench", text, BENCH))
    _add_info(command("info", "print which device is used, why not the other one, and versions"))
    _add_plot(command("plot", "draw a run, compare several on one axis, or draw a benchmark"))
    _add_paths(command("paths", "draw the optimizers' paths over a saddle point, a plateau and a valley"))
    return parser


def _add_tune(parser: Parser) -> None:
    add_data(parser)
    add_network(parser)
    add_optimizer(parser)
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--batch-sizes", type=counts, default=(), metavar="N,N,...", help="measure these too, besides 64,128,256,512"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights (default: 0)")
    add_device(parser, trains=True)
    add_output(parser)


def _add_train(parser: Parser) -> None:
    add_data(parser, resumes=True, streams=True)
    add_network(parser)
    add_optimizer(parser)
    run = parser.add_argument_group("run")
    add_epochs(run, "N epochs in all, counted from 0, those of a resumed run included (default: 100)")
    add_run(run)
    add_run_folder(parser)
    add_device(parser, trains=True, spreads=True)
    add_output(parser)


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an .npz file written by train")
    add_data(parser, "built-in drawings, for a checkpoint that was trained on them", resumes=True)
    add_device(parser)


def _add_predict(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", type=name, metavar="IMAGE", help="JPEG or PNG files of any size")
    default = Path("work_dirs") / "model_latest.npz"
    parser.add_argument(
        "--checkpoint", type=name, default=default, metavar="FILE", help=f"written by train (default: {default})"
    )
    parser.add_argument(
        "--img-shape", type=shape, metavar="WxH", help="pixels the network takes (default: the checkpoint's)"
    )
    add_device(parser)


def _add_export(parser: Parser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=name, help="an .npz file written by train")
    parser.add_argument("--format", choices=FORMATS, help="of the file (default: by the ending of --out, else onnx)")
    parser.add_argument(
        "--input",
        choices=INPUTS,
        help="what an ONNX file takes as X: numbers, pixels divided by 255; uint8 pixels in rows; or uint8 images, as"
        " they are decoded (default: numbers of the network's dtype)",
    )
    parser.add_argument(
        "--img-shape", type=shape, metavar="WxH", help="pixels the network takes (default: the checkpoint's)"
    )
    parser.add_argument(
        "-o", "--out", type=path, metavar="FILE", help="(default: beside the checkpoint, with the format's ending)"
    )


def _add_compare(parser: Parser) -> None:
    parser.add_argument("kind", choices=COMPARISONS, help="what differs between the runs")
    add_data(parser)
    run = parser.add_argument_group("run")
    add_epochs(run, "N epochs of every run, counted from 0 (default: 100)")
    run.add_argument("--stochastic", action="store_true", help="batch-size: a batch of 1 too; says how long it takes")
    run.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and orders (default: 0)")
    run.add_argument(
        "--print-interval", type=count, default=10, metavar="N", help="epochs between evaluations (default: 10)"
    )
    run.add_argument(
        "--save-dir",
        type=path,
        default=Path("compare"),
        metavar="DIR",
        help="results; a run finished there is not made again (default: compare)",
    )
    add_device(parser, trains=True)
    add_output(parser)


def add_bench(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the flags of `bench`, and returns the group of those that say what is timed."""
    what = parser.add_argument_group("what is timed")
    what.add_argument("--quick", action="store_true", help="fewer batch sizes, shorter turns (default: off)")
    sizes = " ".join(map(str, BATCH_SIZES)), " ".join(map(str, QUICK_BATCH_SIZES))
    what.add_argument(
        "--batch-sizes", type=counts, metavar="N,N,...", help=f"(default: {sizes[0]}; --quick: {sizes[1]})"
    )
    what.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="method (default: adam)")
    what.add_argument("--threads", type=count, metavar="N", help="of each contender (default: all processors)")
    what.add_argument("--n-x", type=count, default=150528, metavar="N", help="pixels of a sample (default: 150528)")
    what.add_argument("--samples", type=count, default=2000, metavar="N", help="(default: 2000)")
    folder = Path("work_dirs") / "bench"
    parser.add_argument(
        "--save-dir", type=path, default=folder, metavar="DIR", help=f"of bench.json and bench.png (default: {folder})"
    )
    return what


def _add_info(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_plot(parser: Parser) -> None:
    text = "a run folder, a history (.json, .csv) or a checkpoint: one run to draw, several to compare; or a bench.json"
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help=text)
    parser.add_argument(
        "--out", type=path, metavar="FILE", help=".png, .pdf or .svg (default: beside the one, or comparison.png)"
    )
    parser.add_argument("--mini-batch", action="store_true", help="of one run: the cost of every mini-batch")
    parser.add_argument("--dev", action="store_true", help="of several: cost and accuracy over their dev sets")
    parser.add_argument("--title", default="", help="of a comparison (default: what the runs have in common)")


def _add_paths(parser: Parser) -> None:
    default = Path("paths.png")
    parser.add_argument(
        "--out", type=path, default=default, metavar="FILE", help=f".png, .pdf or .svg (default: {default})"
    )
