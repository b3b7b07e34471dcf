"""The flags of the command line: what they are called, what they take, what their help says. Floor F5.

A bad value is said in one line that names the flag, and the status is 2, before any work is done.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from catopt_xp.bench.contenders import CONTENDERS
from catopt_xp.bench.table import BATCH_SIZES, QUICK_BATCH_SIZES
from catopt_xp.export import FORMATS, INPUTS
from catopt_xp.flag_groups import (
    Parser,
    add_data,
    add_device,
    add_epochs,
    add_network,
    add_optimizer,
    add_output,
    add_run,
    add_run_folder,
)
from catopt_xp.flag_values import (
    count,
    counts,
    name,
    names,
    path,
    seed,
    shape,
)
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.version import __version__

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
                           user's cache folder: ~/.cache, XDG_CACHE_HOME, or LOCALAPPDATA on Windows)

"""
COMPARE = """
The runs are of --epochs each: batch-size has 4 (5 with --stochastic), optimizers 4, decay 3. On the full-size set of
drawings a run takes minutes; --img-shape, --train-size and --epochs make it shorter."""
BENCH = """
The workload is seeded noise of the reference network's size. All contenders train from the same weights on the same
rows in the same order, which is checked first. Libraries that are not installed are left out, and that is said. It
takes five minutes or so, --quick little more than one; let no other program run meanwhile."""

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
    text = "time an epoch against batch size: ours, other libraries, and what this machine could do at best"
    _add_bench(command("bench", text, BENCH))
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


def _add_bench(parser: Parser) -> None:
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--quick",
        action="store_true",
        help="fewer batch sizes, shorter turns, without the chapter's code (default: off)",
    )
    sizes = " ".join(map(str, BATCH_SIZES)), " ".join(map(str, QUICK_BATCH_SIZES))
    what.add_argument(
        "--batch-sizes", type=counts, metavar="N,N,...", help=f"(default: {sizes[0]}; --quick: {sizes[1]})"
    )
    what.add_argument(
        "--contenders",
        type=names,
        metavar="NAME,...",
        help=f"of {', '.join(CONTENDERS)}; the others are compared with the first (default: all)",
    )
    what.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="method (default: adam)")
    what.add_argument("--threads", type=count, metavar="N", help="of each contender (default: all processors)")
    what.add_argument("--n-x", type=count, default=150528, metavar="N", help="pixels of a sample (default: 150528)")
    what.add_argument("--samples", type=count, default=2000, metavar="N", help="(default: 2000)")
    folder = Path("work_dirs") / "bench"
    parser.add_argument(
        "--save-dir", type=path, default=folder, metavar="DIR", help=f"of bench.json and bench.png (default: {folder})"
    )


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
