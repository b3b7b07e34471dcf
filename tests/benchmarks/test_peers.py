"""The peers on a CPU: each does the same work as this library, and the command times those that it is told to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.__main__ import chosen, main, parser
from benchmarks.peers.contenders import CONTENDERS, QUICK, chapter_memory, float_memory
from benchmarks.peers.peer import columns, drop_sets, floats
from catopt_xp.backend.machine import thread_count
from catopt_xp.commands import bench
from catopt_xp.commands.bench import OURS, Contender, Workload, check_agreement, small_workload
from catopt_xp.commands.floor import Floor
from catopt_xp.optim.rules import OPTIMIZERS

THREADS = thread_count()
TINY = Workload(n_x=40, m=20, batch_size=8)
PEERS = [name for name in CONTENDERS if name not in OURS]


def make(name: str, work: Workload) -> Contender:
    why = CONTENDERS[name].obstacle(work)
    if why is not None:
        pytest.skip(f"{name}: {why}")
    return CONTENDERS[name].make(work, THREADS)


def test_sets_as_floats_are_the_pixels() -> None:
    work = Workload(n_x=1000, m=60, batch_size=16)
    pixels = work.pixels()
    np.testing.assert_allclose(floats(work), pixels / 255, rtol=1e-6)
    assert floats(work).dtype == np.float32
    assert (columns(work).shape, columns(work).dtype) == ((1000, 60), np.float64)
    np.testing.assert_array_equal(columns(work), pixels.T / 255)
    kept = floats(work)
    assert floats(Workload(n_x=1000, m=60, batch_size=8)) is kept  # one set, whatever the batch size
    drop_sets()
    assert floats(work) is not kept


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_agrees_with_the_plain_engine(name: str, optimizer: str) -> None:
    work = small_workload(optimizer)
    if (why := CONTENDERS[name].obstacle(work)) is not None:
        pytest.skip(f"{name}: {why}")
    assert check_agreement({name: CONTENDERS[name]}, THREADS, work)[name] < 5e-4


@pytest.mark.parametrize("name", PEERS)
def test_steps_go_on_where_they_ended(name: str) -> None:
    at_once, in_parts = make(name, TINY), make(name, TINY)
    at_once.steps(8)
    for count in (1, 3, 0, 4):  # an epoch has 3
        in_parts.steps(count)
    np.testing.assert_allclose(in_parts.losses(), at_once.losses(), rtol=1e-5)
    assert len(at_once.losses()) == 8
    assert all(isinstance(version, str) for version in at_once.versions().values())
    assert at_once.name == name


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert CONTENDERS["torch"].obstacle(TINY) == "torch is not installed (pip install torch)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert CONTENDERS["sklearn"].obstacle(Workload(optimizer="rmsprop")) == "scikit-learn has no RMSProp"
    assert CONTENDERS["torch-fused"].obstacle(Workload(optimizer="rmsprop")) == "PyTorch has no fused RMSprop"
    monkeypatch.setattr(bench, "host_free_memory", lambda: 10**9)
    assert CONTENDERS["chapter"].obstacle(Workload()) == "it needs 3.0 GB of memory, 1.0 GB are free"
    assert chapter_memory(Workload()) > float_memory(Workload())
    assert float_memory(Workload(batch_size=2000)) > float_memory(Workload())


# The command line.


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", tuple(CONTENDERS)),
        ("--quick", QUICK),
        ("--quick --contenders plain,chapter,plain", ("plain", "chapter")),
    ],
)
def test_flags_choose_contenders(flags: str, names: tuple[str, ...]) -> None:
    assert tuple(chosen(parser().parse_args(flags.split()))) == names


def test_the_command_writes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = Floor(bandwidth=50e9, rate=100e9, threads=1, traffic_by="numba", product_by="one product")
    monkeypatch.setattr(bench, "measure_floor", lambda threads, in_turn=False: floor)
    words = "--quick --n-x 3000 --samples 64 --batch-sizes 8,64 --contenders plain,chapter --threads 1"
    assert main([*words.split(), "--save-dir", str(tmp_path / "out")]) == 0
    assert "batch     8: floor" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [list(row["contenders"]) for row in results["rows"]] == [["plain", "chapter"]] * 2
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


def test_an_unknown_contender_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--contenders", "plain,abacus"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m benchmarks.peers: error: unknown contender 'abacus'; choose panels, plain")
    assert err.count("\n") == 1


def test_a_failure_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    words = ["--save-dir", str(tmp_path / "file" / "below")]
    assert main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(OSError, match="below"):
        main([*words, "--debug"])


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.peers.__main__.run_bench", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err == "python -m benchmarks.peers: interrupted\n"
