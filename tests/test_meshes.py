"""Real tasks on 8 simulated devices: three train steps and a draw on any mesh are those of one device."""

import dataclasses
import functools
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import data, specs, stages
from muse_jax.models import vqgan
from muse_jax.training import sharding, trees
from muse_jax.training import step as steps

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs/scenes"
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
BATCH = 8
TEXT = {"heads": 4, "head_dim": 8, "width": 32, "mlp_width": 64}
CHANGES = {  # so that all meshes divide them
    "base": {"model": {"heads": 4, "width": 32, "unroll": 1}, "text": TEXT},
    "superres": {"model": {"heads": 8, "width": 64, "unroll": 1}, "text": TEXT},
    # Both optimizers at work from the first step, and no revival, which picks by ranks.
    "tokenizer_low": {"task": {"adversarial": 0.1, "adversarial_start": 0, "revive_after": 100}},
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    spec: specs.Spec
    params: dict
    path: str = "somewhere"


def spec_of(stage):
    found = importlib.util.spec_from_file_location("config", CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config = module.get_config("tiny")
    changes = CHANGES.get(stage, {})
    config.task.update(changes.get("task", {}))
    config.model.update(changes.get("model", {}))
    if "text" in changes:
        config.model.text.update(changes["text"])
    config.train.batch_size = BATCH
    config.train.matmul_precision = ""  # what is rounded to 8 bits may be rounded otherwise after another sum
    spec = specs.from_config(config)
    # Adam's and Muon's first steps are signs of the gradient, of which rounding decides the smallest.
    changes = dict(name="adafactor", learning_rate=1e-3, b1=0.0, warmup_steps=0, overrides={})
    return dataclasses.replace(spec, optimizer=dataclasses.replace(spec.optimizer, **changes))


@functools.cache
def tokenizer(name):
    spec = spec_of(name)
    side = spec.data.image_size
    params = jax.jit(vqgan.VQGAN(spec.model).init)(jax.random.key(1), jnp.zeros((1, side, side, 3)))["params"]
    return Loaded(spec, nn.unbox(params))


@functools.cache
def batches(stage):
    spec = spec_of(stage)
    loader = data.make_loader(
        spec.data,
        batch_size=BATCH,
        seed=0,
        vocabulary=data.make_vocabulary(spec.data),
        split="train",
        start_step=0,
    )
    try:
        return [dict(next(loader)) for _ in range(3)]
    finally:
        loader.close()


def program_of(spec):
    task = stages.build_task(spec, lambda path: tokenizer(path.removeprefix("pretrained:")))
    return task, steps.Program(spec, task, sharding.make_mesh(spec.mesh), task.frozen())


@functools.cache
def trained(stage, sizes):
    """({parameter: array}, losses, pictures drawn) after three steps on a mesh."""
    spec = dataclasses.replace(spec_of(stage), mesh=specs.MeshSpec(*sizes))
    task, program = program_of(spec)
    frozen = jax.device_put(sharding.unbox(task.frozen()), steps.shardings_of(program.frozen))
    state, losses = program.initial(), []
    given = [sharding.put(batch, program.batch_sharding) for batch in batches(stage)]
    compiled = program.lower_train(given[0]).compile()
    for batch in given:
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    pictures = program.lower_samples(given[0]).compile()(state.params, frozen, given[0])
    spread = {name: leaf.sharding for name, leaf in trees.named_leaves(state.params).items()}
    leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(state.params).items()}
    return leaves, losses, {name: np.asarray(value) for name, value in pictures.items()}, spread


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        # Each compiles for a quarter of a minute: the mesh that splits everything is the one always tried.
        pytest.param(stage, sizes, marks=[] if sizes == (2, 2, 2) else [pytest.mark.slow], id=f"{stage}-{sizes}")
        for stage in ("base", "superres", "tokenizer_low")
        for sizes in MESHES
    ],
)
def test_three_steps_and_a_draw_are_those_of_one_device(stage, sizes):
    alone, losses, pictures, _ = trained(stage, (1, 1, 1))
    shared, shared_losses, shared_pictures, spread = trained(stage, sizes)
    np.testing.assert_allclose(shared_losses, losses, rtol=2e-5)
    for name, leaf in alone.items():
        np.testing.assert_allclose(shared[name], leaf, atol=2e-5, err_msg=name)
    for name, picture in pictures.items():
        np.testing.assert_allclose(shared_pictures[name].astype(int), picture.astype(int), atol=1, err_msg=name)
    split = [name for name, where in spread.items() if not where.is_fully_replicated]
    assert bool(split) == (sizes != (8, 1, 1)), "parameters are split over fsdp and tensor, and over data never"


def test_the_step_alone_rounds_factors_of_products_where_the_config_says_so():
    spec = spec_of("base")
    rounding = dataclasses.replace(spec, train=dataclasses.replace(spec.train, matmul_precision="bfloat16"))
    programs = {name: program_of(one)[1] for name, one in (("", spec), ("bfloat16", rounding))}
    batch = sharding.put(batches("base")[0], programs[""].batch_sharding)
    assert "bf16" not in programs[""].lower_train(batch).as_text()
    assert "bf16" in programs["bfloat16"].lower_train(batch).as_text()
    assert "bf16" not in programs["bfloat16"].lower_evaluate(batch).as_text(), "figures are those of the parameters"
