"""The tokenizer's losses, its two optimizers, the revival of codes and decoder fine-tuning."""

import dataclasses
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import specs, stages
from muse_jax.data import scenes
from muse_jax.models import vqgan
from muse_jax.tasks import losses

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "scenes"


def tiny(stage, model=None, **task):
    spec = importlib.util.spec_from_file_location("config", CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.task.update(task)
    config.model.update(model or {})
    return specs.from_config(config)


@dataclasses.dataclass(frozen=True)
class FakeStage:
    spec: specs.Spec
    params: dict
    path: str = "somewhere"


def no_stage(path):
    raise AssertionError(f"no earlier stage is needed, but {path!r} was asked for")


def build(spec, load_stage=no_stage):
    """The task with its functions jitted: one by one, their operations take minutes to compile."""
    task = stages.build_task(spec, load_stage)
    for name in ("init", "grads"):
        setattr(task, name, jax.jit(getattr(task, name)))
    return task


def random_params(task):
    return nn.unbox(task.init(jax.random.key(0)))


@pytest.mark.parametrize(("content", "said"), [(None, "There is no"), (b"xxxx", "no safetensors file")])
def test_lpips_weights_that_cannot_be_read_name_the_mend(tmp_path, content, said):
    path = tmp_path / "lpips.safetensors"
    if content is not None:
        path.write_bytes(content)
    spec = tiny("tokenizer_low", perceptual=0.1, perceptual_weights=str(path))
    with pytest.raises(specs.SpecError) as error:
        stages.build_task(spec, no_stage)
    for word in ("task.perceptual_weights", str(path), said, "third_party/README.md", "task.perceptual=0"):
        assert word in str(error.value)


@pytest.fixture(scope="module")
def trained():
    """A high-resolution tokenizer's stage, with random parameters."""
    task = build(tiny("tokenizer_high"))
    return FakeStage(task.spec, random_params(task))


@pytest.fixture(scope="module")
def decoder(trained):
    return build(tiny("decoder"), lambda path: trained)


def batch(size, count=4):
    items = scenes.scenes(range(count))
    return {"example_id": jnp.arange(count), "image": jnp.asarray(scenes.render_batch(items, size))}


def test_gradients_are_those_of_the_written_loss():
    """The shared forward pass against one plain function of the parameters, differentiated by JAX."""
    task = build(tiny("tokenizer_low", adversarial=0.1, adaptive_weight=False))
    params, data = random_params(task), batch(32)
    images = vqgan.to_unit(data["image"])

    def generator_loss(generator):
        output, quantized = task.model.apply({"params": generator}, images)
        spec = task.spec.task
        pixels = jnp.mean(jnp.abs(output - images)) + jnp.mean(jnp.square(output - images))
        fake = task.discriminator.apply({"params": params["discriminator"]}, output)
        return (
            pixels
            + spec.codebook * jnp.mean(quantized.codebook_loss)
            + spec.commitment * jnp.mean(quantized.commitment_loss)
            - 0.1 * jnp.mean(fake)
        )

    def discriminator_loss(discriminator):
        output, _ = task.model.apply({"params": generator}, images)
        real, fake = (task.discriminator.apply({"params": discriminator}, x) for x in (images, output))
        return losses.hinge_discriminator(real, fake)

    generator = {name: params[name] for name in ("encoder", "quantizer", "decoder")}
    expected = jax.jit(jax.grad(generator_loss))(generator) | {
        "discriminator": jax.jit(jax.grad(discriminator_loss))(params["discriminator"])
    }
    grads, metrics, _ = task.grads(params, {}, data, jax.random.key(0), jnp.int32(5))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for name in expected:
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    assert set(metrics) >= {"loss", "psnr", "codebook_used", "perplexity", "token_entropy", "adversarial"}


def test_the_adversarial_term_waits_for_its_step_and_the_discriminator_for_its_own():
    spec = tiny("tokenizer_low", adversarial=1.0, adversarial_start=10, adversarial_warmup=4, adaptive_weight=False)
    task, plain = build(spec), build(tiny("tokenizer_low"))
    params, data, key = random_params(task), batch(32), jax.random.key(0)
    generator = {name: params[name] for name in ("encoder", "quantizer", "decoder")}
    without = plain.grads(generator, {}, data, key, jnp.int32(0))[0]["decoder"]

    def at(step):
        grads = task.grads(params, {}, data, key, jnp.int32(step))[0]
        same = jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-6)), grads["decoder"], without))
        learns = any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads["discriminator"]))
        return same, learns

    assert [at(step) for step in (5, 6, 9, 10)] == [(True, False), (True, True), (True, True), (False, True)]


def test_the_adaptive_weight_makes_the_two_gradients_equally_long_at_the_last_layer():
    task = build(tiny("tokenizer_low", adversarial=1.0))
    params, data, key = random_params(task), batch(32), jax.random.key(0)
    last = {}
    for weight in (1e-9, 1.0):  # without and with the adversarial term
        spec = dataclasses.replace(task.spec, task=dataclasses.replace(task.spec.task, adversarial=weight))
        grads = build(spec).grads(params, {}, data, key, jnp.int32(0))[0]
        last[weight] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads["decoder"]["pixels"])])
    adversarial = last[1.0] - last[1e-9]
    assert np.linalg.norm(adversarial) == pytest.approx(np.linalg.norm(last[1e-9]), rel=0.02)


def test_dead_codes_come_back_where_the_error_is():
    task = build(tiny("tokenizer_low", revive_after=3))
    params, data = random_params(task), batch(32)
    _, _, extras = task.grads(params, {}, data, jax.random.key(0), jnp.int32(0))
    unused = extras["used"] == 0
    assert bool(unused.any())
    quantizer = {**params["quantizer"], "unused": jnp.where(unused, 2.0, 0.0)}
    after = task.after_update({**params, "quantizer": quantizer}, extras, jax.random.key(0), jnp.int32(0))["quantizer"]
    moved = jnp.any(after["codebook"] != quantizer["codebook"], axis=1)
    assert bool(jnp.all(jnp.where(moved, unused, True))), "codes in use stay"
    assert int(moved.sum()) == min(int(unused.sum()), extras["candidates"].shape[0])
    assert float(jnp.where(moved, after["unused"], 0).max()) == 0


def test_micro_batches_count_codes_together_and_keep_the_worst_latents():
    task = build(tiny("tokenizer_low", revive_after=3))
    params, data = random_params(task), batch(32)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], data) for i in range(2)]
    whole, *parts = (task.grads(params, {}, each, jax.random.key(0), 0)[2] for each in (data, *halves))
    merged = task.merge(*parts)
    assert jnp.array_equal(merged["used"], whole["used"])
    assert merged["candidates"].shape == whole["candidates"].shape
    scores = jnp.sort(jnp.concatenate([part["score"] for part in parts]))[::-1]
    assert jnp.array_equal(merged["score"], scores[: merged["score"].size])


def test_labels_send_each_parameter_to_one_optimizer(decoder):
    task = build(tiny("tokenizer_low", adversarial=0.1))
    labels = task.labels(random_params(task))
    assert set(jax.tree.leaves(labels["discriminator"])) == {"discriminator"}
    assert labels["quantizer"] == {"codebook": "generator", "unused": "frozen"}
    fine = decoder.labels(random_params(decoder))
    assert set(jax.tree.leaves([fine["encoder"], fine["quantizer"]])) == {"frozen"}
    assert set(jax.tree.leaves(fine["decoder"])) == {"generator"}


def test_fine_tuning_starts_from_the_trained_encoder_and_codebook(decoder, trained):
    params = random_params(decoder)
    for name in ("encoder", "quantizer"):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params[name], trained.params[name]))
    assert decoder.grads(params, {}, batch(64), jax.random.key(0), jnp.int32(0))[2] is None, "no code is revived"


def test_a_decoder_with_more_blocks_starts_as_the_one_it_was(decoder, trained):
    params = random_params(decoder)
    blocks = [name for name in params["decoder"] if "block" in name]
    assert len(blocks) > len([name for name in trained.params["decoder"] if "block" in name])
    images = vqgan.to_unit(batch(64)["image"])
    before = vqgan.VQGAN(trained.spec.model).apply({"params": trained.params}, images)[0]
    generator = {name: params[name] for name in ("encoder", "quantizer", "decoder")}
    np.testing.assert_allclose(decoder.model.apply({"params": generator}, images)[0], before, atol=1e-5)


def test_fine_tuning_another_tokenizer_is_refused_with_the_parameter(trained):
    spec = tiny("decoder", model={"codebook_size": 64})
    with pytest.raises(specs.SpecError, match=r"quantizer.*codebook"):
        build(spec, lambda path: trained)


def test_samples_show_pictures_above_their_reconstructions():
    task = build(tiny("tokenizer_low"))
    data = batch(32)
    shown = jax.jit(task.samples)(random_params(task), {}, data, jax.random.key(0))["reconstructions"]
    assert shown.shape == (4, 64, 32, 3)
    assert np.array_equal(shown[:, :32], np.asarray(data["image"]))
