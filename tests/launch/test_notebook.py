"""The notebook, every cell executed as a user would: without a pipeline, so that it trains the small one first."""

import base64
import io
import pathlib

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "launch/colab/muse_jax.ipynb"


@pytest.fixture(scope="module")
def executed(tiny_quickstart):
    """The notebook after a run beside a finished tiny quickstart, which its training cell then finds."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('PIPELINE = "pretrained"', 'PIPELINE = ""')
        cell.source = cell.source.replace('VARIANT = ""', 'VARIANT = "tiny"')
    folder = tiny_quickstart[0].parent.parent
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def pictures(notebook, start):
    """What the cell that starts so has shown, as arrays of frames."""
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith(start))
    found = []
    for output in cell.outputs:
        for kind in ("image/png", "image/gif"):
            if kind in output.get("data", {}):
                found.append(Image.open(io.BytesIO(base64.b64decode(output["data"][kind]))))
    return found


def test_the_notebook_is_stored_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def test_every_cell_runs(executed):
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert len(cells) >= 8
    assert all(cell.execution_count for cell in cells)
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "pictures of 64 x 64 pixels" in said


def test_tokens_fill_in_before_the_eyes(executed):
    base, superres, sheet = pictures(executed, "PROMPT =")
    assert base.n_frames > 1
    assert superres.n_frames > 1
    assert len(np.unique(np.asarray(sheet.convert("L")))) > 10


@pytest.mark.parametrize("start", ["BOX =", "INPAINT_PROMPT =", "EDIT_PROMPT =", "OTHER_PROMPT ="])
def test_editing_shows_pictures(executed, start):
    (sheet,) = pictures(executed, start)
    assert len(np.unique(np.asarray(sheet.convert("L")))) > 10
