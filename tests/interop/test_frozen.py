"""An imported text encoder in a run: in its shards, and seen by the task."""

import dataclasses
import importlib.util
import pathlib
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from small import our_params

from muse_jax import specs, stages
from muse_jax.interop import folder
from muse_jax.models import vqgan
from muse_jax.training import sharding, step, trees

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "scenes"


def tiny(stage):
    found = importlib.util.spec_from_file_location("config", CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return specs.from_config(module.get_config("tiny"))


@pytest.fixture
def task(tmp_path):
    """The tiny base model's, with a frozen text encoder from a folder and a tokenizer of zeros; and its spec."""
    spec = tiny("base")
    text = dataclasses.replace(spec.model.text, trainable=False, weights=str(tmp_path))
    save_file(our_params(text), tmp_path / folder.PARAMS)
    mesh = dataclasses.replace(spec.mesh, data=1, fsdp=2, tensor=2)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, text=text), mesh=mesh)
    low = tiny("tokenizer_low")
    images = jax.ShapeDtypeStruct((1, low.data.image_size, low.data.image_size, 3), np.float32)
    shapes = nn.unbox(jax.eval_shape(vqgan.VQGAN(low.model).init, jax.random.key(0), images)["params"])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    stage = types.SimpleNamespace(spec=low, params=zeros, path="zeros")
    return stages.build_task(spec, lambda path: stage), spec, our_params(text)


def test_a_run_has_the_encoder_in_its_shards(task):
    task, spec, params = task
    frozen = task.frozen()
    program = step.Program(spec, task, sharding.make_mesh(spec.mesh), frozen)
    placed = sharding.place(sharding.unbox(frozen), step.shardings_of(program.frozen))
    encoder = trees.named_leaves(placed["text_encoder"])
    assert encoder.keys() == params.keys()
    for name, leaf in encoder.items():
        np.testing.assert_array_equal(leaf, params[name], err_msg=name)
    kernel = encoder["encoder/layers/mlp/wi_0/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert "text_encoder" not in program.state.params
    # What the trainer keeps in checkpoints, to know that the weights are the same after a restart.
    prints = trees.fingerprints(placed["text_encoder"])
    assert prints == {name: trees.fingerprint_numpy(value) for name, value in params.items()}
