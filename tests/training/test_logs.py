"""Logs of a run: a CSV that grows, JSON at the end, events for TensorBoard; after any ending, and resumed."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from marks import some
from short_runs import fit, flat, small_set

from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.training import callbacks
from catopt_xp.training.callbacks import Callback, CsvLog, JsonLog, TensorBoard, TrainState
from catopt_xp.training.checkpoint import read_checkpoint
from catopt_xp.training.history import STAGES, History
from catopt_xp.training.loop import Interrupted, TrainingDiverged
from catopt_xp.training.train import TrainResult

REPOSITORY = Path(__file__).resolve().parents[2]


class At:
    """A callback that acts after one epoch."""

    def __init__(self, epoch: int, action: Any) -> None:
        self.epoch, self.action = epoch, action

    def on_epoch(self, state: TrainState) -> None:
        if state.epoch == self.epoch:
            self.action(state)


def crash(state: TrainState) -> None:
    raise RuntimeError("a callback failed")


def interrupt(state: TrainState) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stop(state: TrainState) -> None:
    state.stop = True


def logged(folder: Path, *more: Callback, **given: Any) -> TrainResult:
    """A run of six epochs, evaluated at 0, 2, 4 and 5, with a CSV and JSON log."""
    dev_X, dev_Y = small_set(20, seed=1)
    common: dict[str, Any] = {"total_epoch": 6, "print_interval": 2, "dev_X": dev_X, "dev_Y": dev_Y, "save_dir": folder}
    callbacks = [CsvLog(folder / "log" / "a.csv"), JsonLog(folder / "log" / "a.json")]
    return fit(callbacks=[*callbacks, *more], learning_rate=0.01, **(common | given))


def by_epoch(history: History) -> dict[str, Any]:
    kept = ("epoch", "eval_epoch", "learning_rate", "train_loss", "full_train_loss", "train_accuracy", "dev_loss")
    return {name: getattr(history, name) for name in kept}


# --- CSV and JSON -----------------------------------------------------------------------------------------------------


def test_the_csv_has_each_epoch_as_soon_as_it_has_ended(tmp_path: Path) -> None:
    file, seen = tmp_path / "a.csv", []

    class Reader:
        def on_epoch(self, state: TrainState) -> None:
            seen.append(History.from_csv(file))
            assert by_epoch(seen[-1]) == by_epoch(state.history)

    fit(callbacks=[CsvLog(file), Reader()], total_epoch=5, print_interval=2)
    assert [len(history.epoch) for history in seen] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("action", "ending"),
    [(crash, RuntimeError), (interrupt, Interrupted), (stop, None)],
    ids=["crash", "signal", "stop"],
)
def test_a_run_that_ends_early_leaves_csv_and_json_of_what_was_trained(
    tmp_path: Path, action: Any, ending: Any
) -> None:
    if ending is None:
        logged(tmp_path, At(3, action))
    else:
        with pytest.raises(ending):
            logged(tmp_path, At(3, action))
    history = History.from_json(tmp_path / "log" / "a.json")
    assert history.epoch == [0, 1, 2, 3]
    assert by_epoch(History.from_csv(tmp_path / "log" / "a.csv")) == by_epoch(history)
    assert len(history.mini_batch_loss) == 4 * 4
    assert history.run["optimizer"] == "Adam"


def test_a_run_that_diverges_leaves_the_epochs_before(tmp_path: Path) -> None:
    def spoil(state: TrainState) -> None:
        state.model.save()["W0"][...] = float("nan")

    with pytest.raises(TrainingDiverged):
        logged(tmp_path, At(1, spoil), checkpoint_every=100, print_interval=100)
    assert History.from_json(tmp_path / "log" / "a.json").epoch == [0, 1]
    assert History.from_csv(tmp_path / "log" / "a.csv").epoch == [0, 1]


@pytest.mark.parametrize("action", [crash, interrupt], ids=["crash", "signal"])
def test_a_resumed_run_has_each_epoch_once_in_its_logs(tmp_path: Path, action: Any) -> None:
    """After a crash at epoch 3 the CSV is ahead of the checkpoint, which is of epoch 2."""
    straight = logged(tmp_path / "straight")
    with pytest.raises((RuntimeError, Interrupted)):
        logged(tmp_path / "resumed", At(3, action))
    resumed = logged(tmp_path / "resumed", recover_from=tmp_path / "resumed" / "model_latest.npz", hidden=(30, 20, 20))
    for folder in (tmp_path / "straight", tmp_path / "resumed"):
        for history in (History.from_csv(folder / "log" / "a.csv"), History.from_json(folder / "log" / "a.json")):
            assert by_epoch(history) == by_epoch(straight.history)
    assert History.from_json(tmp_path / "resumed" / "log" / "a.json") == resumed.history


@pytest.mark.parametrize("how", ["replaced", "added to", "removed"])
def test_a_csv_changed_by_others_is_whole_after_the_next_row(tmp_path: Path, how: str) -> None:
    file = tmp_path / "log" / "a.csv"

    def disturb(state: TrainState) -> None:
        if how == "removed":
            file.unlink()
            return
        text = file.read_text() if how == "added to" else ""
        file.with_name("other").write_text(f"{text}7,of another run\n")
        os.replace(file.with_name("other"), file)

    result = logged(tmp_path, At(2, disturb))
    assert by_epoch(History.from_csv(file)) == by_epoch(result.history)


def test_a_run_with_nothing_left_to_train_has_its_logs_too(tmp_path: Path) -> None:
    first = logged(tmp_path)
    for name in ("a.csv", "a.json"):
        (tmp_path / "log" / name).unlink()
    logged(tmp_path, recover_from=first.checkpoint, hidden=(30, 20, 20))
    assert History.from_csv(tmp_path / "log" / "a.csv").epoch == first.history.epoch
    assert History.from_json(tmp_path / "log" / "a.json").epoch == first.history.epoch


def test_a_checkpoint_that_is_refused_leaves_the_logs_as_they_are(tmp_path: Path) -> None:
    first = logged(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()}
    with pytest.raises(ValueError, match="has the activations"):
        logged(tmp_path, recover_from=first.checkpoint, model=DeepNetwork([12, 6, 5, 1], ["tanh", "tanh", "sigmoid"]))
    assert {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()} == before


def test_a_log_serves_one_run_after_another(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "a.csv")
    fit(callbacks=[log], total_epoch=4)
    second = fit(callbacks=[log], total_epoch=2, learning_rate=0.02)
    assert by_epoch(History.from_csv(tmp_path / "a.csv"))["train_loss"] == second.history.train_loss


def test_logs_change_no_bit_and_are_counted_as_saving(tmp_path: Path) -> None:
    plain, written = (
        fit(callbacks=callbacks, total_epoch=4, print_interval=2, learning_rate=0.01)
        for callbacks in ([], [CsvLog(tmp_path / "a.csv"), JsonLog(tmp_path / "a.json")])
    )
    assert (flat(plain.model) == flat(written.model)).all()
    assert by_epoch(plain.history) == by_epoch(written.history)
    assert written.history.timings["save"] > 0.0 == plain.history.timings["save"]


def test_logs_do_not_have_weights_gathered_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    settle = PanelEngine.settle

    def counted(engine: PanelEngine) -> None:
        settled.append(engine._packed)
        settle(engine)

    monkeypatch.setattr(PanelEngine, "settle", counted)
    common: dict[str, Any] = {"total_epoch": 9, "print_interval": 4, "engine": "panels"}  # evaluated at 0, 4 and 8
    fit(callbacks=[CsvLog(tmp_path / "a.csv"), JsonLog(tmp_path / "a.json")], **common)
    assert sum(settled) == 3
    settled.clear()
    fit(callbacks=[At(99, stop)], **common)
    assert sum(settled) == 9


# --- what fails -------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
import numpy as np
from catopt_xp import train
from catopt_xp.training.callbacks import CsvLog, JsonLog, TensorBoard

class Fill:
    needs_weights = False
    def on_epoch(self, state):
        if state.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

X = np.random.default_rng(0).integers(0, 256, (40, 12), dtype=np.uint8).T
Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)
log = {"csv": CsvLog, "json": JsonLog, "tensorboard": TensorBoard}[sys.argv[1]](sys.argv[2])
train(X=X, Y=Y, save_dir=None, total_epoch=5, device="cpu", engine="plain", verbose=False, callbacks=[log, Fill()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is a POSIX limit")
@pytest.mark.parametrize("kind", some(["csv", "json", "tensorboard"], ["csv"], pytest.mark.hardening))
def test_a_full_disk_ends_the_run_with_one_line_that_names_the_log(tmp_path: Path, kind: str) -> None:
    if kind == "tensorboard":
        pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, kind, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == 1
    told = f"could not write {tmp_path / 'log'}: File too large; free space or choose another "
    assert done.stderr.splitlines()[-1].removesuffix("folder").removesuffix("place").endswith(told)
    assert kind != "json" or list(tmp_path.iterdir()) == []
    assert "Exception ignored" not in done.stderr


ENDLESS = """
import sys
from pathlib import Path
from short_runs import fit
from catopt_xp.training.callbacks import CsvLog, JsonLog

folder = Path(sys.argv[1])
logs = [CsvLog(folder / "a.csv"), JsonLog(folder / "a.json")]
fit(callbacks=logs, save_dir=folder, total_epoch=10**6, print_interval=3, learning_rate=1e-4, engine="plain")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_a_killed_run_leaves_a_csv_that_is_read_no_half_json_and_goes_on(tmp_path: Path) -> None:
    file, before = tmp_path / "a.csv", History(epoch=[0], train_loss=[1.0])
    before.to_json(tmp_path / "a.json")  # of a run before
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")])},
    ) as process:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and (not file.exists() or file.read_bytes().count(b"\n") < 20):
            time.sleep(0.001)
        process.kill()
    killed = History.from_csv(file)
    assert killed.epoch == list(range(len(killed.epoch)))
    assert len(killed.epoch) > 15
    assert History.from_json(tmp_path / "a.json") == before
    end = len(killed.epoch) + 3
    recover: dict[str, Any] = {"recover_from": tmp_path / "model_latest.npz", "hidden": (30, 20, 20), "engine": "plain"}
    callbacks = [CsvLog(file), JsonLog(tmp_path / "a.json")]
    fit(callbacks=callbacks, total_epoch=end, print_interval=3, **recover)
    whole = History.from_json(tmp_path / "a.json")
    assert whole.epoch == History.from_csv(file).epoch == list(range(end))
    assert whole.train_loss[: len(killed.epoch)] == killed.train_loss


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")


Points = dict[str, list[tuple[float, int, Any]]]  # tag -> wall time, step, value


def from_records(folder: Path) -> Points:
    """What a folder's records hold by their format, with the rule of readers that a START drops what is not before it.

    A record: length (8 bytes), its checksum (4), an Event, its checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: Points = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert len(data) >= length + 16
            event, data = Event.FromString(data[12 : 12 + length]), data[length + 16 :]
            if event.session_log.status == SessionLog.START:
                found = {tag: [point for point in found[tag] if point[1] < event.step] for tag in found}
            for value in event.summary.value:
                text = value.tensor.string_val
                found.setdefault(value.tag, []).append((event.wall_time, event.step, *(text or [value.simple_value])))
    return found


def from_tensorboard(folder: Path) -> Points:
    """What TensorBoard's own reader finds in a folder: all of it, not a sample."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    module = pytest.importorskip(name, reason="tensorboard, whose reader is asked, is not installed")
    found = module.EventAccumulator(str(folder), size_guidance={module.SCALARS: 0, module.TENSORS: 0}).Reload()
    points: Points = {}
    for tag in found.Tags()["scalars"]:
        points[tag] = [(e.wall_time, e.step, e.value) for e in found.Scalars(tag)]
    for tag in found.Tags()["tensors"]:
        points[tag] = [(e.wall_time, e.step, e.tensor_proto.string_val[0]) for e in found.Tensors(tag)]
    return points


@pytest.fixture(params=[from_records, from_tensorboard], ids=["records", "tensorboard"])
def read(request: pytest.FixtureRequest, tensorboard: None) -> Callable[[Path], Points]:
    """A reader of events: one of a dozen lines, and TensorBoard's where that is installed."""
    return cast("Callable[[Path], Points]", request.param)


def scalars(found: Points, tag: str) -> tuple[list[int], list[float]]:
    return [step for _, step, _ in found[tag]], [value for _, _, value in found[tag]]


def rounded(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-6)  # events hold single precision


def assert_shows(found: Points, history: History) -> None:
    assert scalars(found, "loss/train_loss") == (history.epoch, rounded(history.train_loss))
    assert scalars(found, "learning_rate") == (history.epoch, rounded(history.learning_rate))
    assert scalars(found, "time/seconds") == (history.epoch, rounded(history.seconds))
    for tag in ("loss/full_train_loss", "loss/dev_loss", "accuracy/train_accuracy", "accuracy/dev_accuracy"):
        assert scalars(found, tag) == (history.eval_epoch, rounded(getattr(history, tag.split("/")[1])))
    losses = history.mini_batch_loss
    assert scalars(found, "loss/mini_batch_loss") == (list(range(1, len(losses) + 1)), rounded(losses))


def test_readers_find_every_number_of_the_run(read: Any, tmp_path: Path) -> None:
    result = logged(tmp_path, TensorBoard(tmp_path / "events"))
    found = read(tmp_path / "events")
    assert_shows(found, result.history)
    assert {tag for tag in found if tag.startswith("stages/")} == {f"stages/{s}" for s in STAGES}
    assert scalars(found, "stages/train")[1] == sorted(scalars(found, "stages/train")[1])
    text = found["run/text_summary"][0][2].decode()
    assert "| optimizer | Adam |" in text
    assert "| batch_size | 16 |" in text
    assert text.count("\n") == len(result.history.run) + 2


def test_events_are_there_to_be_read_while_the_run_goes_on(read: Any, tmp_path: Path) -> None:
    seen: list[list[int]] = []
    fit(
        callbacks=[
            TensorBoard(tmp_path),
            At(1, lambda state: seen.append(scalars(read(tmp_path), "loss/train_loss")[0])),
        ]
    )
    assert seen == [[0, 1]]


@pytest.mark.usefixtures("tensorboard")
def test_an_epoch_is_written_as_fast_late_in_a_run_as_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(seconds: list[float], initial: float) -> Any:
        lengths.append(len(seconds))
        return itertools.accumulate(seconds, initial=initial)

    monkeypatch.setattr(callbacks, "accumulate", counted)
    fit(callbacks=[TensorBoard(tmp_path)], total_epoch=7)
    assert lengths == [1] * 7  # not the epochs before, each time


def test_the_wall_times_are_those_at_which_epochs_ended(read: Any, tmp_path: Path) -> None:
    result = fit(callbacks=[TensorBoard(tmp_path)])
    found = read(tmp_path)
    ends = [wall_time for wall_time, _, _ in found["loss/train_loss"]]
    steps = [wall_time for wall_time, _, _ in found["loss/mini_batch_loss"]]
    assert ends == sorted(ends)
    assert steps[3::4] == ends
    resumed = History.from_json(result.history.to_json())
    log = TensorBoard(tmp_path / "after")
    log.on_epoch(TrainState(2, result.model, result.optimizer, resumed, evaluated=True))
    log.on_end(TrainState(2, result.model, result.optimizer, resumed, evaluated=True))
    ends = [wall_time for wall_time, _, _ in read(tmp_path / "after")["loss/train_loss"]]
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    assert gaps == pytest.approx(result.history.seconds[1:], abs=1e-5)


@pytest.mark.parametrize("action", [crash, interrupt], ids=["crash", "signal"])
def test_a_resumed_run_shows_every_number_once(read: Any, tmp_path: Path, action: Any) -> None:
    events = tmp_path / "events"
    with pytest.raises((RuntimeError, Interrupted)):
        logged(tmp_path, TensorBoard(events), At(3, action))
    assert scalars(read(events), "loss/train_loss")[0] == [0, 1, 2, 3]
    recover: dict[str, Any] = {"recover_from": tmp_path / "model_latest.npz", "hidden": (30, 20, 20)}
    resumed = logged(tmp_path, TensorBoard(events), **recover)
    assert resumed.history.epoch == [0, 1, 2, 3, 4, 5]
    assert_shows(read(events), resumed.history)


def test_a_new_run_in_an_old_folder_is_the_only_one_shown(read: Any, tmp_path: Path) -> None:
    fit(callbacks=[TensorBoard(tmp_path)], total_epoch=5)
    result = fit(callbacks=[TensorBoard(tmp_path)], total_epoch=2, learning_rate=0.02)
    assert len(list(tmp_path.iterdir())) == 2
    assert scalars(read(tmp_path), "loss/train_loss") == ([0, 1], rounded(result.history.train_loss))


@pytest.mark.parametrize("action", [crash, interrupt, stop], ids=["crash", "signal", "stop"])
def test_the_file_is_closed_however_the_run_ends(tensorboard: None, tmp_path: Path, action: Any) -> None:
    log = TensorBoard(tmp_path)
    writers: list[Any] = []
    make = log._make_writer
    log._make_writer = lambda *names: writers.append(make(*names)) or writers[-1]
    try:
        fit(callbacks=[log, At(1, action)])
    except (RuntimeError, Interrupted):
        assert action is not stop
    (writer,) = writers
    assert writer._py_recordio_writer._writer.closed


def test_without_tensorboardx_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "catopt-xp\[tensorboard\]"') as caught:
        TensorBoard(tmp_path)
    assert "\n" not in str(caught.value)


# --- the end of a run -------------------------------------------------------------------------------------------------


class Ender:
    """A callback that records its end, and fails there if it is told to."""

    def __init__(self, told: list[str], name: str, fails: bool = False) -> None:
        self.told, self.name, self.fails = told, name, fails

    def on_epoch(self, state: TrainState) -> None:
        """Nothing."""

    def on_end(self, state: TrainState) -> None:
        self.told.append(f"{self.name} {state.epoch} {state.last}")
        if self.fails:
            raise OSError(f"{self.name} failed")


def test_every_callback_is_told_of_the_end_once_also_when_another_fails() -> None:
    told: list[str] = []
    with (
        pytest.warns(UserWarning, match="at the end of the run: b failed"),
        pytest.raises(OSError, match="a failed"),
    ):
        fit(callbacks=[Ender(told, "a", fails=True), Ender(told, "b", fails=True), At(99, stop), Ender(told, "c")])
    assert told == ["a 2 True", "b 2 True", "c 2 True"]


def test_what_ended_the_run_is_raised_before_what_its_end_raised() -> None:
    told: list[str] = []
    with (
        pytest.warns(UserWarning, match="at the end of the run: a failed"),
        pytest.raises(RuntimeError, match="a callback failed"),
    ):
        fit(callbacks=[Ender(told, "a", fails=True), At(1, crash), Ender(told, "b")])
    assert told == ["a 1 True", "b 1 True"]


def test_at_the_end_the_best_weights_are_back_in_place(tmp_path: Path) -> None:
    X, Y = small_set()
    seen: list[Any] = []

    class Keeper:
        def on_epoch(self, state: TrainState) -> None:
            """Nothing."""

        def on_end(self, state: TrainState) -> None:
            seen.append(flat(state.model))

    result = fit(
        total_epoch=20,
        early_stopping=2,
        dev_X=X,
        dev_Y=1 - Y,
        learning_rate=0.02,
        save_dir=tmp_path,
        callbacks=[Keeper()],
    )
    assert (seen[0] == flat(result.model)).all()
    assert len(result.history.epoch) < 20
    assert result.checkpoint is not None
    assert any(name.startswith("best/") for name in read_checkpoint(result.checkpoint)[0])
