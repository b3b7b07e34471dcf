"""Safetensors files of any origin are refused in one line, or give a network of finite numbers."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("what is watched here is not there on Windows", allow_module_level=True)
pytest.importorskip("safetensors", reason="safetensors is not installed")

from fuzz_targets import small_set
from watched_inputs import Target, examine

from catopt_xp.commands.export import export_safetensors, load_safetensors
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.training.checkpoint import CheckpointError


def run(data: bytes, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(data)
    network = load_safetensors(folder / "a.safetensors")
    assert np.isfinite(network.forward(small_set()[0], train_mode=False)).all()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The head, which is JSON behind its length, with another value; or changed bytes anywhere."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3 or size > len(data):
        return mutations.mutated_bytes(data, rng)
    head, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.6:
        try:
            facts = json.loads(head)
            architecture = facts["__metadata__"]["architecture"].encode()
            facts["__metadata__"]["architecture"] = mutations.mutated_json(architecture, rng).decode("utf-8", "replace")
            return joined(json.dumps(facts).encode(), body)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return mutations.mutated_bytes(data, rng)
    return joined(mutations.mutated_json(head, rng), body)


def joined(head: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + body


TARGET = Target("safetensors", lambda folder: [], mutated, run, (CheckpointError,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("exported") / "a.safetensors"
    return export_safetensors(DeepNetwork([12, 3, 1], ["relu", "sigmoid"]), file).read_bytes()


def test_mutated_files_are_taken_or_refused(exported: bytes, tmp_path: Path) -> None:
    assert examine(TARGET, exported, tmp_path)
    rng, inputs = random.Random(0), 300
    taken = sum(examine(TARGET, mutated(exported, rng), tmp_path) for _ in range(inputs))
    assert 0 < taken < inputs


@pytest.mark.parametrize(
    "change",
    [
        {"neuron_cnt": [12, 2**40, 1]},
        {"device": "cuda"},
        {"seed": float("inf")},
        {"dtype": "x" * 5000},
        {"\x1b[2J": 1},
        "[" * 100_000,
    ],
    ids=["size", "device", "seed", "dtype", "cursor", "depth"],
)
def test_a_doctored_description_is_refused(change: Any, exported: bytes, tmp_path: Path) -> None:
    size = int.from_bytes(exported[:8], "little")
    facts = json.loads(exported[8 : 8 + size])
    architecture = json.loads(facts["__metadata__"]["architecture"])
    text = change if isinstance(change, str) else json.dumps(architecture | change)
    facts["__metadata__"]["architecture"] = text
    assert not examine(TARGET, joined(json.dumps(facts).encode(), exported[8 + size :]), tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is no file but a pipe or a device"):
        load_safetensors(tmp_path / "a.safetensors")
