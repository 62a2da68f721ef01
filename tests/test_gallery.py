"""The gallery: its commands can be parsed, its pictures are those of commands above them; slow: drawn again."""

import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from muse_jax import edit, sample

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
MODULES = {"muse_jax.sample": sample, "muse_jax.edit": edit}
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
OF_THE_QUICKSTART = "decoding.png"


def parsed(command: str) -> flags.FlagValues:
    """The flags of a command, as its module defines them."""
    python, _, module, *words = shlex.split(command)
    assert python == "python"
    values = flags.FlagValues()
    MODULES[module].define_flags(values)
    assert values([module, *words]) == [module]
    return values


PACKAGED = [command for command in COMMANDS if not parsed(command).pipeline]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_its_flags_and_pictures(command):
    values = parsed(command)
    if "muse_jax.edit" in command:
        name, _ = edit.method_of(values)
        assert bool(values.image) == (name not in edit.WITHOUT_IMAGE)
        assert not values.image or (ROOT / values.image).exists()


def test_it_shows_every_way():
    ways = {edit.method_of(parsed(command))[0] for command in COMMANDS if "muse_jax.edit" in command}
    assert ways == {"edit", "inpaint", "outpaint", *edit.WAYS}


def test_every_picture_is_of_a_command_above_it():
    shown = list(re.finditer(r"!\[[^\]]+\]\(([^)]+)\)", PAGE))
    assert {f"{parsed(command).out}/grid.png" for command in COMMANDS} <= {f"docs/{picture[1]}" for picture in shown}
    for picture in shown:
        path = pathlib.Path("docs") / picture[1]
        assert (ROOT / path).exists()
        above = [command for command in COMMANDS if command in PAGE[: picture.start()]]
        assert picture[1] == OF_THE_QUICKSTART or path.parent in {pathlib.Path(parsed(one).out) for one in above}
    folders = {str(path.relative_to(ROOT)) for path in (ROOT / "docs/gallery").iterdir()}
    assert folders == {parsed(command).out for command in COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize("command", PACKAGED)
def test_a_command_draws_its_pictures_again(command, tmp_path, as_users):
    """As a user would: on one device, with all of XLA's optimizations."""
    words = [sys.executable, *shlex.split(command)[1:], f"--out={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, env=as_users, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kept = ROOT / parsed(command).out
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in kept.glob("*.png")}
    for path in tmp_path.glob("*.png"):
        drawn, expected = (np.asarray(Image.open(one).convert("RGB"), np.float32) for one in (path, kept / path.name))
        assert drawn.shape == expected.shape
        # Another processor may draw a few tokens otherwise.
        assert np.abs(drawn - expected).mean() < 8, path.name
