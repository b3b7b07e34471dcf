"""The command line: `catopt-xp`, also `python -m catopt_xp`.

Each command is a function from parsed flags to an exit status. Errors are one line on stderr, and the status says whose
they are: 2 the command's, 1 the data's, the files' or the run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import numpy as np

from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.ranks import Ranks, world
from catopt_xp.backend.xp import Backend, device_report, get_backend
from catopt_xp.commands import bench
from catopt_xp.commands.compare import SURFACES, compare, optimizer_paths
from catopt_xp.commands.export import (
    FORMATS,
    INPUTS,
    export_onnx,
    export_safetensors,
    read_trained,
    trained_of,
    trained_on,
)
from catopt_xp.commands.flags import NAME, OPTIMIZER_OPTIONS, REMEMBERED, RENAMED, parse_words, with_flags
from catopt_xp.commands.messages import (
    DONE,
    INTERRUPTED,
    Stdout,
    UsageError,
    check_launch,
    checkpoint_mark,
    command_line,
    end_failed,
    end_interrupted,
    ignore_signals,
    interruption_in,
    leave_stdout,
    one_voice,
    program_again,
    show_warning,
    termination_as_interruption,
    undisturbed,
    usage,
)
from catopt_xp.commands.plot import read_benchmark, read_history, run_files, run_names
from catopt_xp.commands.tune import tune
from catopt_xp.data.dataset import check_memory
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.drawn.drawings import drawn_name
from catopt_xp.data.load import load_data
from catopt_xp.data.photographs import DEFAULT_SHAPE
from catopt_xp.data.resident import SampleLayout, make_resident
from catopt_xp.io.console import plain, warn
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import make_optimizer
from catopt_xp.training.callbacks import Callback, CsvLog, JsonLog, TensorBoard
from catopt_xp.training.checkpoint import Checkpoint, npz_path
from catopt_xp.training.plots import plot_benchmark, plot_comparison, plot_history, plot_mini_batch, plot_paths
from catopt_xp.training.train import TrainResult, train

COPIES = 4  # of the parameters, that training keeps: themselves, the gradient and two moments


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    `argv`: the words after the program's name; None takes those of this process. `prog`: what the user typed before
    them, as printed in the command that resumes. A bad flag, `--help` and `--version` end by SystemExit.
    """
    with one_voice():
        return _main(list(sys.argv[1:] if argv is None else argv), prog)


def _main(words: Sequence[str], prog: str, last: bool = False) -> int:
    """`last`: the process ends after this one: once the end has begun, signals have nothing to end any more."""
    args, before = argparse.Namespace(), None
    stdout = sys.stdout and cast(TextIO, Stdout(sys.stdout))  # None where it is closed
    with warnings.catch_warnings(), redirect_stdout(stdout), termination_as_interruption():
        warnings.showwarning = show_warning
        try:
            args = _parsed(words, prog)
            before = checkpoint_mark(args)
            check_launch(getattr(args, "distributed", False))
            _COMMANDS[args.command](args)
            if stdout is not None:
                stdout.flush()  # a full disk or a closed pipe is noticed here, not at exit
            if last:
                ignore_signals()
        except BrokenPipeError:
            return leave_stdout()
        except (KeyboardInterrupt, Exception) as error:
            interruption = interruption_in(error)
            if interruption is not None:
                with undisturbed(last):
                    return end_interrupted(interruption, args, before, prog, words)
            if getattr(args, "debug", False):
                raise
            return end_failed(cast(Exception, error), args)
    return DONE


def entry(prog: str | None = None) -> NoReturn:
    """What the installed `catopt-xp` calls. `prog`: how it was called; None takes the word that stands in sys.argv."""
    with termination_as_interruption():
        try:
            if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is printed escaped, and no error
                sys.stdout.reconfigure(errors="backslashreplace")
            with one_voice():
                status = _main(sys.argv[1:], program_again(sys.argv[0]) if prog is None else prog, last=True)
        except KeyboardInterrupt:
            print(f"{NAME}: interrupted", file=sys.stderr)
            status = INTERRUPTED
        ignore_signals()
    sys.exit(status)


def _parsed(words: Sequence[str], prog: str) -> argparse.Namespace:
    try:
        args = parse_words(words, prog)
    except SystemExit:
        if sys.stdout is not None:
            sys.stdout.flush()  # of --help
        raise
    if sys.stdout is None and not getattr(args, "quiet", False):
        raise OSError("stdout is closed; give it a place to go to, or leave it open")
    return args


# --- commands ---------------------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> None:
    """Trains into a run folder: checkpoint, history as it grows and in the end, and, with matplotlib, its figure."""
    comm = world() if args.distributed else None
    ranks = Ranks(comm)
    if args.distributed and ranks.size == 1:
        warn("--distributed, and one process alone: mpiexec -n N starts several")
    history = args.save_dir / f"{args.model_name}_history.json"
    logs: list[Callback] = []
    with ranks.agreed():
        options = _checked_options(args)
        if args.recover_from is None:
            _check_hidden(args)
        _remember(args)
        if ranks.rank == 0:
            logs = [CsvLog(history.with_suffix(".csv")), JsonLog(history)]
            if args.tensorboard is not None:
                logs.append(TensorBoard(args.tensorboard / args.model_name))
    with _naming(args.data):
        result = train(optimizer_options=options, callbacks=logs, comm=comm, **_arguments(args))
    if ranks.rank == 0:
        _write_results(result, history, args.tensorboard, args.quiet, not args.no_figure)


def _checked_options(args: argparse.Namespace) -> dict[str, Any]:
    """The optimizer's options that were given, refused before the data are loaded."""
    options = {option: getattr(args, flag) for flag, option in OPTIMIZER_OPTIONS.items()}
    options = {option: value for option, value in options.items() if value is not None}
    if getattr(args, "recover_from", None) is None or args.optimizer is not None:
        weights = {"W0": np.zeros((1, 1), dtype=args.dtype)}
        try:
            make_optimizer(args.optimizer or "adam", weights, args.learning_rate, **options)
        except ValueError as error:
            raise UsageError(with_flags(str(error), [*OPTIMIZER_OPTIONS.values(), *RENAMED])) from error
    return options


def _remember(args: argparse.Namespace) -> None:
    """Gives the flags that are absent the values of the run that is resumed, or of a new one."""
    before: Mapping[str, Any] = {}
    if args.recover_from is not None:
        checkpoint = Checkpoint.read(args.recover_from)
        before = trained_on(checkpoint)
        _check_img_shape(args.img_shape, checkpoint.build_model().neuron_cnt[0], args.recover_from)
        args.img_shape = args.img_shape or before["img_shape"]
    for name, default in REMEMBERED.items():
        if getattr(args, name) is None:
            setattr(args, name, before.get(name, default))


def _check_img_shape(img_shape: tuple[int, int] | None, n_x: int, checkpoint: str) -> None:
    """Refuses pictures of another size than a network takes, before they are decoded or drawn."""
    if img_shape is not None and 3 * math.prod(img_shape) != n_x:
        told = f"--img-shape {img_shape[0]}x{img_shape[1]}: pictures of {3 * math.prod(img_shape)} values"
        raise UsageError(f"{told}, the network of {checkpoint} takes {n_x}; leave it out")


def _check_hidden(args: argparse.Namespace) -> None:
    """Refuses layers that the memory cannot hold, as far as their sizes are known before the data are loaded."""
    pictures = args.img_shape or (DEFAULT_SHAPE if args.data is None else None)
    inputs = [3 * math.prod(pictures)] if pictures else []
    weights = sum(a * b for a, b in itertools.pairwise([*inputs, *args.hidden]))
    what = f"the parameters of --hidden {','.join(map(str, args.hidden))}, their gradient and moments"
    check_memory(what, COPIES * np.dtype(args.dtype).itemsize * weights, "choose a smaller --hidden or --img-shape")


@contextmanager
def _naming(data: str | None) -> Iterator[None]:
    """A message about X or Y names the file that they are from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if data is not None and re.match(r"(dev_)?[XY] ", str(error)):
            raise ValueError(f"{data}: {error}") from error
        raise


def _write_results(result: TrainResult, history: Path, tensorboard: Path | None, quiet: bool, figure: bool) -> None:
    """Says where what there is lies, before the figure, if there is to be one, is drawn beside it: that may fail."""

    def say(text: str) -> None:
        if not quiet:
            print(plain(text), flush=True)

    if tensorboard is not None:
        say(f"to look at it: tensorboard --logdir {command_line([str(tensorboard)])}")
    if result.history.epoch:
        say(f"log: {history.with_suffix('.csv')}")
    say(f"checkpoint: {result.checkpoint}")
    if not result.history.epoch:
        return
    say(f"history: {history}")
    drawing = history.with_suffix(".png")
    if figure and _drawn(lambda: result.history.plot(drawing)):
        say(f"figure: {drawing}")


def _drawn(draw: Callable[[], Any]) -> bool:
    """Whether matplotlib was there to draw with; a warning where it was not."""
    try:
        draw()
    except ImportError as error:
        warn(f"no figure was drawn: {error}")
        return False
    return True


def run_compare(args: argparse.Namespace) -> None:
    """Runs one of the chapter's comparisons, or what is left of it."""
    if args.stochastic and args.kind != "batch-size":
        raise UsageError("--stochastic goes with batch-size alone")
    with _naming(args.data):
        compare(**_arguments(args))


def run_tune(args: argparse.Namespace) -> None:
    """Prints samples per second at several batch sizes, and the one that `--batch-size auto` would take."""
    options = _checked_options(args)
    _check_hidden(args)
    arguments = {name: value for name, value in _arguments(args).items() if value is not None}
    told = arguments.pop("verbose")
    with _naming(args.data):
        tuning = tune(optimizer_options=options, **arguments)
    if told:
        print(f"on {tuning.device}, engine {tuning.engine}, {tuning.m} samples")
    print(tuning.table())
    print(f"batch size {tuning.batch_size}: {tuning.reason}")


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of `train` or `compare`: most have the argument's name."""
    others = {"command", "debug", "quiet", "tensorboard", "distributed", "no_figure", *OPTIMIZER_OPTIONS}
    given = {name: value for name, value in vars(args).items() if name not in others}
    progress = False if args.quiet and args.progress is None else args.progress
    device = args.device if getattr(args, "distributed", False) else _backend(args)  # ranks choose theirs together
    return given | {"device": device, "progress": progress, "verbose": not args.quiet}


def _backend(args: argparse.Namespace) -> Backend:
    with usage():
        return get_backend(args.device, args.strict_device)


def run_evaluate(args: argparse.Namespace) -> None:
    """Prints what is evaluated, and accuracy and cost over its training and its dev set, a line each."""
    backend = _backend(args)
    model, trained = read_trained(args.checkpoint)
    if args.data is None and not trained["data"].startswith(drawn_name()):
        known = f"was trained on {trained['data']}" if trained["data"] else "does not say what it was trained on"
        raise UsageError(f"{args.checkpoint} {known}: name the set to evaluate it over with --data")
    _check_img_shape(args.img_shape, model.neuron_cnt[0], args.checkpoint)
    # Arrays say themselves how large they are.
    arrays = args.data is not None and Path(args.data).suffix.lower() in (".npz", ".npy")
    img_shape = args.img_shape or (None if arrays else trained["img_shape"])
    data = load_data(args.data, img_shape, args.train_size, args.dev_size, on_error=args.on_error)
    for notice in data.notices:
        print(f"note: {plain(notice)}")
    if data.classes and trained["classes"] and list(data.classes) != list(trained["classes"]):
        known, given = ", ".join(trained["classes"]), ", ".join(data.classes)
        raise ValueError(f"{args.checkpoint} was trained on the classes {known}; {data.name} has {given}")
    model = model.to(backend)
    print(f"{plain(args.checkpoint)} on {backend.device} ({backend.reason})")
    print(f"data: {plain(data.name)}")
    layout = SampleLayout(model.neuron_cnt[0], model.activation_func[-1], model.neuron_cnt[-1], model.dtype)
    for title, name, X, Y in (
        ("training set", "X", data.train_X, data.train_Y),
        ("dev set", "dev_X", data.dev_X, data.dev_Y),
    ):
        if X is not None:
            with _naming(args.data):
                resident = make_resident(X, Y, backend, layout, name)
            accuracy, cost = model.evaluate_rows(resident.samples, resident.targets)
            print(f"{title} ({X.shape[1]} samples): accuracy {accuracy:.2%}, cost {cost:.4f}")


def run_predict(args: argparse.Namespace) -> None:
    """Prints a line for each image: file, class, probability, separated by tabs."""
    model, trained = read_trained(args.checkpoint)
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
        print(f"{plain(image)}\t{plain(label)}\t{probability:.4f}")  # one line, whatever the names


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


def run_export(args: argparse.Namespace) -> None:
    """Writes a checkpoint's network as a file for other programs, and says what an ONNX file takes."""
    ending = args.out.suffix[1:] if args.out else ""
    kind = args.format or (ending if ending in FORMATS else "onnx")
    if args.input and kind != "onnx":
        raise UsageError("--input goes with --format onnx alone")
    if ending in FORMATS and ending != kind:
        raise UsageError(f"--out {args.out} and --format {kind} do not go together; leave one of them out")
    out = args.out or npz_path(args.checkpoint).with_suffix(f".{kind}")
    trained = trained_of(args.checkpoint, img_shape=args.img_shape)
    if kind == "onnx":
        taken = args.input or trained.network.dtype
        print(f"onnx: {plain(export_onnx(trained, out, taken))}")
        print(f"it takes X, {INPUTS[taken]}")
    else:
        print(f"safetensors: {plain(export_safetensors(trained, out))}")


def run_bench(args: argparse.Namespace, contenders: Mapping[str, bench.Entry] = bench.OURS) -> None:
    """Times contenders on the same work; writes a table as JSON and, with matplotlib, as a figure."""
    sizes, rounds, seconds = bench.BATCH_SIZES, bench.ROUNDS, bench.SECONDS
    if args.quick:
        sizes, rounds, seconds = bench.QUICK_BATCH_SIZES, bench.QUICK_ROUNDS, bench.QUICK_SECONDS
    with usage():
        work = bench.Workload(n_x=args.n_x, m=args.samples, optimizer=args.optimizer)
        threads = args.threads or thread_count()
        measured = bench.Measurement(work, threads, args.batch_sizes or sizes, contenders, rounds, seconds)
    args.save_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is said before minutes of work
    results = bench.run_table(measured, lambda text: print(text, flush=True))
    file = bench.write_table(results, args.save_dir)
    print(f"results: {file}")
    figure = file.with_suffix(".png")
    if _drawn(lambda: plot_benchmark(results, figure)):
        print(f"figure: {figure}")


def run_info(args: argparse.Namespace) -> None:
    """Prints the device report."""
    report = device_report()
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def run_plot(args: argparse.Namespace) -> None:
    """Draws one run, compares several, or draws the results of a benchmark."""
    files = [file for given in args.runs for file in run_files(given)]
    several = len(files) > 1
    if args.mini_batch and several:
        raise UsageError(f"--mini-batch draws one run, {len(files)} are given")
    out = args.out or (Path("comparison.png") if several else files[0].with_suffix(".png"))
    results = None if several else read_benchmark(files[0])
    if results is not None:
        plot_benchmark(results, out)
    else:
        cost = "dev_loss" if args.dev else "full_train_loss"
        needed = [cost, "seconds"] if several else ["mini_batch_loss" if args.mini_batch else "epoch"]
        runs = [dataclasses.asdict(read_history(file)) for file in files]
        for file, run in zip(files, runs, strict=True):
            if not all(run[key] for key in needed):
                raise ValueError(f"{file} has no {' or no '.join(needed)}; give the history of a run that was trained")
        if several:
            named = dict(zip(run_names(files), runs, strict=True))
            plot_comparison(named, out, args.title, "dev" if args.dev else "train")
        else:
            (plot_mini_batch if args.mini_batch else plot_history)(runs[0], out)
    print(f"figure: {plain(out)}")


def run_paths(args: argparse.Namespace) -> None:
    """Draws the optimizers' paths over the three surfaces."""
    plot_paths([optimizer_paths(name) for name in SURFACES], args.out)
    print(f"figure: {plain(args.out)}")


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "compare": run_compare,
    "tune": run_tune,
    "export": run_export,
    "bench": run_bench,
    "info": run_info,
    "plot": run_plot,
    "paths": run_paths,
}
