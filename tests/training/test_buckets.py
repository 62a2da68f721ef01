"""gs:// paths work where local ones do. The bucket here is a folder behind etils' interface to buckets.

Checkpoints in buckets are Orbax's and tensorstore's own, and are not tested without one.
"""

import json
import os

import jax
import numpy as np
import pytest
import toys
from etils.epath import backend, gpath

from muse_jax import specs
from muse_jax.sampling import folder
from muse_jax.training import logs, meter, profile, stage

BUCKET = "gs://bucket"


class Bucket(backend._OsPathBackend):
    """Objects are files in a folder. Like buckets it has no folders that could be renamed."""

    def __init__(self, folder):
        self._folder = os.fspath(folder)

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        return lambda *paths, **settings: found(*map(self._place, paths), **settings)

    def _place(self, path):
        return f"{self._folder}{str(path).removeprefix(BUCKET)}" if str(path).startswith(BUCKET) else path

    def open(self, path, mode):
        if "r" not in mode:  # folders are parts of names
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super().open(path, mode)

    def rename(self, old, new):
        assert not os.path.isdir(old), "a bucket has no folders to rename"
        os.rename(old, new)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that stands for gs://bucket."""
    fake = Bucket(tmp_path)
    monkeypatch.setattr(backend, "tf_backend", fake)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", {fake})
    return tmp_path


def test_a_pipeline_folder_in_a_bucket(bucket):
    def save(where, number):
        stage.save_stage(where, toys.spec(), {"kernel": np.full(3, number, np.float32)})

    for manifest in ({"seed": 3}, {"seed": 4}):
        folder.write(f"{BUCKET}/made/p", {"tokenizer_low": 1, "base": 2}, manifest, save)
        paths, found = folder.read(f"{BUCKET}/made/p")
        assert found == manifest
    assert sorted(os.listdir(bucket / "made/p")) == ["base", "pipeline.json", "tokenizer_low"]
    np.testing.assert_array_equal(stage.load_stage(paths["base"]).params["kernel"], np.full(3, 2, np.float32))
    with pytest.raises(folder.PipelineError, match="gs://bucket/made/q is not there"):
        folder.read(f"{BUCKET}/made/q")


def test_a_stage_folder_in_a_bucket(bucket):
    params = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    stage.save_stage(f"{BUCKET}/stages/one", toys.spec(), params, {"words": ["a"]}, step=3)
    stage.save_stage(f"{BUCKET}/stages/one", toys.spec(), params, step=5)
    assert sorted(os.listdir(bucket / "stages/one")) == ["config.json", "params.safetensors"]
    loaded = stage.load_stage(f"{BUCKET}/stages/one")
    assert (loaded.spec, loaded.step, loaded.vocabulary) == (toys.spec(), 5, None)
    np.testing.assert_array_equal(loaded.params["encoder"]["kernel"], params["encoder"]["kernel"])
    with pytest.raises(stage.StageError, match="gs://bucket/nowhere"):
        stage.load_stage(f"{BUCKET}/nowhere")


def test_metrics_and_pictures_in_a_bucket(bucket):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, goes on from step 2
        life = meter.begin(f"{BUCKET}/run", start)
        lines = logs.Logs(f"{BUCKET}/run", start, 4, tensorboard=False, bar=False)
        for step in steps:
            lines.scalars(step, {"loss": 1.0 / step, "trained_seconds": 2.0 * step})
        lines.images(start, {"drawn": np.zeros((2, 4, 4, 3), np.uint8)})
        lines.close()
    assert (life.starts, life.trained) == (2, 4.0)
    assert [line["step"] for line in logs.read_metrics(f"{BUCKET}/run")] == [1, 2, 3, 4]
    assert sorted(os.listdir(bucket / "run/samples")) == ["drawn-0000000.png", "drawn-0000002.png"]
    assert json.loads((bucket / "run/life.json").read_text())["starts"] == 2


def test_a_profile_in_a_bucket(bucket):
    recorded = profile.Profile(specs.ProfileSpec(start_step=1, num_steps=1), f"{BUCKET}/run")
    for step in range(3):
        recorded.before(step, jax.numpy.ones(3))
    assert list(bucket.glob("run/plugins/profile/*/*.xplane.pb"))
