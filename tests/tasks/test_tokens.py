"""The mistakes that cost weeks: each test here fails when a sign is flipped."""

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
from muse_jax.tasks import losses

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "scenes"
BATCH = 8


def tiny(stage, **task):
    spec = importlib.util.spec_from_file_location("config", CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.task.update(task)
    return specs.from_config(config)


@dataclasses.dataclass(frozen=True)
class FakeStage:
    spec: specs.Spec
    params: dict
    path: str = "somewhere"


@functools.cache
def tokenizer_stage(name):
    """A tokenizer with random parameters."""
    spec = tiny(name)
    size = spec.data.image_size
    variables = jax.jit(vqgan.VQGAN(spec.model).init)(jax.random.key(1), jnp.zeros((1, size, size, 3)))
    return FakeStage(spec, nn.unbox(variables["params"]))


def build(stage, **task):
    return compiled(
        stages.build_task(tiny(stage, **task), lambda path: tokenizer_stage(path.removeprefix("pretrained:")))
    )


def compiled(task):
    """The task with its functions jitted: one by one, their operations take minutes to compile."""
    for name in ("init", "tokens", "corrupt", "grads", "evaluate", "_logits"):
        setattr(task, name, jax.jit(getattr(task, name)))
    return task


@pytest.fixture(scope="module")
def base():
    return build("base")


@pytest.fixture(scope="module")
def superres():
    return build("superres")


@pytest.fixture(scope="module")
def paella():
    spec = tiny("paella")
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, codebook_size=32))
    return compiled(stages.build_task(spec, lambda path: tokenizer_stage("tokenizer_low")))


@pytest.fixture(scope="module")
def params(base):
    return random_params(base)


def random_params(task):
    return nn.unbox(task.init(jax.random.key(0)))


def make_batch(task, count=BATCH):
    spec = task.spec
    loader = data.make_loader(
        spec.data, batch_size=count, seed=0, vocabulary=data.make_vocabulary(spec.data), split="train"
    )
    batch = next(loader)
    loader.close()
    return jax.tree.map(jnp.asarray, dict(batch))


def corrupted(task, batch, seed=0):
    tokens, low = task.tokens(task.frozen(), batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch["example_id"])
    return tokens, low, task.corrupt(keys, tokens, batch["text_mask"], low)


def test_masked_places_carry_the_mask_id_and_others_their_token(base):
    batch = make_batch(base)
    tokens, _, seen = corrupted(base, batch)
    assert jnp.array_equal(seen.tokens == base.spec.model.codebook_size, seen.mask)
    assert jnp.array_equal(jnp.where(seen.mask, tokens, seen.tokens), tokens)
    assert bool(seen.mask.any(axis=1).all())


def test_micro_batches_drop_out_other_units(base, params):
    """They share the step's key. Where everything is masked, dropout is all in which examples that are alike differ."""
    everything = dataclasses.replace(base.spec.task, min_mask_ratio=1.0, text_dropout=0.0)
    example = jax.tree.map(lambda x: x[:1], make_batch(base))
    for dropout in (0.0, 0.5):
        model = dataclasses.replace(base.spec.model, dropout=dropout)
        spec = dataclasses.replace(base.spec, task=everything, model=model)
        task = stages.build_task(spec, lambda path: tokenizer_stage("tokenizer_low"))
        loss = jax.jit(task._loss)
        first, other = (
            float(loss(params, task.frozen(), {**example, "example_id": jnp.array([i])}, jax.random.key(0))[0])
            for i in (1, 2)
        )
        assert (first == other) == (dropout == 0)


def test_no_gradient_comes_from_places_that_are_not_scored(base, params):
    """The loss is blind to what stands at visible places: their labels may be anything."""
    batch = make_batch(base)
    tokens, _, seen = corrupted(base, batch)

    def loss(logits):
        weights = jnp.where(seen.mask, 1.0, base.spec.task.visible_weight)
        return jnp.mean(losses.weighted_example_mean(losses.cross_entropy(logits, tokens), weights))

    logits = base._logits(params, base.frozen(), seen, batch, None)
    by_logits = jnp.abs(jax.grad(loss)(logits)).max(axis=-1)
    assert float(jnp.where(seen.mask, 0, by_logits).max()) == 0
    assert float(jnp.where(seen.mask, by_logits, 1).min()) > 0


def test_the_loss_is_the_mean_over_masked_places(base, params):
    batch = make_batch(base)
    key = jax.random.key(0)
    _, metrics, _ = base.grads(params, base.frozen(), batch, key, jnp.int32(0))
    tokens, _, seen = corrupted(base, batch)
    logits = np.asarray(base._logits(params, base.frozen(), seen, batch, None), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1)[..., 0]
    mask = np.asarray(seen.mask)
    expected = np.mean([nll[i][mask[i]].mean() for i in range(BATCH)])
    assert float(metrics["loss"].value()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", ["base", "superres"])
def test_padded_text_changes_nothing(stage, base, superres):
    task = {"base": base, "superres": superres}[stage]
    batch = make_batch(task)
    params = random_params(task)
    assert not bool(batch["text_mask"].all()), "some text must be padded for this to mean anything"
    noise = jax.random.randint(jax.random.key(1), batch["text_ids"].shape, 1, 40)
    other = {**batch, "text_ids": jnp.where(batch["text_mask"], batch["text_ids"], noise)}
    one, two = (task.grads(params, task.frozen(), b, jax.random.key(0), jnp.int32(0)) for b in (batch, other))
    assert float(one[1]["loss"].value()) == float(two[1]["loss"].value())
    # Not so where the text can be seen.
    spoilt = {**batch, "text_ids": jnp.where(batch["text_mask"], noise, 0)}
    three = task.grads(params, task.frozen(), spoilt, jax.random.key(0), jnp.int32(0))
    assert float(three[1]["loss"].value()) != float(one[1]["loss"].value())


def test_a_dropped_prompt_is_no_prompt(base, params):
    batch = make_batch(base)
    nothing = jnp.zeros_like(batch["text_mask"])
    _, _, seen = corrupted(base, batch)
    hidden = base._logits(params, base.frozen(), seen._replace(text_mask=nothing), batch, None)
    other = {**batch, "text_ids": batch["text_ids"][::-1], "text_mask": batch["text_mask"][::-1]}
    assert jnp.array_equal(hidden, base._logits(params, base.frozen(), seen._replace(text_mask=nothing), other, None))


def test_all_prompts_dropped_gives_text_no_gradient():
    task = build("base", text_dropout=1.0)
    params = random_params(task)
    grads, _, _ = task.grads(params, task.frozen(), make_batch(task), jax.random.key(0), jnp.int32(0))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["text_encoder"])) == 0
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["stack"])) > 0


def test_an_examples_corruption_does_not_depend_on_its_batch(base):
    batch = make_batch(base)
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    one, two = corrupted(base, batch)[2], corrupted(base, swapped)[2]
    assert jnp.array_equal(one.mask, two.mask[::-1])
    assert jnp.array_equal(one.text_mask, two.text_mask[::-1])


def test_precomputed_tokens_and_embeddings_give_the_same_loss(superres):
    batch = make_batch(superres)
    params = random_params(superres)
    tokens, low = superres.tokens(superres.frozen(), batch)
    embeddings = superres.model.apply({"params": params}, batch["text_ids"], batch["text_mask"], method="encode_text")
    ready = {k: v for k, v in batch.items() if k not in ("image", "text_ids")}
    ready |= {"high_tokens": tokens, "low_tokens": low, "text_embeddings": embeddings}
    one, two = (superres.grads(params, superres.frozen(), b, jax.random.key(0), jnp.int32(0)) for b in (batch, ready))
    assert float(one[1]["loss"].value()) == pytest.approx(float(two[1]["loss"].value()), rel=1e-6)


def test_low_resolution_tokens_are_those_of_the_decimated_picture(superres):
    batch = make_batch(superres)
    _, low = superres.tokens(superres.frozen(), batch)
    pictures = np.asarray(batch["image"], np.float32).reshape(BATCH, 32, 2, 32, 2, 3).mean((2, 4))
    tokenizer = vqgan.VQGAN(superres.tokenizers["low_tokenizer"].spec)
    variables = {"params": superres.frozen()["low_tokenizer"]}
    expected = jax.jit(functools.partial(tokenizer.apply, method="tokens"))(
        variables, vqgan.to_unit(jnp.asarray(pictures))
    )
    assert jnp.mean(expected.reshape(BATCH, -1) == low) > 0.98


def test_evaluation_scores_fixed_ratios(base, params):
    metrics = base.evaluate(params, base.frozen(), make_batch(base), jax.random.key(0))
    at_ratio = [float(metrics[f"loss/ratio_{r}"].value()) for r in ("0.25", "0.50", "0.75", "1.00")]
    assert float(metrics["loss"].value()) == pytest.approx(np.mean(at_ratio), rel=1e-5)


@pytest.mark.parametrize("stage", ["base", "superres"])
def test_samples_are_pictures_beside_the_true_ones(stage, base, superres):
    task = {"base": base, "superres": superres}[stage]
    size = task.spec.data.image_size
    samples = jax.jit(task.samples)
    pictures = samples(random_params(task), task.frozen(), make_batch(task), jax.random.key(0))["samples"]
    assert pictures.shape == (BATCH, 2 * size, size, 3)
    assert pictures.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"grid": (4, 4)}}, "grid"),
        ({"model": {"codebook_size": 16}}, "codebook_size"),
        ({"task": {"mask_schedule": "cosin"}}, "mask_schedule"),
        ({"sample": {"schedule": "cosin"}}, "sample: .*schedule.*'cosin'"),
        ({"sample": {"guidance_ramp": "steep"}}, "sample: guidance_ramp"),
        ({"sample": {"top_p": 1.5}}, "sample: top_p"),
    ],
)
def test_misfits_are_refused_before_anything_compiles(change, named):
    spec = tiny("base")
    for section, values in change.items():
        spec = dataclasses.replace(spec, **{section: dataclasses.replace(getattr(spec, section), **values)})
    with pytest.raises(specs.SpecError, match=named):
        stages.build_task(spec, lambda path: tokenizer_stage("tokenizer_low"))


def test_a_base_model_is_no_tokenizer():
    with pytest.raises(specs.SpecError, match="name a tokenizer"):
        stages.build_task(tiny("base"), lambda path: FakeStage(tiny("base"), {}))


def test_paella_sees_noise_where_others_see_the_mask(paella):
    batch = make_batch(paella, 64)
    tokens, _, seen = corrupted(paella, batch)
    codes = paella.spec.model.codebook_size
    assert jnp.array_equal(jnp.where(seen.mask, tokens, seen.tokens), tokens)
    assert 0 <= int(seen.tokens.min()) <= int(seen.tokens.max()) < codes
    noise = np.asarray(seen.tokens)[np.asarray(seen.mask)]
    counts = np.bincount(noise, minlength=codes)
    assert counts.max() < 1.5 * counts.mean(), "all codes are equally likely"
    expected = np.ceil(np.cos(np.pi / 2 * np.asarray(seen.t)) * paella.places)
    np.testing.assert_allclose(np.asarray(seen.mask).sum(1), expected, atol=1)
    shown = np.asarray(seen.low_tokens != codes).any(1)
    assert 0 < shown.mean() < 0.3
    assert not np.asarray(seen.text_mask)[shown].any(), "a picture takes the text's place"
    np.testing.assert_array_equal(np.asarray(seen.low_tokens)[shown], np.asarray(tokens)[shown])


def test_paella_learns_and_draws_by_the_same_task(paella):
    batch, params = make_batch(paella), random_params(paella)
    grads, metrics, _ = paella.grads(params, paella.frozen(), batch, jax.random.key(0), jnp.int32(0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["unet"]["join0"]["in"]["kernel"]).max()) > 0
    assert float(jnp.abs(grads["text_encoder"]["token_embedder"]["embedding"]).max()) > 0
    assert float(metrics["loss"].value()) < 2 * np.log(paella.spec.model.codebook_size)
    assert np.isfinite(float(paella.evaluate(params, paella.frozen(), batch, jax.random.key(0))["loss"].value()))
    pictures = jax.jit(paella.samples)(params, paella.frozen(), batch, jax.random.key(0))["samples"]
    assert pictures.shape == (BATCH, 64, 32, 3)


@pytest.mark.slow
def test_super_resolution_needs_the_low_resolution_tokens():
    """After some training, the held-out loss rises by at least a fifth when they are shuffled."""
    import optax

    task = build("superres", low_corruption=0.0)
    params, frozen = random_params(task), task.frozen()
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)
    spec = task.spec
    loader = data.make_loader(
        spec.data, batch_size=16, seed=0, vocabulary=data.make_vocabulary(spec.data), split="train"
    )

    @jax.jit
    def step(params, state, batch, number):
        grads, _, _ = task.grads(params, frozen, batch, jax.random.fold_in(jax.random.key(0), number), number)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    for number in range(250):
        params, state = step(params, state, jax.tree.map(jnp.asarray, dict(next(loader))), jnp.int32(number))
    held_out = jax.tree.map(jnp.asarray, dict(next(loader)))  # a batch not trained on
    loader.close()
    tokens, low = task.tokens(frozen, held_out)
    right, shuffled = (
        float(
            task.evaluate(params, frozen, {**held_out, "high_tokens": tokens, "low_tokens": seen}, jax.random.key(5))[
                "loss"
            ].value()
        )
        for seen in (low, jnp.roll(low, 1, axis=0))
    )
    assert shuffled > 1.2 * right, (right, shuffled)
