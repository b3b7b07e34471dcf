"""A driver: commands in little memory. A process of its own, which prints as JSON what it found.

    python tests/helpers/little_memory.py CASE STEP MOST

runs the command of CASE with room for 0, STEP, 2 STEP, … MOST more megabytes than the process has at its start. Each
must end with one clear line, and leave the earlier checkpoint whole; with memory again, the command is given again.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path

from forked import NAME
from small_disk import Case, Driver

MEGABYTE = 1 << 20
OPENBLAS = "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.\n"
SIZES = ("--print-interval", "1", "--device", "cpu")
TRAIN = "train --data ASIDE/set.npz --save-dir DISK/run --hidden 200"
PICTURES = "--hidden 5 --epochs 1 --save-dir DISK/run --engine plain"
LITTLE = {
    "plain": Case(
        f"{TRAIN} --engine plain --epochs 4 --recover-from DISK/run/model_latest.npz",
        f"{TRAIN} --engine plain --epochs 2",
    ),
    "panels": Case(
        f"{TRAIN} --engine panels --epochs 4 --recover-from DISK/run/model_latest.npz",
        f"{TRAIN} --engine panels --epochs 2",
    ),
    "photographs": Case(f"train --data ASIDE/photographs --img-shape 384x384 {PICTURES}"),
    "drawings": Case(f"train --img-shape 256x256 --train-size 6 --dev-size 2 {PICTURES}"),
    "compare": Case(
        "compare decay --data ASIDE/set.npz --epochs 1 --save-dir DISK/compare --device cpu --engine plain"
    ),
    "bench": Case("bench --n-x 3000 --samples 32 --batch-sizes 8 --threads 1 --quick --save-dir DISK/bench"),
    "evaluate": Case("evaluate ASIDE/other.npz --data ASIDE/set.npz"),
    "export": Case("export ASIDE/other.npz --out DISK/a.onnx"),
}


class LittleMemory(Driver):
    """One case; what it starts from is made with all the memory there is."""

    sizes = SIZES
    failed = (1, 2)  # 2: sizes that are known before the work begins are refused as arguments

    def try_with_room(self, megabytes: int) -> None:
        self.reset()

        def limit() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * MEGABYTE
            resource.setrlimit(resource.RLIMIT_AS, (room, room))

        ended = self.run(self.case.words, limit)
        if ended.status == 1 and ended.err.endswith(OPENBLAS):  # it ends the process, with a line and status of its own
            ended.err = f"{NAME}error: {OPENBLAS}"
        self.judge(ended, f"{megabytes} MB", "emory")


def main() -> None:
    case, step, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory() as aside:
        driver = LittleMemory(LITTLE[case], case, Path(disk), Path(aside))
        driver.prepare()
        for megabytes in range(0, most + 1, step):
            driver.try_with_room(megabytes)
    print(json.dumps(vars(driver.found)))


if __name__ == "__main__":
    main()
