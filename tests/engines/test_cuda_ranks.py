"""Ranks on GPUs: the bits of one GPU, with the kernels executed on the CPU (`cuda_on_cpu`) under mpiexec."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cuda_on_cpu import obstacle
from ranks import OBSTACLE, answers

from catopt_xp.backend.xp import device_report

pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=OBSTACLE or ""),
    pytest.mark.skipif(obstacle() is not None, reason=obstacle() or ""),
]

PRELUDE = """
import hashlib, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import cuda_runs
from cuda_runs import CpuDevice
from cupy_stand_in import StandIn
from panel_runs import Case
from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import CupyBackend, asnumpy
from catopt_xp.backend.ranks import Ranks
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.ranks import PanelShares

cuda_runs.folder = lambda: Path(sys.argv[1])  # compiled once for all ranks
ranks = Ranks(comm)

def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(asnumpy(x)).tobytes() for x in arrays)).hexdigest()

def own_columns(samples, case, backend):
    shares = PanelShares(case.n_x, ranks.rank, ranks.size)
    return backend.asarray(np.ascontiguousarray(samples[:, shares.columns]))

def train(case, kind="tensor", backend=None, change=str, late=False):
    'Digests of weights and of moments, losses and costs, and how the sums travelled.'
    kind = CoresEngine if kind == "cores" else CudaEngine

    def make(model, optimizer, samples, targets, backend, settings):
        device = {} if backend.name == "cupy" else {"device": CpuDevice(change=change, late=late)}
        columns = own_columns(samples, case, backend) if ranks.size > 1 else samples
        return kind(model, optimizer, columns, targets, backend, settings, ranks=ranks, **device)

    engine, losses = case.engine(make, backend), []
    rng = np.random.default_rng(case.seed)
    orders = [rng.permutation(case.m) for _ in range(case.epochs)]
    for epoch, order in enumerate(orders):
        engine.optimizer.epoch = epoch
        following = orders[epoch + 1] if epoch + 1 < len(orders) else None
        for done in engine.steps(epoch, order, following=following):
            assert engine.stops(False) is False
        losses += engine.fetch_losses().tolist()
        losses += engine.evaluate(engine.samples, engine.targets)
        if epoch == 0:
            engine.settle()
    engine.settle()
    moments = [x for key, x in engine.optimizer.save().items() if "/" in key]
    found = [digest(engine.model.save().values()), digest(moments), losses]
    return found, engine.sums.transport_name
"""

RUNS = """
found = {}
kinds = [("tensor", name) for name in ("gd", "momentum", "rmsprop", "adam")]
kinds += [("cores", "momentum"), ("double", "adam")]
for k, (kind, optimizer) in enumerate(kinds):
    n_x = {"tensor": 4 * 1024, "cores": 5 * 1024 + 5, "double": 6000}[kind]
    case = Case(
        n_x=n_x, m=11, batch_size=(4, 11)[k % 2], units=(5, 3), optimizer=optimizer, seed=k, epochs=3,
        dtype="float64" if kind == "double" else "float32", activation="relu", options={"l2": 0.1 * (k == 1)},
    )
    found[f"{kind}, {optimizer}"], _ = train(case, kind, late=k % 2 == 0)
say(found)
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled sources lie."""
    return tmp_path_factory.mktemp("kernels")


def bits(ranks: int, script: str, kernels: Path) -> list[Any]:
    return answers(ranks, PRELUDE + script, str(kernels), seconds=600)


@pytest.fixture(scope="module")
def one_gpu(kernels: Path) -> dict[str, list[Any]]:
    """Digests of weights and moments, losses and costs of every run, of one process."""
    (found,) = bits(1, RUNS, kernels)
    assert len(found) == 6
    return dict(found)


@pytest.mark.kernels
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_on_gpus_have_the_bits_of_one_gpu(ranks: int, kernels: Path, one_gpu: dict[str, list[Any]]) -> None:
    for rank, found in enumerate(bits(ranks, RUNS, kernels)):
        assert found == one_gpu, f"rank {rank}"


PLANTED = """
from cuda_runs import planted
case = Case(n_x=4 * 1024, m=11, batch_size=4, units=(5, 3), optimizer="momentum", epochs=3, dtype="float32")
in_turn = planted(("joins[k].merges", "(k + 1 == count ? top : 0)"))
say([train(case)[0], train(case, change=in_turn)[0]])
"""


@pytest.mark.kernels
def test_another_order_of_the_ranks_sums_is_noticed(kernels: Path) -> None:
    for right, wrong in bits(3, PLANTED, kernels):
        assert right[0] != wrong[0]


# --- what CuPy is asked -------------------------------------------------------------------------------------------

# NCCL as it is called: a communicator that copies between addresses, when the stream comes to it.
STAND_IN = """
import ctypes

class Communicator:
    def __init__(self, size, unique, rank):
        assert (size, rank) == (ranks.size, ranks.rank) and unique == "unique"

    def allGather(self, source, target, count, kind, stream):
        assert kind == 7
        def copy():
            here = (ctypes.c_float * count).from_address(source)
            there = (ctypes.c_float * (count * ranks.size)).from_address(target)
            comm.Allgather(np.frombuffer(here, np.float32), np.frombuffer(there, np.float32))
        [own] = [s for s in backend.xp.all_streams if s.ptr == stream]
        own.put(copy)

backend = CupyBackend(StandIn())
backend.xp.cuda.nccl = SimpleNamespace(
    available=sys.argv[2] == "all" or (sys.argv[2] == "some" and ranks.rank == 0),
    NCCL_FLOAT32=7, get_unique_id=lambda: "unique", NcclCommunicator=Communicator,
)
case = Case(n_x=4 * 1024, m=11, batch_size=4, units=(5, 3), optimizer="momentum", epochs=3, dtype="float32")
found, transport = train(case, backend=backend)
say([found, transport, ranks.sent_bytes])
"""


@pytest.fixture(scope="module")
def alone(kernels: Path) -> list[Any]:
    ((found, _, sent),) = answers(1, PRELUDE + STAND_IN, str(kernels), "none", seconds=300)
    assert sent == 0
    return list(found)


@pytest.mark.kernels
@pytest.mark.parametrize(("nccl", "transport"), [("all", "NCCL"), ("some", "through the host")])
def test_sums_travel_by_nccl_where_every_rank_has_it(
    nccl: str, transport: str, kernels: Path, alone: list[Any]
) -> None:
    for found, took, sent in answers(2, PRELUDE + STAND_IN, str(kernels), nccl, seconds=300):
        assert (found, took) == (alone, transport)
        # Of each product one sum: a batch of units. 3 epochs of 3 steps, less the last, which is followed by none; a
        # first product of the run and one after each of two evaluations; evaluations, in room for 256 samples.
        assert sent == 4 * 5 * (4 * (8 + 3) + 256 * 3)


# --- a GPU for each rank ------------------------------------------------------------------------------------------

# For each case, on which GPU of the machine this rank trains, or the error; then the reason, and what was warned.
DEVICES = """
import json, warnings
import catopt_xp.backend.ranks as distributed

counts = {"two": 2, "one shown to each": 1, "one for both": 1, "none on the second": 1 - ranks.rank}

def get_backend(asked, strict_device=None):
    if asked == "cpu":
        return distributed.NumpyBackend("asked for")
    number = int(asked.partition(":")[2] or 0)
    if number >= counts[case]:
        if asked == "auto":
            return distributed.NumpyBackend(f"there is no GPU number {number}")
        raise DeviceError(f"there is no GPU number {number}.")
    made = CupyBackend(StandIn(), number)
    bus = ranks.rank if case == "one shown to each" else number
    made.xp.cuda.runtime.deviceGetPCIBusId = lambda index: f"0000:0{bus}"
    return made

distributed.get_backend = get_backend
said = []
for case, device, strict, _ in json.loads(sys.argv[2]):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            made = ranks.backend(device, strict == "strict")
            found = [made.device, made.reason]
        except Exception as error:
            found = [type(error).__name__, str(error)]
    said.append([*found, [str(w.message) for w in warned]])
say(said)
"""
CHOICES = [
    ("two", "auto", "", ["cuda:0", "cuda:1"]),
    ("two", "cuda", "strict", ["cuda:0", "cuda:1"]),
    ("two", "cpu", "", ["cpu", "cpu"]),
    ("one shown to each", "auto", "", ["cuda:0", "cuda:0"]),
    ("one for both", "auto", "", ["cpu", "cpu"]),
    ("none on the second", "auto", "", ["cpu", "cpu"]),
    ("none on the second", "cuda", "", ["cpu", "cpu"]),
    ("none on the second", "cuda", "strict", ["DeviceError", "DeviceError"]),
    ("two", "cuda:1", "", ["ValueError", "ValueError"]),
]


@pytest.fixture(scope="module")
def chosen(kernels: Path) -> list[Any]:
    """By rank and case what `DEVICES` found: both ranks start once."""
    return answers(2, PRELUDE + DEVICES, str(kernels), json.dumps(CHOICES), seconds=120)


@pytest.mark.parametrize("number", range(len(CHOICES)), ids=[" ".join(filter(None, choice[:3])) for choice in CHOICES])
def test_each_rank_has_a_gpu_of_its_own_or_none_has_one(number: int, chosen: list[Any]) -> None:
    case, device, strict, found = CHOICES[number]
    said = [of_rank[number] for of_rank in chosen]
    if device == "cuda:1":
        assert said[0][1] == 'ranks take a device each, not \'cuda:1\': choose "auto", "cpu" or "cuda"'
    assert [device for device, _, _ in said] == found
    told = {"one for both": "2 ranks on .* would share one GPU", "none on the second": "rank 1: there is no GPU"}
    for _, reason, warned in said:
        if case in told:
            assert re.search(f"^ranks cannot train on GPUs: {told[case]}", reason)
        assert [w.endswith("Running on the CPU.") for w in warned] == [True] * (
            case in told and device == "cuda" and not strict
        )


ENGINES = """
from catopt_xp.engines import choose
from catopt_xp.engines.plain import Settings

tried = []

def check_failure(kind, *arguments):
    tried.append(kind.__name__)
    return "it differs" if kind.__name__ in sys.argv[2].split(",") and ranks.rank == 1 else None

choose.check_failure = check_failure
backend = CupyBackend(StandIn())
backend.xp.cuda.nccl = SimpleNamespace(available=False)
case = Case(n_x=4 * 1024, m=11, batch_size=4, units=(5, 3), optimizer="momentum", dtype="float32")

def make(model, optimizer, samples, targets, backend, settings):
    columns = own_columns(samples, case, backend)
    made, why = choose.choose_engine("auto", model, optimizer, columns, targets, backend, settings, ranks=ranks)
    made.why = why
    return made

try:
    engine = case.engine(make, backend)
    say([type(engine).__name__, engine.why, tried])
except Exception as error:
    say([type(error).__name__, str(error), tried])
"""


@pytest.mark.kernels
def test_where_one_gpu_fails_its_check_all_take_the_slower_kernels(kernels: Path) -> None:
    why = "each of 2 ranks its panels, on a GPU of its own; sums through the host"
    for failing, engine, tried in (("", "CudaEngine", 1), ("CudaEngine", "CoresEngine", 2)):
        said = answers(2, PRELUDE + ENGINES, str(kernels), failing, seconds=120)
        assert said == [[engine, why, ["CudaEngine", "CoresEngine"][:tried]]] * 2
    first, second = answers(2, PRELUDE + ENGINES, str(kernels), "CudaEngine,CoresEngine", seconds=120)
    told = "the panel engine failed its check on rank 1: it differs"
    assert (first[:2], second[:2]) == (["RankError", f"rank 1 of 2: RuntimeError: {told}"], ["RuntimeError", told])


# --- on real GPUs -------------------------------------------------------------------------------------------------

REAL = """
import hashlib
import numpy as np
import catopt_xp

rng = np.random.default_rng(0)
X, Y = rng.integers(0, 256, (300, 9 * 1024 + 5), dtype=np.uint8), rng.integers(0, 2, (1, 300))
result = catopt_xp.train(
    X=X.T, Y=Y, dev_X=X[:70].T, dev_Y=Y[:, :70], hidden=(30, 20), total_epoch=5, batch_size=64, print_interval=1,
    save_dir=None, verbose=False, device="cuda", strict_device=True, comm=comm,
)
history = result.history
weights = hashlib.sha256(b"".join(x.tobytes() for x in result.model.save().values())).hexdigest()
say([result.engine, weights, history.mini_batch_loss, history.full_train_loss, history.dev_loss])
"""


@pytest.mark.gpu
def test_two_gpus_have_the_bits_of_one() -> None:
    gpus = [gpu for gpu in device_report().gpus if gpu.free_memory is not None]
    if len(gpus) < 2:
        pytest.skip(f"{len(gpus)} of the two GPUs that this needs can be used")
    (one,) = answers(1, REAL, seconds=300)
    assert one[0] == "panels"
    assert answers(2, REAL, seconds=300) == [one, one]
