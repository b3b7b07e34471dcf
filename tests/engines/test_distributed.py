"""Training over ranks: the bits of one process, whatever their number; what goes wrong on one ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import some
from PIL import Image
from ranks import OBSTACLE, answers, run, start

from catopt_xp.backend.ranks import Ranks, launched
from catopt_xp.engines.cpu.lanes import PRODUCT_UNITS
from catopt_xp.engines.panels import PANEL, join_subtrees, padded, tree_sum
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

# --- who owns what ------------------------------------------------------------------------------------------------


class Alone:
    """A communicator of which only the size and the rank are asked."""

    def __init__(self, rank: int, size: int) -> None:
        self.Get_rank, self.Get_size = (lambda: rank), (lambda: size)
        self.Allgatherv = self.Alltoallv = self.allgather = self.Abort = None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 13])
def test_the_ranks_subtrees_make_the_tree_of_one_process(size: int) -> None:
    rng = np.random.default_rng(size)
    for panels in (size, size + 1, 13, 16, 37, 147):
        n_x = panels * PANEL - 5
        shares = PanelShares(n_x, 0, size).all_columns()
        assert shares == [PanelShares(n_x, rank, size).columns for rank in range(size)]
        assert [part.start for part in shares[1:]] == [part.stop for part in shares[:-1]]
        assert (shares[0].start, shares[-1].stop) == (0, n_x)
        blocks = rng.normal(size=(panels, 3)).astype(np.float32)
        nodes = PanelShares(n_x, 0, size).nodes()
        sums = [[tree_sum(blocks[a : a + n].copy()) for a, n in some] for some in nodes]
        joined = join_subtrees([node for some in nodes for node in some], [x for some in sums for x in some])
        assert np.array_equal(joined, tree_sum(blocks.copy()))


def test_more_ranks_than_panels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^4 ranks are too many, as 3000 features are 3 panels of 1024: start at"):
        PanelShares(3000, 0, 4)


def test_what_is_no_communicator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^comm is a str; give a communicator of mpi4py, or None$"):
        Ranks("all of them")


@pytest.mark.parametrize("names", ["PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"])
def test_a_launcher_is_known_by_what_it_leaves_in_the_environment(names: str) -> None:
    assert launched({f"{names}_SIZE": "4", f"{names}_RANK": "3"}) == (4, 3)
    assert launched({f"{names}_SIZE": "4"}) == (1, 0)


# --- agreement ----------------------------------------------------------------------------------------------------

AGREED = """
import numpy as np
from catopt_xp.backend.ranks import Ranks
ranks = Ranks(comm)

def nested():
    with ranks.agreed():
        pass

def in_turn():
    with ranks.one_by_one(True):
        pass

waits = {
    "end": lambda: None, "any": lambda: ranks.any(False), "from_first": lambda: ranks.from_first("first"),
    "threads": ranks.threads, "place": ranks.place, "same": lambda: ranks.check_same(b"", "bytes"),
    "nested": nested, "in turn": in_turn,
    "arrays": lambda: ranks.columns_of(np.zeros((2, 3)), [slice(0, 1), slice(1, 2), slice(2, 3)]),
}
found = {}
for where, wait in waits.items():
    for failing in range(3):
        try:
            with ranks.agreed():
                if ranks.rank == failing:
                    raise ValueError(f"no {where}")
                wait()
            found[f"{where}, {failing}"] = "went on"
        except (ValueError, OSError) as error:
            found[f"{where}, {failing}"] = [type(error).__name__, str(error), ranks.is_agreed(error)]
    assert ranks.everyone(ranks.rank) == [0, 1, 2]  # they go on together
    with ranks.agreed():
        wait()
say(found)
"""


def test_one_that_fails_stops_the_others_wherever_they_wait() -> None:
    for rank, found in enumerate(answers(3, AGREED, seconds=60)):
        assert len(found) == 27
        for case, end in found.items():
            where, failing = case.rsplit(", ", 1)
            told = f"no {where}"
            others = ["RankError", f"rank {failing} of 3: ValueError: {told}", True]
            assert end == (["ValueError", told, True] if rank == int(failing) else others), case


# --- the same bits ------------------------------------------------------------------------------------------------

RUNS = """
import hashlib, sys
import numpy as np
from panel_runs import OPTIONS
import catopt_xp
from catopt_xp.optim.schedules import get_hyperbola_func

def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()

found = {}
features = (4 * 1024, 9 * 1024 + 5, 6000)
runs = [(n_x, name) for n_x in features for name in OPTIONS]
if sys.argv[1] == "few":  # every option once, with every number of features each type of numbers and batch size below
    runs = [(features[(k + k // 3) % 3], name) for k, name in enumerate(OPTIONS)]
for k, (n_x, name) in enumerate(runs):
    optimizer, options = OPTIONS[name]
    rng = np.random.default_rng(k)
    m, kind = 23, ("uint8", "float32", "float64")[k % 3]
    X = rng.integers(0, 256, (m, n_x), dtype=np.uint8)
    if kind != "uint8":
        X = (X / 255).astype(kind)
    Y = rng.integers(0, 3 if k % 2 else 2, (1, m))
    result = catopt_xp.train(
        X=X.T, Y=Y, dev_X=X[:7].T, dev_Y=Y[:, :7], hidden=(7, 5), dtype="float32" if kind == "uint8" else kind,
        optimizer=optimizer, optimizer_options=options, learning_rate=1e-3, lr_scheduler=get_hyperbola_func(0.1),
        total_epoch=3, batch_size=(5, 8, 23)[k % 3], shuffle=("epoch", "once", "none")[k % 3], seed=k,
        dropout=0.2 * (k % 4 == 0), activation=("relu", "tanh")[k % 2], print_interval=1, save_dir=None,
        comm=comm, verbose=False, engine="panels",
    )
    history = result.history
    moments = [x for key, x in result.optimizer.save().items() if "/" in key]
    curves = history.mini_batch_loss, history.full_train_loss, history.dev_loss, history.dev_accuracy
    found[f"{name}, {n_x}, {kind}"] = [digest(result.model.save().values()), digest(moments), repr(curves)]
say(found)
"""


@cache
def bits(ranks: int, runs: str) -> list[dict[str, list[str]]]:
    """Digests of weights and moments, and the curves, of every run, on each rank; `runs`: few or many."""
    said: list[dict[str, list[str]]] = answers(ranks, RUNS, runs)
    return said


@pytest.mark.parametrize(
    ("ranks", "runs", "count"),
    [
        *(pytest.param(n, "few", 15, marks=pytest.mark.hardening) for n in (3, 4)),
        *(pytest.param(n, "many", 45, marks=pytest.mark.long) for n in (2, 3, 4)),
    ],
)
def test_every_optimizer_has_the_bits_of_one_process_on_every_rank(ranks: int, runs: str, count: int) -> None:
    (one,) = bits(1, runs)
    assert len(one) >= count
    for rank, found in enumerate(bits(ranks, runs)):
        assert found == one, f"rank {rank}"


# --- files --------------------------------------------------------------------------------------------------------

TRAIN = ["-m", "catopt_xp", "train", "--img-shape", "48x48", "--train-size", "20", "--dev-size", "5"]
TRAIN += ["--batch-size", "8", "--hidden", "6,4", "--print-interval", "1"]


def trained(folder: Path, ranks: int, *words: str, figure: bool = False) -> subprocess.CompletedProcess[str]:
    """Seven panels of drawings, trained into a folder."""
    return run(
        ranks,
        [*TRAIN, "--distributed", "--save-dir", str(folder), *words, *([] if figure else ["--no-figure"])],
    )


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """All but the timings."""
    (arrays, meta), (others, other) = (read_checkpoint(file / "model_latest.npz") for file in (ours, theirs))
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.tobytes() == others[name].tobytes(), name
    for one in (meta, other):
        del one["run"]["seconds"], one["run"]["history"]["timings"], one["run"]["history"]["seconds"]
    assert meta == other


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert trained(folder, 1, "--epochs", "4").returncode == 0
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.hardening)])
def test_a_checkpoint_of_ranks_goes_on_with_any_number_of_them(ranks: int, one_process: Path, tmp_path: Path) -> None:
    half, whole, alone = (tmp_path / name for name in ("half", "whole", "alone"))
    assert trained(half, ranks, "--epochs", "2", "--quiet").returncode == 0
    latest = str(half / "model_latest.npz")
    assert trained(whole, ranks, "--epochs", "4", "--recover-from", latest).returncode == 0
    assert trained(alone, 1, "--epochs", "4", "--recover-from", latest).returncode == 0
    assert_same_checkpoint(whole, one_process)
    assert_same_checkpoint(alone, one_process)


@pytest.mark.hardening
def test_the_first_rank_alone_prints_and_writes(tmp_path: Path) -> None:
    done = trained(tmp_path / "runs", 3, "--epochs", "2", figure=True)
    assert done.returncode == 0
    assert done.stdout.count("catopt_xp 0") == 1
    assert "engine panels (each of 3 ranks its panels)" in done.stdout
    assert "40 samples of 6912 features, spread over 3 ranks" in done.stdout
    assert sorted(os.listdir(tmp_path / "runs")) == [
        "model_history.csv",
        "model_history.json",
        "model_history.png",
        "model_latest.npz",
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, count in (("training_set", 9), ("test_set", 4)):
        for name in ("cats", "dogs"):
            (folder / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{k}.png")
    (folder / "training_set" / "dogs" / "3.png").write_bytes(b"no picture")
    return folder


PHOTOGRAPHS = """
import hashlib
import numpy as np, sys, warnings
import catopt_xp
warnings.simplefilter("ignore")
result = catopt_xp.train(
    data=sys.argv[1], on_error=sys.argv[2], hidden=(5,), total_epoch=2, batch_size=4, save_dir=None, comm=comm,
    verbose=False, engine="panels", print_interval=1,
)
weights = b"".join(x.tobytes() for x in result.model.save().values())
say([hashlib.sha256(weights).hexdigest(), result.history.dev_loss])
"""


@pytest.mark.hardening
@pytest.mark.parametrize("ranks", [2, 3])
def test_photographs_are_decoded_in_shares_and_exchanged(ranks: int, photographs: Path) -> None:
    one = answers(1, PHOTOGRAPHS, str(photographs), "skip")
    assert answers(ranks, PHOTOGRAPHS, str(photographs), "skip") == one * ranks


@pytest.mark.hardening
def test_a_broken_photograph_in_the_share_of_one_rank_is_named_once(photographs: Path, tmp_path: Path) -> None:
    words = ["-m", "catopt_xp", "train", "--data", str(photographs), "--distributed", "--save-dir", str(tmp_path)]
    done = run(2, words)
    assert done.returncode == 1
    assert done.stderr.count("error") == 1
    assert "3.png: not a photograph that Pillow can read" in done.stderr
    assert os.listdir(tmp_path) == []


# --- what travels -------------------------------------------------------------------------------------------------

SENT = """
import numpy as np
from panel_runs import Case, run
from catopt_xp.backend.ranks import Ranks
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.ranks import PanelShares
case = Case(n_x=int(sys.argv[1]), units=(30, 20, 20), m=64, batch_size=64, dtype="float32", activation="relu", epochs=8)
ranks = Ranks(comm)
def make(model, optimizer, samples, targets, backend, settings):
    own = np.ascontiguousarray(samples[:, PanelShares(case.n_x, ranks.rank, ranks.size).columns])
    return PanelEngine(model, optimizer, own, targets, backend, settings, ranks=ranks)
run(case.engine(make), case)
say(ranks.sent_bytes)
"""


@pytest.mark.hardening
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_one_block_of_sums_for_a_power_of_two_of_panels(ranks: int) -> None:
    block = 64 * padded(30, PRODUCT_UNITS) * 4 + 4  # samples, units, bytes; and whether to stop
    # Eight steps: the first needs a product of its own, the last none after it.
    assert answers(ranks, SENT, str(16 * 1024)) == [8 * block] * ranks


# --- endings ------------------------------------------------------------------------------------------------------


def test_started_by_mpi_without_the_flag_nothing_is_done(tmp_path: Path) -> None:
    done = run(2, [*TRAIN, "--save-dir", str(tmp_path / "runs")])
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("catopt-xp: error: MPI started this 2 times, and each would do all")
    assert not (tmp_path / "runs").exists()


@pytest.mark.hardening
def test_more_ranks_than_panels_end_in_one_line(tmp_path: Path) -> None:
    few = ["--img-shape", "16x16", "--train-size", "20", "--dev-size", "5"]
    done = run(4, ["-m", "catopt_xp", "train", *few, "--distributed", "--save-dir", str(tmp_path)])
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        "catopt-xp: error: 4 ranks are too many, as 768 features are 1 panel of 1024: start at most 1"
    ]


ONE_FAILS = """
import numpy as np
import catopt_xp
X = np.random.default_rng(0).random((4096, 40), dtype=np.float32)
Y = np.arange(40).reshape(1, -1) % 2
where, epoch = sys.argv[1], int(sys.argv[2])
class Fail:
    needs_weights = False
    def on_epoch(self, state):
        if comm.rank == 1 and where == "training" and state.epoch == epoch:
            raise OSError("the machine is on fire")
if where == "data" and comm.rank == 1:
    X[1500, 3] = np.nan
if where == "arguments" and comm.rank == 1:
    Y = Y[:, :-1]
if where == "seed":
    epoch = comm.rank
catopt_xp.train(X=X, Y=Y, comm=comm, total_epoch=10**6, seed=epoch, save_dir=None, callbacks=[Fail()], verbose=False)
"""


ONE_DIFFERS = """
import time
import numpy as np
import catopt_xp
X = np.random.default_rng(0).random((4096, 40), dtype=np.float32)
Y = np.arange(40).reshape(1, -1) % 2
how, folder = sys.argv[1], sys.argv[2]
class Look:
    def on_epoch(self, state):
        if how == "brake" and comm.rank == 1:
            state.stop = True
        if how == "save survives":
            try:
                state.save("/dev/full/nowhere" if state.epoch == 1 else folder + "/own.npz")
            except OSError:
                pass
options = {"total_epoch": 4, "batch_size": 8, "print_interval": 1}
if how == "batch size" and comm.rank == 1:
    options["batch_size"] = 16
if how == "dev set":
    options |= {"dev_X": X[:2048], "dev_Y": Y}
looks = [] if how == "one looks" and comm.rank else [Look()]
try:
    result = catopt_xp.train(
        X=X, Y=Y, comm=comm, save_dir=folder, callbacks=looks, verbose=False, **options
    )
    say(["trained", len(result.history.epoch)])
except (ValueError, OSError) as error:
    say([type(error).__name__, str(error)])
"""


@pytest.mark.hardening
@pytest.mark.parametrize("how", ["brake", "one looks", "save survives"])
def test_what_callbacks_of_one_rank_do_is_done_by_all(how: str, tmp_path: Path) -> None:
    said = answers(2, ONE_DIFFERS, how, str(tmp_path), seconds=60)
    assert said == [["trained", 1 if how == "brake" else 4]] * 2


@pytest.mark.hardening
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("batch size", "rank 1 has other arguments than rank 0: start all ranks with the same arguments"),
        ("dev set", "dev_X has 2048 features, X has 4096"),
    ],
)
def test_what_does_not_fit_together_is_refused_on_every_rank(how: str, told: str, tmp_path: Path) -> None:
    for kind, text in answers(2, ONE_DIFFERS, how, str(tmp_path), seconds=60):
        assert kind in ("ValueError", "RankError")
        assert told in text


@pytest.mark.hardening
def test_a_rank_that_decodes_nothing_of_its_share_takes_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "training_set" / name).mkdir(parents=True)
        for k in range(6):
            file = tmp_path / "training_set" / name / f"{k}.png"
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    for k in range(3):
        (tmp_path / "training_set" / "cats" / f"{k}.png").write_bytes(b"no picture")
    one = answers(1, PHOTOGRAPHS.replace("dev_loss", "train_loss"), str(tmp_path), "skip")
    assert answers(4, PHOTOGRAPHS.replace("dev_loss", "train_loss"), str(tmp_path), "skip") == one * 4


FAILURES = [
    ("data", "rank 1 of 3: ValueError: X is not finite at feature"),
    ("arguments", "rank 1 of 3: ValueError: X has 40 samples and Y has 39"),
    ("training", "error on rank 1 of 3: the machine is on fire"),
    ("seed", "rank 1 has other arguments than rank 0: start all ranks with the same arguments"),
]


@pytest.mark.parametrize(("where", "told"), some(FAILURES, FAILURES[:1], pytest.mark.hardening))
def test_what_fails_on_one_rank_ends_all(where: str, told: str) -> None:
    program = "import sys\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\n" + ONE_FAILS
    done = run(3, ["-c", program, where, "5"], seconds=60)
    assert done.returncode != 0
    assert told in done.stderr


def children(process: subprocess.Popen[str]) -> list[int]:
    """The ranks: the Python processes below mpiexec, by number."""
    found, waiting = [], [process.pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            waiting += [int(word) for word in task.read_text().split()]
        if b"train" in Path(f"/proc/{parent}/cmdline").read_bytes() and parent != process.pid:
            command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            found += [parent] if b"python" in command[0] else []
    return sorted(found)


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Three ranks in the midst of training, a first checkpoint written."""
    many = ["--epochs", "100000", "--print-interval", "100000", "--checkpoint-every", "3"]
    process = start(3, [*TRAIN, *many, "--distributed", "--save-dir", str(folder), *words])
    deadline = time.monotonic() + 60
    while not (folder / "model_latest.npz").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


def assert_goes_on_as_if_nothing_had_been(folder: Path, tmp_path: Path) -> None:
    """What is left is whole, and ends with the bits of a run that nothing interrupted."""
    _, meta = read_checkpoint(folder / "model_latest.npz")
    epochs = str(meta["run"]["epoch"] + 2)
    latest = str(folder / "model_latest.npz")
    resumed = trained(tmp_path / "resumed", 2, "--epochs", epochs, "--recover-from", latest, "--print-interval", "1000")
    assert resumed.returncode == 0
    assert trained(tmp_path / "straight", 1, "--epochs", epochs, "--print-interval", "1000").returncode == 0
    arrays, others = (read_checkpoint(tmp_path / name / "model_latest.npz")[0] for name in ("resumed", "straight"))
    for name, array in arrays.items():
        assert array.tobytes() == others[name].tobytes(), name


@pytest.mark.hardening
@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for the ranks in /proc, which this system has not")
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_ends_all_and_leaves_the_checkpoint(victim: int, tmp_path: Path) -> None:
    with begun(tmp_path / "runs") as process:
        os.kill(children(process)[victim], signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode != 0
    assert_goes_on_as_if_nothing_had_been(tmp_path / "runs", tmp_path)


@pytest.mark.hardening
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    with begun(tmp_path / "runs") as process:
        os.kill(children(process)[1], signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    lines = err.splitlines()
    assert lines[0].startswith("catopt-xp: interrupted in epoch")
    assert lines[1].startswith("to resume: ")
    assert_goes_on_as_if_nothing_had_been(tmp_path / "runs", tmp_path)


FULL = """
import resource, sys
from mpi4py import MPI
from catopt_xp.commands.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.hardening
def test_a_full_disk_ends_all_ranks_and_leaves_no_part(tmp_path: Path) -> None:
    words = ["train", *TRAIN[3:], "--hidden", "30", "--epochs", "3", "--distributed", "--save-dir", str(tmp_path)]
    done = run(2, ["-c", FULL, *words], seconds=60)
    assert done.returncode == 1
    assert "model_latest.npz" in done.stderr
    assert "File too large" in done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".npz", ".tmp"))]
