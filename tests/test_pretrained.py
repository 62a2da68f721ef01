"""The pipeline that comes with the package: small, documented, drawn from and trained on without another file."""

import importlib.resources
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from PIL import Image

from muse_jax.evaluation import prompts
from muse_jax.training.checkpoint import load_stage

FOLDER = pathlib.Path(str(importlib.resources.files("muse_jax"))) / "pretrained"
CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
PROMPT = "a small orange cross on a black background"


def _run(*words: str, cwd: pathlib.Path, env: dict[str, str]) -> str:
    settings = {"capture_output": True, "text": True, "timeout": 500, "check": False}
    done = subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=env, **settings)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_a_prompt_alone_gives_the_right_picture(tmp_path, one_device):
    _run("muse_jax.sample", f"--prompt={PROMPT}", "--out=pictures", cwd=tmp_path, env=one_device)
    (name,) = [entry["file"] for entry in json.loads((tmp_path / "pictures/samples.json").read_text())["pictures"]]
    with Image.open(tmp_path / "pictures" / name) as picture:
        held = prompts.score(np.asarray(picture.convert("RGB")), PROMPT)
    assert set(held) == {"background", "count", "shape 1", "color 1", "size 1"}
    assert all(held.values()), held


def test_it_is_small_and_says_what_made_it():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    manifest = json.loads((FOLDER / "pipeline.json").read_text())["manifest"]
    assert manifest["command"].startswith("python -m muse_jax.quickstart --variant=long")
    assert isinstance(manifest["seed"], int)
    assert {"jax", "python"} <= set(manifest["versions"])
    assert 0 < manifest["figures"]["prompts"]["statements"] <= 1


def test_the_scenes_configs_train_on_its_tokenizers(tmp_path, one_device):
    """A base model of one's own needs no tokenizer of one's own."""
    config = f"--config={CONFIGS / 'scenes/base.py'}"
    less = [f"--config.{key}" for key in ("train.steps=1", "train.batch_size=8", "train.eval_batches=1")]
    less += ["--config.model.layers=1", "--config.model.unroll=1"]
    _run(
        "muse_jax.train",
        config,
        *less,
        "--config.sample.num_inference_steps=1",
        "--workdir=run",
        cwd=tmp_path,
        env=one_device,
    )
    assert load_stage(str(tmp_path / "run")).step == 1


def test_its_parameters_are_float32_once_they_are_loaded():
    leaves = load_stage("pretrained:tokenizer_low").params["quantizer"].values()
    assert {jnp.asarray(leaf).dtype for leaf in leaves} == {jnp.dtype("float32")}
