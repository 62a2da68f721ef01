"""`python -m muse_jax.assemble` on the tiny quickstart's stages: what fits together, and what is said of the rest."""

import subprocess
import sys

import numpy as np
import pytest

from muse_jax import assemble
from muse_jax.sampling.folder import PipelineError
from muse_jax.training import checkpoint

STAGES = ("tokenizer_low", "tokenizer_high", "base", "superres", "decoder")


@pytest.fixture
def stages(tiny_quickstart, tmp_path):
    """A folder with links to the quickstart's stages."""
    for name in STAGES:
        (tmp_path / "stages" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "stages" / name).symlink_to(tiny_quickstart[0] / name)
    return tmp_path / "stages"


def test_models_and_the_tokenizers_that_they_were_trained_on_fit(stages, tmp_path):
    pipeline = assemble.assemble(stages, tmp_path / "pipeline", command="a test")
    assert set(pipeline.stages) == set(STAGES)


@pytest.mark.parametrize(
    ("tokenizer", "part", "message"),
    [
        ("tokenizer_low", "quantizer", "^base .* another tokenizer than tokenizer_low"),
        ("tokenizer_high", "encoder", "^superres .* another tokenizer than tokenizer_high"),
    ],
)
def test_another_tokenizer_of_the_same_sizes_is_refused(stages, tmp_path, tokenizer, part, message):
    other = checkpoint.load_stage(stages / tokenizer)
    leaf = other.params[part]
    while "kernel" not in leaf and "codebook" not in leaf:
        leaf = next(value for value in leaf.values() if isinstance(value, dict))
    name = "kernel" if "kernel" in leaf else "codebook"
    leaf[name] = leaf[name] + np.float32(0.1)
    (stages / tokenizer).unlink()
    checkpoint.save_stage(stages / tokenizer, other.spec, other.params)
    with pytest.raises(PipelineError, match=message):
        assemble.assemble(stages, tmp_path / "pipeline", command="a test")
    assert not (tmp_path / "pipeline").exists()


def test_what_is_in_the_way_is_said_in_one_line(stages, tmp_path):
    def said(out="pipeline"):
        command = [sys.executable, "-m", "muse_jax.assemble", f"--stages={stages}", f"--pipeline={tmp_path / out}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    (tmp_path / "file").write_text("")
    assert "file is a file; name another folder" in said("file/pipeline")
    (stages / "base").unlink()
    (stages / "base").write_text("")
    assert "base is no stage folder" in said()
    (stages / "report.json").write_text('{"command": "pyt')
    assert "report.json is damaged" in said()
