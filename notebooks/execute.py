"""Executes the notebooks where they lie and keeps their output: `jupyter execute --inplace`, in half the bytes.

python notebooks/execute.py [NOTEBOOK…]

It leaves out when cells ran and by which Python, and gives the figures a palette.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
COLOURS = 256  # of a figure


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=where).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = with_palette(output.data["image/png"])
    nbformat.write(notebook, path)


def with_palette(png: str) -> str:
    """The same picture, in base64 as it came, with a colour's number for each pixel."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    # Of Pillow's ways to choose them, this one leaves the few colours of the lines as they are.
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        print(path.name, flush=True)
        execute(path)
