"""The notebooks: each runs in its small size on the CPU, and the output of its normal size is committed whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from marks import some

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURES = {
    "01_the_chapter": 10,
    "02_optimizer_paths": 7,
    "03_batch_size_and_time": 5,
    "04_scikit_learn_on_a_gpu": 2,
}
LARGEST = 400_000  # bytes
ABSOLUTE = re.compile(r"(?<![\w.:/<\\])/\w[\w.-]*/\w|\b[A-Z]:\\")  # /home/…, C:\…; not a/b, https://…, </b>


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[list[str]]:
    """What each code cell has left: the kind of each output, or the name of its stream."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[kind(output) for output in cell.outputs] for cell in cells]


def kind(output: Any) -> str:
    if "image/png" in output.get("data", {}):
        return "figure"
    return str(output.get("name", output.output_type))


def texts(notebook: Any) -> list[str]:
    """All that the outputs say."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [text for output in found for text in (output.get("text", ""), output.get("data", {}).get("text/plain", ""))]


def test_each_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(FIGURES)


@pytest.mark.hardening
@pytest.mark.parametrize("name", some(FIGURES, ["02_optimizer_paths"]))
def test_it_runs_in_its_small_size_and_has_its_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATOPT_XP_NOTEBOOK_SIZE", "small")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's profile
    work = tmp_path / "work"
    work.mkdir()
    notebook, committed = read(name), read(name)
    where = {"metadata": {"path": str(work)}}
    nbclient.NotebookClient(notebook, timeout=120, coalesce_streams=True, resources=where).execute()
    assert outputs(notebook) == outputs(committed)
    assert sum(cell.count("figure") for cell in outputs(notebook)) == FIGURES[name]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_output_is_whole_and_names_nothing_of_the_machine(name: str) -> None:
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed once, from the top
    left = [kind for cell in outputs(notebook) for kind in cell]
    assert left.count("figure") == FIGURES[name]
    assert set(left) == {"figure", "stdout"}  # no error, no warning
    assert [text for text in texts(notebook) if ABSOLUTE.search(text)] == []
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved /home/me/run.json", True),
        ("'/tmp/x/y.png'", True),
        ("C:\\runs", True),
        ("work_dirs/run.json", False),
        ("p -= lr * m/(sqrt(v)/c + eps)", False),
        ("https://example.org/a/b", False),
    ],
)
def test_an_absolute_path_is_seen(text: str, found: bool) -> None:
    assert bool(ABSOLUTE.search(text)) == found
