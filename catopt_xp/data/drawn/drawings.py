"""The built-in data: drawn cats and dogs.

They are drawings, not photographs: a set of real size that needs no download. A picture is a function of
(seed, split, class, index, img_shape) alone, so that a small set is the beginning of a large one, and any
process may draw any part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import thread_count
from catopt_xp.data.cache import cache_file, load_rows, store_rows
from catopt_xp.data.dataset import DataSet, check_memory, checked_img_shape, checked_whole
from catopt_xp.data.drawn.scenes import draw_picture
from catopt_xp.io.console import Bar

RECIPE = 1  # a change in how the drawings look takes the next number, so that no old cache file is read
TRAIN, DEV = 0, 1
DOG, CAT = 0, 1
PICTURES_PER_PROCESS = 100  # starting a process costs as much as drawing about 50 pictures
BYTES_PER_TASK = 250  # of memory, for what is known of one picture before it is drawn
SCRATCH = 40  # bytes of memory for each value of the picture that a process draws: its canvas, and its light as floats

Task = tuple[int, int, int, int]
"""(seed, split, class, index): what one picture is drawn from."""


def get_drawn_set(
    img_shape: tuple[int, int] = (224, 224),
    train_size: int = 1000,
    test_size: int = 200,
    seed: int = 0,
    cache: bool = True,
    workers: int | None = None,
    progress: bool | None = None,
) -> DataSet:
    """The built-in set of drawn cats and dogs.

    img_shape: (width, height) in pixels. train_size, test_size: pictures per class; test_size 0 means no dev
    set.
    seed: a whole number from 0; another seed is another set. cache: keep the pictures on disk.
    workers: processes that draw, by default one for each processor, or OMP_NUM_THREADS; the pictures do not
    depend on it.
    progress: show a bar; None: when stderr is a terminal.
    Returns a DataSet of uint8 pixels, cats (label 1) before dogs (label 0).
    Raises ValueError for a size, seed or shape that cannot be.

    >>> data = get_drawn_set((16, 16), train_size=2, test_size=1, cache=False)
    >>> data.train_X.shape, data.train_Y.tolist(), data.dev_X.shape
    ((768, 4), [[1, 1, 0, 0]], (768, 2))
    """
    img_shape = checked_img_shape(img_shape)
    train_size, test_size = checked_whole("train_size", train_size, 1), checked_whole("test_size", test_size, 0)
    seed = checked_whole("seed", seed, 0)
    facts = [RECIPE, (seed, TRAIN, CAT, 0), train_size, test_size, img_shape, np.__version__, version("pillow")]
    file = cache_file("drawn", facts) if cache else None
    workers = workers or thread_count()
    _check_memory(2 * (train_size + test_size), img_shape, workers, stored=file is not None and file.exists())
    tasks: list[Task] = [
        (seed, split, label, index)
        for split, size in ((TRAIN, train_size), (DEV, test_size))
        for label in (CAT, DOG)
        for index in range(size)
    ]
    notices: list[str] = []
    started = time.perf_counter()
    n_x = img_shape[0] * img_shape[1] * 3
    rows = load_rows(file, (len(tasks), n_x), notices) if file is not None else None
    timings = {"read": time.perf_counter() - started, "decode": 0.0}
    if rows is None:
        rows = _draw_rows(tasks, img_shape, workers, progress)
        timings["decode"] = time.perf_counter() - started
        rows = store_rows(file, rows) if file is not None else rows
    train, dev = rows[: 2 * train_size], rows[2 * train_size :]
    labels = np.array([[label for _, _, label, _ in tasks]], dtype=np.int64)
    return DataSet(
        train_X=train.T,
        train_Y=labels[:, : len(train)],
        dev_X=dev.T if test_size else None,
        dev_Y=labels[:, len(train) :] if test_size else None,
        classes=("dog", "cat"),
        name=drawn_name(seed),
        img_shape=img_shape,
        timings=timings,
        notices=notices,
    )


def _check_memory(m: int, img_shape: tuple[int, int], workers: int, stored: bool) -> None:
    """Refuse m pictures that the memory cannot hold; those in the cache are mapped, and need none of it."""
    n_x = img_shape[0] * img_shape[1] * 3
    pixels = 0 if stored else m * n_x + workers * SCRATCH * n_x
    check_memory(f"{m} drawings of {img_shape[0]}x{img_shape[1]} pixels", m * BYTES_PER_TASK + pixels)


def drawn_name(seed: int = 0) -> str:
    """What the built-in set of a seed is called."""
    return f"drawn cats and dogs (built in, seed {seed})"


def _draw_rows(tasks: list[Task], img_shape: tuple[int, int], workers: int, progress: bool | None) -> NDArray[np.uint8]:
    """Draw the pictures: (m, n_x)."""
    n_x = img_shape[0] * img_shape[1] * 3
    rows = np.empty((len(tasks), n_x), dtype=np.uint8)
    workers = min(workers, len(tasks) // PICTURES_PER_PROCESS)
    with ExitStack() as stack:
        pictures = _drawn_elsewhere(stack, tasks, img_shape, workers) if workers > 1 else _drawn_here(tasks, img_shape)
        bar = Bar(
            pictures,
            total=len(tasks),
            desc="drawing cats and dogs",
            unit="picture",
            leave=False,
            disable=None if progress is None else not progress,  # None: no bar unless stderr is a terminal
        )
        for row, picture in zip(rows, bar, strict=True):
            row[:] = picture
    return rows


def _drawn_here(tasks: list[Task], img_shape: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    for seed, split, label, index in tasks:
        yield draw_picture([seed, split, label, index], label == CAT, img_shape).reshape(-1)


def _drawn_elsewhere(
    stack: ExitStack, tasks: list[Task], img_shape: tuple[int, int], workers: int
) -> Iterator[NDArray[np.uint8]]:
    """Draw in other processes: number k draws the pictures k, k + workers, ... and writes them to its pipe in
    that order.

    Not threads: Pillow's drawing holds the interpreter's lock, and two threads take longer than one. Not
    multiprocessing: it runs the caller's script again, which breaks a script without a main guard.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    }
    command = [sys.executable, "-P", "-c", "from catopt_xp.data.drawn.drawings import draw_to_pipe; draw_to_pipe()"]
    processes = []
    for k in range(workers):
        with tempfile.TemporaryFile() as order:  # a file, as a pipe breaks when the process does not even start
            order.write(json.dumps([tasks[k::workers], img_shape]).encode())
            order.seek(0)
            process = subprocess.Popen(
                command, env=environment, stdin=order, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        stack.enter_context(process)
        stack.callback(process.kill)  # runs first: nothing is waited for after an error or Ctrl-C
        processes.append(process)
    n_x = img_shape[0] * img_shape[1] * 3
    for number in range(len(tasks)):
        process = processes[number % workers]
        assert process.stdout is not None
        assert process.stderr is not None
        picture = process.stdout.read(n_x)
        if len(picture) < n_x:
            reason = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"a process that draws the built-in set ended early: {' '.join(reason) or 'no message'}")
        yield np.frombuffer(picture, dtype=np.uint8)


def draw_to_pipe() -> None:
    """What a drawing process runs: tasks and shape come as JSON on its input, raw pixels go to its output."""
    tasks, (width, height) = json.load(sys.stdin)
    for picture in _drawn_here(tasks, (width, height)):
        sys.stdout.buffer.write(picture.tobytes())
