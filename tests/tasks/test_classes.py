"""The task of tokens on classes: what it learns from is the batch's label."""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import data, specs, stages, train
from muse_jax.training import checkpoint

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "scenes" / "maskgit.py"


def tiny(**task):
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.task.update(task)
    return specs.from_config(config)


@pytest.fixture(scope="module")
def task():
    return stages.build_task(tiny(text_dropout=0.5), checkpoint.load_stage)


@pytest.fixture(scope="module")
def state(task):
    """(parameters, a batch, jitted gradients)."""
    loader = data.make_loader(task.spec.data, batch_size=8, seed=0)
    batch = jax.tree.map(jnp.asarray, dict(next(loader)))
    loader.close()
    return nn.unbox(jax.jit(task.init)(jax.random.key(0))), batch, jax.jit(task.grads)


def test_a_batch_has_labels_and_no_text(state):
    assert set(state[1]) == {"example_id", "image", "label"}


def test_the_rows_of_the_batchs_classes_learn_and_that_of_no_class(task, state):
    params, batch, grads = state
    found, metrics, _ = grads(params, task.frozen(), batch, jax.random.key(0), jnp.int32(0))
    moved = np.abs(np.asarray(found["classes"])).max(axis=-1) > 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["example_id"])
    ids = np.asarray(batch["label"])[:, None] + 1
    tokens = jnp.zeros((8, task.places), jnp.int32)
    shown = np.asarray(task.corrupt(keys, tokens, jnp.asarray(ids > 0), None).text_mask)[:, 0]
    assert 0 < shown.sum() < 8, "some are dropped, some are not"
    expected = np.zeros(25, bool)
    expected[np.where(shown, ids[:, 0], 0)] = True
    np.testing.assert_array_equal(moved, expected)
    assert np.isfinite(float(metrics["loss"].value()))
    assert task.labels(params)["classes"] == "embeddings"


def test_unlabelled_pictures_are_of_no_class(task):
    batch = task.conditioned({"label": jnp.array([-1, 0, 23])})
    assert batch["text_ids"].tolist() == [[0], [1], [24]]
    assert batch["text_mask"].tolist() == [[False], [True], [True]]


def test_samples_are_pictures_of_the_batchs_classes(task, state):
    params, batch, _ = state
    pictures = jax.jit(task.samples)(params, task.frozen(), batch, jax.random.key(0))["samples"]
    assert pictures.shape == (8, 2 * 32, 32, 3)


def test_a_config_with_another_number_of_classes_than_the_data_is_refused(task):
    vocabulary = data.make_vocabulary(task.spec.data)
    train.check_vocabulary(task.spec, vocabulary)
    wrong = specs.to_config(task.spec)
    wrong["model"]["classes"] = 10
    with pytest.raises(specs.SpecError, match="model.classes is 10, but the data have 24 classes"):
        train.check_vocabulary(specs.from_config(wrong), vocabulary)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("data", "vocabulary", "scenes", "data.vocabulary is 'scenes'"),
        ("data", "text_length", 5, "data.text_length 5"),
        ("model", "classes", 0, "model.classes is 0"),
        ("model", "heads", 5, "model.width 32 is not a multiple of model.heads 5"),
    ],
)
def test_configs_that_do_not_fit_are_named(task, section, key, value, named):
    config = specs.to_config(task.spec)
    config[section][key] = value
    with pytest.raises(specs.SpecError, match=named):
        specs.from_config(config)


def test_classes_need_a_model_of_classes():
    spec = importlib.util.spec_from_file_location("config", CONFIG.with_name("base.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny").to_dict()
    config["data"]["vocabulary"] = "classes"
    with pytest.raises(specs.SpecError, match="use model.name='maskgit'"):
        specs.from_config(config)
