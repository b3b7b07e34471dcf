"""The command line: `catopt-xp`, also `python -m catopt_xp`. Floor F6.

Each command is a function from parsed flags to an exit status. Errors are one line on stderr, and the status says whose
they are: 2 the command's, 1 the data's, the files' or the run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import numpy as np

from catopt_xp.arguments import OPTIMIZER_OPTIONS, make_parser
from catopt_xp.backend import Backend, device_report, get_backend
from catopt_xp.data import decode_images, load_data
from catopt_xp.data.drawings import drawn_name
from catopt_xp.data.resident import make_resident
from catopt_xp.experiments import SURFACES, compare, optimizer_paths
from catopt_xp.history import History
from catopt_xp.network import DeepNetwork
from catopt_xp.optim import make_optimizer
from catopt_xp.plots import plot_comparison, plot_history, plot_mini_batch, plot_paths
from catopt_xp.running import Interrupted
from catopt_xp.saving import Checkpoint
from catopt_xp.training import TrainResult, train

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
NAME = "catopt-xp"


class UsageError(Exception):
    """Flags that cannot be meant; the message is one line."""


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    `argv`: the words after the program's name; None takes those of this process. `prog`: what the user typed before
    them, as printed in the command that resumes. A bad flag, `--help` and `--version` end by SystemExit.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(prog).parse_args(words)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with _termination_as_interruption():
                _COMMANDS[args.command](args)
            sys.stdout.flush()  # a closed pipe is noticed here, not at exit
        except BrokenPipeError:
            return _leave_pipe()
        except KeyboardInterrupt as interruption:
            _report_interruption(interruption, prog, words, args.command)
            return INTERRUPTED
        except Exception as error:
            if args.debug:
                raise
            print(f"{NAME}: error: {_one_line(error)}", file=sys.stderr)
            return BAD_USAGE if isinstance(error, UsageError) else FAILED
    return DONE


def entry() -> NoReturn:
    """What the installed `catopt-xp` calls."""
    sys.exit(main())


# --- commands ---------------------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> None:
    """Trains into a run folder: checkpoint, history and, with matplotlib, its figure."""
    options = {option: getattr(args, flag) for flag, option in OPTIMIZER_OPTIONS.items()}
    options = {option: value for option, value in options.items() if value is not None}
    if args.recover_from is None or args.optimizer is not None:
        with _usage():  # refused before the data are loaded
            weights = {"W0": np.zeros((1, 1), dtype=args.dtype)}
            make_optimizer(args.optimizer or "adam", weights, args.learning_rate, **options)
    result = train(optimizer_options=options, **_arguments(args))
    _write_results(result, args.save_dir / f"{args.model_name}_history.json", args.quiet)


def _write_results(result: TrainResult, file: Path, quiet: bool) -> None:
    """History and figure beside the checkpoint, and lines that say where they are."""
    result.history.to_json(file)
    lines = [f"checkpoint: {result.checkpoint}", f"history: {file}"]
    if result.history.epoch:
        figure = file.with_suffix(".png")
        try:
            result.history.plot(figure)
            lines.append(f"figure: {figure}")
        except ImportError as error:
            warnings.warn(f"no figure was drawn: {error}", stacklevel=2)
    if not quiet:
        print("\n".join(lines))


def run_compare(args: argparse.Namespace) -> None:
    """Runs one of the chapter's comparisons, or what is left of it."""
    if args.stochastic and args.kind != "batch-size":
        raise UsageError("--stochastic goes with batch-size alone")
    compare(**_arguments(args))


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of `train` or `compare`: most have the argument's name."""
    others = {"command", "debug", "quiet", *OPTIMIZER_OPTIONS}
    given = {name: value for name, value in vars(args).items() if name not in others}
    progress = False if args.quiet and args.progress is None else args.progress
    return given | {"device": _backend(args), "progress": progress, "verbose": not args.quiet}


def run_evaluate(args: argparse.Namespace) -> None:
    """Prints what is evaluated, and accuracy and cost over its training and its dev set, a line each."""
    backend = _backend(args)
    checkpoint = Checkpoint.read(args.checkpoint)
    model, trained = checkpoint.trained_model(), _trained_on(checkpoint)
    if args.data is None and not trained["data"].startswith(drawn_name()):
        known = f"was trained on {trained['data']}" if trained["data"] else "does not say what it was trained on"
        raise UsageError(f"{args.checkpoint} {known}: name the set to evaluate it over with --data")
    img_shape = args.img_shape or trained["img_shape"]
    data = load_data(args.data, img_shape, args.train_size, args.dev_size, on_error=args.on_error)
    for notice in data.notices:
        print(f"note: {notice}")
    if data.classes and trained["classes"] and list(data.classes) != list(trained["classes"]):
        known, given = ", ".join(trained["classes"]), ", ".join(data.classes)
        raise ValueError(f"{args.checkpoint} was trained on the classes {known}; {data.name} has {given}")
    model = model.to(backend)
    print(f"{args.checkpoint} on {backend.device} ({backend.reason})")
    print(f"data: {data.name}")
    n_x, units, output = model.neuron_cnt[0], model.neuron_cnt[-1], model.activation_func[-1]
    for title, name, X, Y in (
        ("training set", "X", data.train_X, data.train_Y),
        ("dev set", "dev_X", data.dev_X, data.dev_Y),
    ):
        if X is not None:
            resident = make_resident(X, Y, backend, n_x=n_x, output=output, units=units, dtype=model.dtype, name=name)
            accuracy, cost = model.evaluate_rows(resident.samples, resident.targets)
            print(f"{title} ({X.shape[1]} samples): accuracy {accuracy:.2%}, cost {cost:.4f}")


def run_predict(args: argparse.Namespace) -> None:
    """Prints a line for each image: file, class, probability, separated by tabs."""
    checkpoint = Checkpoint.read(args.checkpoint)
    model, trained = checkpoint.trained_model(), _trained_on(checkpoint)
    img_shape = args.img_shape or trained["img_shape"]
    if img_shape is None:
        raise ValueError(f"{args.checkpoint} does not say how large its images are; give --img-shape WxH")
    n_x = 3 * img_shape[0] * img_shape[1]
    if n_x != model.neuron_cnt[0]:
        raise ValueError(
            f"{args.checkpoint} takes {model.neuron_cnt[0]} numbers a sample, an image of"
            f" {img_shape[0]}x{img_shape[1]} has {n_x}; give another --img-shape"
        )
    pixels = decode_images(args.images, img_shape)  # (m, n_x) uint8
    probabilities = model.to(_backend(args)).forward(pixels.T, train_mode=False)  # (n_out, m)
    for image, (number, probability) in zip(args.images, _answers(model, probabilities), strict=True):
        label = trained["classes"][number] if trained["classes"] else f"class {number}"
        print(f"{image}\t{label}\t{probability:.4f}")


def _answers(model: DeepNetwork, probabilities: Any) -> list[tuple[int, float]]:
    """Class number and its probability for each column of (n_out, m) probabilities."""
    if model.activation_func[-1] == "sigmoid":
        if model.neuron_cnt[-1] > 1:
            raise ValueError(
                "the checkpoint's network gives several labels to an image; predict takes one of one label"
            )
        probabilities = np.concatenate([1.0 - probabilities, probabilities])
    numbers = probabilities.argmax(axis=0)
    return [(int(k), float(p)) for k, p in zip(numbers, probabilities.max(axis=0), strict=True)]


def _trained_on(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint says of its data: "data" (name) and "classes" (by label), may be empty; "img_shape" or None."""
    run = checkpoint.run_state().history.get("run", {})
    img_shape = tuple(run["img_shape"]) if run.get("img_shape") else None
    return {"data": run.get("data") or "", "classes": run.get("classes") or [], "img_shape": img_shape}


def run_info(args: argparse.Namespace) -> None:
    """Prints the device report."""
    report = device_report()
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def run_plot(args: argparse.Namespace) -> None:
    """Draws one history, or compares several."""
    files: list[Path] = args.histories
    if args.mini_batch and len(files) > 1:
        raise UsageError(f"--mini-batch draws one history, {len(files)} are given")
    runs = {str(file): dataclasses.asdict(History.from_json(file)) for file in files}
    if len(files) == 1:
        out = args.out or files[0].with_suffix(".png")
        draw = plot_mini_batch if args.mini_batch else plot_history
        draw(runs[str(files[0])], out)
    else:
        out = args.out or Path("comparison.png")
        plot_comparison({_legend(file, files): runs[str(file)] for file in files}, out, args.title)
    print(f"figure: {out}")


def _legend(file: Path, files: Sequence[Path]) -> str:
    """A run's name: that of its file, without what the command line adds; the whole path where two have one name."""
    unique = sum(other.name == file.name for other in files) == 1
    return file.stem.removesuffix("_history") if unique else str(file)


def run_paths(args: argparse.Namespace) -> None:
    """Draws the optimizers' paths over the three surfaces."""
    plot_paths([optimizer_paths(name) for name in SURFACES], args.out)
    print(f"figure: {args.out}")


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "compare": run_compare,
    "info": run_info,
    "plot": run_plot,
    "paths": run_paths,
}


# --- how a command ends -----------------------------------------------------------------------------------------------


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, also where `train` does not look after it, as between two runs."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no signals
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # A handler that was not set from Python is None here, and cannot be put back: the default is.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextmanager
def _usage() -> Iterator[None]:
    """What is wrong in here is wrong with the flags."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _backend(args: argparse.Namespace) -> Backend:
    with _usage():
        return get_backend(args.device, args.strict_device)


def _report_interruption(interruption: KeyboardInterrupt, prog: str, words: list[str], command: str) -> None:
    """Says what was saved, and the exact command that goes on from there."""
    saved = interruption.checkpoint if isinstance(interruption, Interrupted) else None
    where = f" in epoch {interruption.epoch}; saved {saved}" if isinstance(interruption, Interrupted) and saved else ""
    print(f"{NAME}: interrupted{where}", file=sys.stderr)
    if command == "train" and saved is not None:
        words = [*_without(words, "--recover-from"), "--recover-from", str(saved)]
    elif command != "compare":  # a comparison finds by itself what its folder holds
        return
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    print(f"to resume: {prog} {join(words)}", file=sys.stderr)


def _without(words: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value, however they are written.

    >>> _without(["train", "--recover-from", "a", "--seed", "1", "--recover-from=b"], "--recover-from")
    ['train', '--seed', '1']
    """
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == flag:
            next(rest, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def _one_line(error: Exception) -> str:
    """An error as one line; the kind of error too, where its text was not written for the user."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    ours = isinstance(error, UsageError | ValueError | OSError | RuntimeError | ImportError | FloatingPointError)
    return " ".join((text if ours and text else f"{type(error).__name__}: {text} (--debug shows where)").split())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"{NAME}: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _leave_pipe() -> int:
    """The reader has gone: nothing is left to say, and Python's own flush at exit must not say that either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return FAILED
