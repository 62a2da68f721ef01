"""Every command of the README runs: here on a tiny pipeline, or where `ELSEWHERE` says."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from muse_jax.data import scenes

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What cannot run inside a test, and what runs it instead.
ELSEWHERE = {
    "pip install -e . && python -m muse_jax.quickstart": "tests/test_quickstart.py",
    "pip install -e '.[test]' && pytest -m \"not slow\" -n 3 --dist loadfile": ".ci/run",
    "python -m muse_jax.quickstart --variant=long --workdir=runs/long": "tests/test_configs.py",
    "python docs/emoji.py runs/emoji-pictures": "tests/docs/test_emoji.py",
    "pytest": ".ci/run",
    "python -m muse_jax.compile --config=configs/base_3b.py --topology=v4:4x8x8": "tests/test_compile.py",
    "for i in 0 1; do python -m muse_jax.train --config=configs/scenes/base.py --workdir=runs/two "
    "--coordinator=localhost:8476 --num_processes=2 --process_id=$i & done; wait": "tests/test_train.py",
}
SLOW = (  # words of commands that take half a minute and more
    "--configs=configs/pictures",
    "muse_jax.benchmark",
    "--sweep",
    "muse_jax.overhead",
    "runs/emoji-records",
    "muse_jax.evaluate --pipeline=runs/maskgit",
)


def _fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in _fenced("bash") for line in block.splitlines() if line.strip()]


def _short(command: str) -> list[str]:
    """The command with the tiny variant of configs."""
    command = re.sub(r"(--config=configs/\S+\.py)", r"\1:tiny", command)
    command = re.sub(r"(--configs=configs/\S+)", r"\1 --variant=tiny", command)
    command = command.replace("--config.train.steps=500", "--config.train.steps=3")
    words = shlex.split(command)
    assert words[0] == "python"
    if "muse_jax.evaluate" in words:
        words += ["--num_prompts=2", "--num_unguided=1", "--num_held_out=1", "--num_reconstructed=2"]
        words += ["--num_edits=1", "--num_swept=2", "--sweep_steps=2", "--out=runs/e"]
    if "muse_jax.benchmark" in words:
        words += ["--quick"]
    if "muse_jax.overhead" in words:
        words += ["--variant=tiny", "--rounds=1"]
    return [sys.executable, *words[1:]]


@pytest.fixture(scope="module")
def checkout(tiny_quickstart) -> pathlib.Path:
    """Where the README's commands are run: with the configs, a finished quickstart, and pictures of one's own.

    The commands go on from each other, in runs/.
    """
    folder = tiny_quickstart[0].parent.parent
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    pictures = folder / "runs/emoji-pictures"
    pictures.mkdir()
    from PIL import Image

    for index in range(24):
        scene = scenes.scene(index)
        Image.fromarray(scenes.render(scene, 48)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(scene.caption, encoding="utf-8")
    return folder


def test_the_front_page_starts_with_the_two_commands():
    assert COMMANDS[:2] == list(ELSEWHERE)[:2]


def test_what_runs_elsewhere_is_still_there():
    for command, where in ELSEWHERE.items():
        assert command in COMMANDS, f"{command} is no longer in the README"
        assert (ROOT / where).exists()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=command, marks=[pytest.mark.slow] if any(word in command for word in SLOW) else [])
        for command in COMMANDS
        if command not in ELSEWHERE
    ],
)
def test_a_command_runs(command, checkout, one_device, request):
    if "runs/emoji/" in command and not (checkout / "runs/emoji/pipeline").exists():
        if not any(
            item.name.startswith("test_a_command_runs") and SLOW[0] in item.name for item in request.session.items
        ):
            pytest.skip("needs the slow test of the quickstart on pictures")
        pytest.fail("the quickstart on pictures, before this in the README, left no pipeline")
    words = _short(command)
    settings = {"capture_output": True, "text": True, "timeout": 500, "check": False}
    done = subprocess.run(words, cwd=checkout, env=one_device, **settings)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("block", _fenced("python"))
def test_a_python_block_runs(block, checkout, one_device):
    settings = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([sys.executable, "-c", block], cwd=checkout, env=one_device, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (checkout / "crosses.png").stat().st_size > 0


def test_files_that_the_readme_names_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(r"`((?:configs|muse_jax|docs|tests|launch|third_party)/[\w/.]+)`", README)
    assert links
    assert named
    missing = [name for name in (*links, *named) if not (ROOT / name).exists()]
    assert not missing
