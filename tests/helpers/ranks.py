"""Runs of several ranks for tests: a script started by mpiexec, and what it said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
OBSTACLE = None if MPIEXEC else "no mpiexec beside this Python or on the path: pip install mpich"


def start(ranks: int, words: list[str], **options: Any) -> subprocess.Popen[str]:
    """`words`, what follows on the interpreter's name, on so many ranks of one thread each."""
    assert MPIEXEC is not None
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def run(ranks: int, words: list[str], seconds: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    with start(ranks, words, **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def answers(ranks: int, script: str, *words: str, **options: Any) -> list[Any]:
    """What a script says on each rank, by rank: it calls `say(value)`, once, with what JSON can hold."""
    program = (
        "import json, sys, traceback\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"
        # One rank that fails would leave the others waiting.
        "sys.excepthook = lambda *error: (traceback.print_exception(*error), comm.Abort(1))\n"
        "def say(value):\n    said = comm.gather(value)\n    if comm.rank == 0: print(json.dumps(said))\n"
    )
    done = run(ranks, ["-c", program + script, *words], **options)
    assert done.returncode == 0, done.stderr
    said: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return said
