"""The notebook, every cell executed as a user would: without a pipeline, so that it trains the small one first."""

import base64
import io
import pathlib
import queue
import time
import types

import nbclient
import nbformat
import numpy as np
import pytest
import traitlets
from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.channels import AsyncZMQSocketChannel
from PIL import Image

from muse_jax.sampling.pipeline import MusePipeline

NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "launch/colab/muse_jax.ipynb"

# Moves the guidance slider as a hand would; what it had drawn before stays beside what it draws then.
MOVE = """
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
draw.widget.clear_output = False
draw.widget.children[1].value = 7.5
print(f"{len(compiled)} programs compiled")
"""


class Channel(AsyncZMQSocketChannel):
    """Looks again each second.

    While it waits for a cell's reply, nbclient sends a widget's output through the same socket, and one that is
    written to may not say that something came in (nbclient's issue 312).
    """

    async def get_msg(self, timeout=None):
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return await super().get_msg(timeout=max(0, min(1, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= end:
                    raise


class Client(AsyncKernelClient):
    shell_channel_class = traitlets.Type(Channel)


class Manager(AsyncKernelManager):
    client_factory = traitlets.Type(Client, klass=AsyncKernelClient)


@pytest.fixture(scope="module")
def executed(tiny_quickstart):
    """The notebook after a run beside a finished tiny quickstart, which its training cell then finds."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('PIPELINE = "pretrained"', 'PIPELINE = ""')
        cell.source = cell.source.replace('VARIANT = ""', 'VARIANT = "tiny"')
    (sliders,) = (n for n, cell in enumerate(notebook.cells) if "widgets.interact(" in cell.source)
    notebook.cells.insert(sliders + 1, nbformat.v4.new_code_cell(MOVE))
    folder = tiny_quickstart[0].parent.parent
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=400, kernel_manager_class=Manager, resources=resources).execute()


def cell_of(notebook, start):
    """The cell that starts so."""
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith(start))
    return cell


def pictures(outputs):
    """The pictures and animations among a cell's or a widget's outputs."""
    shown = [output.get("data", {}) for output in outputs]
    found = [data[kind] for data in shown for kind in ("image/png", "image/gif") if kind in data]
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in found]


def assert_drawn(sheet):
    """More than white paper."""
    assert len(np.unique(np.asarray(sheet.convert("L")))) > 10


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
    base, superres, sheet = pictures(cell_of(executed, "PROMPT =").outputs)
    assert base.n_frames > 1
    assert superres.n_frames > 1
    assert_drawn(sheet)


def test_sliders_draw_and_another_guidance_compiles_nothing(executed):
    states = executed.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    (outputs,) = (state["state"]["outputs"] for state in states if state["model_name"] == "OutputModel")
    # interact shows what its function raises, and goes on.
    errors = [output["evalue"] for output in outputs if output["output_type"] == "error"]
    assert not errors
    at_first, moved = pictures(outputs)
    assert_drawn(at_first)
    assert_drawn(moved)
    assert np.any(np.asarray(at_first) != np.asarray(moved))
    assert cell_of(executed, MOVE).outputs[0]["text"] == "0 programs compiled\n"


def test_a_pipeline_of_classes_is_refused_at_once(monkeypatch):
    opened = types.SimpleNamespace(classes=("red circle",), image_size=32)
    monkeypatch.setattr(MusePipeline, "load", lambda path: opened)
    with pytest.raises(ValueError, match="this notebook writes prompts: open a pipeline of texts"):
        exec(cell_of(nbformat.read(NOTEBOOK, as_version=4), "PIPELINE =").source, {})


@pytest.mark.parametrize("start", ["BOX =", "INPAINT_PROMPT =", "EDIT_PROMPT =", "OTHER_PROMPT ="])
def test_editing_shows_pictures(executed, start):
    (sheet,) = pictures(cell_of(executed, start).outputs)
    assert_drawn(sheet)
