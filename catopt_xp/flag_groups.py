"""Groups of flags that several commands share: data, network, optimizer, run, device, output. Floor F5."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from catopt_xp.data.dataset import ON_ERROR
from catopt_xp.data.order import SHUFFLES
from catopt_xp.engines.choose import ENGINES
from catopt_xp.flag_values import (
    batch_size,
    count,
    file_name,
    layers,
    memory,
    name,
    not_negative,
    path,
    positive,
    schedule,
    seed,
    shape,
    share,
    whole,
)
from catopt_xp.nn.functional import HIDDEN_ACTIVATIONS
from catopt_xp.optim.rules import EPS_MODES, OPTIMIZERS

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
