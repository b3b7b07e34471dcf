"""SIGINT, SIGTERM and SIGHUP at random moments, once and twice: what a command says it left, it left.

`timeout` and some supervisors send SIGTERM twice, a few microseconds or milliseconds apart.
"""

from __future__ import annotations

import random
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_runs import SIGNALS_REASON, age, assert_same_checkpoint, server, steps_done, temporaries, write_set

from catopt_xp.training.history import History

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason=SIGNALS_REASON)

ASKING = [] if sys.platform == "win32" else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PAUSES = (0.0, 0.0005, 0.005, 0.05)  # seconds between two signals


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("signals", [1, 2], ids=["once", "twice"])
def test_a_signal_at_any_moment_ends_with_a_command_that_resumes(
    signals: int, times: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    write_set(tmp_path / "set.npz", 40, 12)
    words = [
        "train",
        "--no-figure",
        "--data",
        str(tmp_path / "set.npz"),
        "--device",
        "cpu",
        "--engine",
        "plain",
        "--hidden",
        "5,4",
    ]
    words += ["--batch-size", "8", "--epochs", "6", "--print-interval", "2", "--checkpoint-every-steps", "3"]
    straight, rng, ended = tmp_path / "straight", random.Random(signals), Counter[str]()
    with server(tmp_path / "server") as serving:
        serving.measure([*words, "--save-dir", str(straight)])
        for k in range(times):
            folder = tmp_path / str(k)
            command, file = [*words, "--save-dir", str(folder)], folder / "model_latest.npz"
            sent = [(0.02 + serving.moment(rng), rng.choice(ASKING))]
            sent += [(rng.choice(PAUSES), rng.choice(ASKING)) for _ in range(signals - 1)]
            status, _, err = serving.run(command, *sent)
            said = [line for line in err.splitlines() if "no figure was drawn" not in line]
            if status == 0:  # it had ended, or was about to
                assert said == []
                ended["done"] += 1
            else:
                assert status == 130, (status, said, sent)
                assert said[0].startswith("catopt-xp: interrupted"), said
                assert len(said) == (2 if file.exists() else 1), said
                ended["resumed" if file.exists() else "nothing saved"] += 1
                again = command
                if file.exists():
                    assert said[1].startswith("to resume: catopt-xp train "), said
                    assert steps_done(file) >= 0
                    again = shlex.split(said[1])[3:]
                age(temporaries(folder) if folder.exists() else [])
                serving.finish(again)
            assert_same_checkpoint(file, straight / file.name)
            assert len(History.from_json(folder / "model_history.json").epoch) == 6
            assert temporaries(folder) == []
    record(tried=times, broke=0, **ended)
