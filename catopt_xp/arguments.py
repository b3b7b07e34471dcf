"""The flags of the command line: what they are called, what they take, what their help says. Floor F5.

A bad value is said in one line that names the flag, and the status is 2, before any work is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from catopt_xp.data.dataset import ON_ERROR
from catopt_xp.data.order import SHUFFLES
from catopt_xp.engines import ENGINES
from catopt_xp.flag_values import (
    batch_size,
    count,
    file_name,
    layers,
    name,
    not_negative,
    path,
    positive,
    schedule,
    seed,
    shape,
    share,
    sizes,
    whole,
)
from catopt_xp.functional import HIDDEN_ACTIVATIONS
from catopt_xp.optim import EPS_MODES, OPTIMIZERS
from catopt_xp.version import __version__

NAME = "catopt-xp"
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

FROM_CHECKPOINT = "resumed: the checkpoint's"

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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} (see {self.prog} --help)\n")


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
    _add_info(command("info", "print which device is used, why not the other one, and versions"))
    _add_plot(command("plot", "draw the history of a run, or compare several"))
    _add_paths(command("paths", "draw the optimizers' paths over a saddle point, a plateau and a valley"))
    return parser


def _add_tune(parser: Parser) -> None:
    _add_data(parser)
    _add_network(parser)
    _add_optimizer(parser)
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--batch-sizes", type=sizes, default=(), metavar="N,N,...", help="measure these too, besides 64,128,256,512"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights (default: 0)")
    _add_device(parser, trains=True)
    _add_output(parser)


def _add_train(parser: Parser) -> None:
    _add_data(parser, resumes=True)
    _add_network(parser)
    _add_optimizer(parser)
    run = parser.add_argument_group("run")
    _add_epochs(run, "N epochs in all, counted from 0, those of a resumed run included (default: 100)")
    _add_run(run)
    _add_run_folder(parser)
    _add_device(parser, trains=True)
    _add_output(parser)


def _add_network(parser: Parser) -> None:
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


def _add_run(run: argparse._ArgumentGroup) -> None:
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


def _add_run_folder(parser: Parser) -> None:
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


def _add_optimizer(parser: Parser) -> None:
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
        help="const, hyperbola:RATE, exponential:BASE, sqrt:K, staircase:FACTOR,EVERY, table:EPOCH=LR,..., "
        "cosine:EPOCHS[,FINAL]; before any of them warmup:EPOCHS[,START]+ (default: const; resumed: the checkpoint's)",
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


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an .npz file written by train")
    _add_data(parser, "built-in drawings, for a checkpoint that was trained on them", resumes=True)
    _add_device(parser)


def _add_predict(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", type=name, metavar="IMAGE", help="JPEG or PNG files of any size")
    default = Path("work_dirs") / "model_latest.npz"
    parser.add_argument(
        "--checkpoint", type=name, default=default, metavar="FILE", help=f"written by train (default: {default})"
    )
    parser.add_argument(
        "--img-shape", type=shape, metavar="WxH", help="pixels the network takes (default: the checkpoint's)"
    )
    _add_device(parser)


def _add_epochs(group: argparse._ArgumentGroup, text: str) -> None:
    group.add_argument("--epochs", "--total-epoch", dest="total_epoch", type=count, default=100, metavar="N", help=text)


def _add_compare(parser: Parser) -> None:
    parser.add_argument("kind", choices=COMPARISONS, help="what differs between the runs")
    _add_data(parser)
    run = parser.add_argument_group("run")
    _add_epochs(run, "N epochs of every run, counted from 0 (default: 100)")
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
    _add_device(parser, trains=True)
    _add_output(parser)


def _add_info(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_plot(parser: Parser) -> None:
    parser.add_argument(
        "histories", nargs="+", type=path, metavar="HISTORY.json", help="one to draw, several to compare"
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE", help=".png, .pdf or .svg (default: beside the one, or comparison.png)"
    )
    parser.add_argument("--mini-batch", action="store_true", help="of one history: the cost of every mini-batch")
    parser.add_argument("--title", default="", help="of a comparison (default: none)")


def _add_paths(parser: Parser) -> None:
    default = Path("paths.png")
    parser.add_argument(
        "--out", type=path, default=default, metavar="FILE", help=f".png, .pdf or .svg (default: {default})"
    )


def _add_data(parser: Parser, default: str = "built-in drawings", resumes: bool = False) -> None:
    """`resumes`: there may be a checkpoint, which knows the size of its pictures."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=name, metavar="PATH", help=f"folder of photographs, or .npz with X and Y (default: {default})"
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


def _add_device(parser: Parser, trains: bool = False) -> None:
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


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a bar (default: when stderr is a terminal)"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
