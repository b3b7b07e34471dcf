"""Random mutations of every kind of file that is read: each is taken or refused as documented, nothing else happens.

The short form of what `fuzz.py` does for an hour: seeded, without atheris and its coverage.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("what is watched here is not there on Windows", allow_module_level=True)

import resource

from fuzz_targets import TARGETS, seeds_of
from watched_inputs import Finding, Target, examine

# Inputs in the short form, about two seconds each.
INPUTS = {"checkpoint": 60, "npz": 150, "npy": 150, "jpeg": 200, "png": 200, "history": 400, "plot": 2, "words": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_taken_or_refused_as_documented(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = seeds_of(target)
    whole = seeds[:2] if name == "plot" else seeds  # two figures; its last one is a history without epochs
    assert all(examine(target, seed, tmp_path) for seed in whole), "a file that the library wrote was refused"
    rng = random.Random(0)  # the same inputs in every run
    taken, findings = 0, []
    for _ in range(INPUTS[name]):
        data = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            data = target.mutate(data, rng)
        try:
            taken += examine(target, data, tmp_path)
        except Finding as finding:
            findings.append(f"{finding}: {data[:200]!r}")
    assert not findings, "\n".join(findings[:10])
    assert taken < INPUTS[name] or name == "plot", "no mutation was refused"


def _bad(kind: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        if kind == "another exception":
            raise KeyError("W0")
        if kind == "two lines":
            raise ValueError("two\nlines")
        if kind == "a cursor that moves":
            raise ValueError("\x1b[2J")
        if kind == "no message":
            raise ValueError
        if kind == "another folder":
            (folder.parent / "left").write_text("x")
        if kind == "a program":
            import subprocess

            subprocess.run(["true"], check=True)
        if kind == "a pickle":
            import pickle

            pickle.loads(b"cposix\ngetpid\n(tR.")
        if kind == "memory":
            b"x" * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (64 << 20))  # more than ever before
        while kind == "no end":
            pass

    return run


KINDS = [
    "another exception",
    "two lines",
    "a cursor that moves",
    "no message",
    "another folder",
    "a program",
    "a pickle",
]


@pytest.mark.parametrize("kind", [*KINDS, "memory", "no end"])
def test_what_is_no_refusal_is_a_finding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watched_inputs.SECONDS", 0.2)
    if kind == "memory":
        monkeypatch.setattr("watched_inputs.MEMORY", 1 << 20)
    target = Target("bad", lambda folder: [], lambda data, rng: data, _bad(kind))
    with pytest.raises(Finding):
        examine(target, b"", tmp_path)
    (tmp_path / "next").mkdir()
    target = Target("good", lambda folder: [], lambda data, rng: data, lambda data, folder: None)
    assert examine(target, b"", tmp_path / "next"), "what one input did was held against the next"
