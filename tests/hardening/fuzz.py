"""Coverage-guided fuzzing of what reads files and command lines: `python tests/hardening/fuzz.py TARGET --seconds N`.

Needs atheris (`pip install atheris`), which records the branches of Python code that an input reaches and keeps the
inputs that reach new ones. What the library itself wrote is where it starts; `watched_inputs` says what a finding is.
It goes on after one: each kind is kept once, with its input, in the folder that is named at the end, and listed in
`results/fuzzing.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "fuzzing.json"
INSTRUMENTED = ("catopt_xp", "numpy.lib", "zipfile", "json", "ast", "tokenize", "PIL")
LARGEST = 1 << 16  # bytes of an input
FROM_THE_FUZZER = 0.3  # of mutations: atheris' own, which know what inputs were compared with; the others keep the form


def fuzz(name: str, seconds: float, folder: Path) -> None:
    """The process that fuzzes: never returns. Findings and seeds go into `folder`."""
    import atheris

    sys.dont_write_bytecode = True  # what is written counts
    sys.path.insert(0, str(HERE.parent / "helpers"))
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        import fuzz_targets
        import watched_inputs

    target = fuzz_targets.TARGETS[name]
    seeds, kept = folder / "seeds", folder / "findings"
    for made in (seeds, kept, folder / "work"):
        made.mkdir(exist_ok=True)
    for number, seed in enumerate(fuzz_targets.seeds_of(target)):
        (seeds / f"seed{number}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        (folder / "input").write_bytes(data)  # for one that ends the process
        try:
            watched_inputs.examine(target, data, folder / "work")
        except watched_inputs.Finding as finding:
            told = re.sub(r"\W+", "_", str(finding).split(": ")[0])[:100]
            if not (kept / told).exists():
                (kept / told).write_bytes(data)
                (kept / f"{told}.txt").write_text(str(finding), encoding="utf-8")

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < FROM_THE_FUZZER:
            return bytes(atheris.Mutate(data, largest))
        return target.mutate(data, rng)[:largest]

    options = [f"-max_total_time={seconds:.0f}", f"-max_len={LARGEST}", "-rss_limit_mb=6000", "-timeout=120"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def campaign(name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Fuzzes a target for so long, again where the process ended before, and says what it did."""
    started, executions, coverage, features, ended = time.time(), 0, 0, 0, []
    while (left := seconds - (time.time() - started)) > 5.0 or not executions:
        command = [sys.executable, str(Path(__file__)), name, "--seconds", str(left), "--inside", str(folder)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace"
        )
        assert process.stderr is not None
        before, last = executions, ""
        for line in process.stderr:
            last = line.strip() or last
            if found := re.match(r"#(\d+)\s.*cov: (\d+) ft: (\d+)", line):
                executions, coverage, features = (
                    before + int(found[1]),
                    max(coverage, int(found[2])),
                    max(features, int(found[3])),
                )
        if process.wait() != 0:
            ended.append(f"the process ended with status {process.returncode}: {last}")
            (folder / "findings" / f"ended{len(ended)}").write_bytes((folder / "input").read_bytes())
            if executions == before:
                break  # it does not even begin
    findings = sorted(file.read_text(encoding="utf-8") for file in (folder / "findings").glob("*.txt"))
    return {
        "seconds": round(time.time() - started),
        "executions": executions,
        "coverage": coverage,
        "features": features,
        "kept_inputs": len(list((folder / "seeds").iterdir())),
        "findings": [re.sub(r"/\S+/work/in", "FOLDER", finding) for finding in findings] + ended,
    }


def record(name: str, found: dict[str, Any]) -> None:
    """Adds a campaign to the results, those of other targets staying as they are."""
    import numpy as np
    import PIL

    from catopt_xp.backend.machine import cpu_model
    from catopt_xp.io.files import write_whole

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"targets": {}}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    where = {"date": time.strftime("%Y-%m-%d"), "processor": cpu_model(), **versions}
    results["targets"].setdefault(name, []).append(where | found)
    write_whole(RESULTS, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def main() -> None:
    """Fuzzes the targets that are named, one after the other."""
    sys.path.insert(0, str(HERE.parent / "helpers"))
    import fuzz_targets

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="+", choices=sorted(fuzz_targets.TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument("--no-record", action="store_true", help="leave results/fuzzing.json as it is")
    parser.add_argument("--keep", type=Path, help="folder of findings and kept inputs (default: a temporary one)")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    for name in args.targets:
        folder = (args.keep or Path(tempfile.mkdtemp(prefix="fuzzing_"))) / name
        folder.mkdir(parents=True, exist_ok=True)
        found = campaign(name, args.seconds, folder)
        print(f"{name}: {json.dumps(found, indent=1)}\nin {folder}", flush=True)
        if not args.no_record:
            record(name, found)


if __name__ == "__main__":
    if "--inside" in sys.argv:  # before anything that is to be instrumented is imported
        fuzz(sys.argv[1], float(sys.argv[3]), Path(sys.argv[5]))
    main()
