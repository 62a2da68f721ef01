"""Paella's pipeline on a tiny random model: what must not change does not, at any size, and nothing compiles twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from absl import flags as absl_flags
from flax.core import meta

from muse_jax import edit, specs
from muse_jax.models import paella, vqgan
from muse_jax.sampling.folder import PipelineError
from muse_jax.sampling.paella import PaellaPipeline
from muse_jax.sampling.pipeline import MusePipeline
from muse_jax.text import vocabulary
from muse_jax.training import checkpoint

SIZE, CELL, CODES = 16, 4, 11  # of the pictures, 4x4 tokens of 4 pixels
RED, BLUE = "a red circle", "a blue square"
WORDS = vocabulary.WordVocabulary(["a", "blue", "circle", "red", "square"])
TEXT = {"vocabulary_size": WORDS.size, "layers": 1, "width": 8, "heads": 2, "head_dim": 4, "mlp_width": 8}
MODEL = {"widths": (8, 8), "down_blocks": (1, 1), "up_blocks": (1, 1), "heads": 2, "picture_encoder": True}


def random_params(model, *args):
    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(0), *args)["params"]))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes)


def stage_of(model, task, data, params_of, words=None, sample=None):
    spec = specs.from_config(
        {
            "seed": 0,
            "task": task,
            "model": model,
            "data": {"name": "scenes", "image_size": SIZE, **data},
            "train": {"steps": 1, "batch_size": 1},
            "sample": sample or {},
        }
    )
    return checkpoint.Stage(spec, params_of(spec.model), words, "somewhere", 7)


@pytest.fixture(scope="module")
def pipe():
    coarse = {"channel_multipliers": (1,), "res_blocks": 1, "normalization": "layer", "stem_patch": 4}
    tokenizer = stage_of(
        {"name": "vqgan", "codebook_size": CODES, "code_dim": 4, "channels": 4, **coarse},
        {"name": "tokenizer"},
        {},
        lambda spec: random_params(vqgan.VQGAN(spec), jnp.zeros((1, SIZE, SIZE, 3))),
    )
    tokens, text = jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 6), jnp.int32)
    base = stage_of(
        {"name": "paella", "codebook_size": CODES, "grid": (4, 4), "text": TEXT, **MODEL},
        {"name": "tokens", "tokenizer": "x", "corruption": "noise", "visible_weight": 1.0},
        {"vocabulary": "scenes", "text_length": 6},
        lambda spec: random_params(paella.Paella(spec), tokens, text, text > 0, tokens),
        WORDS.to_json(),
        {"num_inference_steps": 3, "guidance_scale": 3.0, "typical_p": 0.4, "selection_rule": "anywhere"},
    )
    return PaellaPipeline({"tokenizer_low": tokenizer, "base": base}, max_batch_size=4)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def tokens_of(pipe, image):
    return pipe.encode("tokenizer_low", image[None].astype(np.float32))[0]


def test_seeds_are_reproducible_and_a_picture_does_not_depend_on_its_batch(pipe):
    made = pipe([RED, BLUE], seed=3, num_images_per_prompt=2)
    assert made.tokens.shape == (4, 4, 4)
    assert made.tokens.max() < CODES
    np.testing.assert_array_equal(pipe([RED, BLUE], seed=3, num_images_per_prompt=2).tokens, made.tokens)
    np.testing.assert_array_equal(pipe([BLUE] * 4, seed=[4, 4, 5, 6]).tokens[0], made.tokens[3])
    assert len({tokens.tobytes() for tokens in made.tokens}) == 4


@pytest.mark.parametrize(
    ("height", "width"),
    [(20, 28), pytest.param(16, 32, marks=pytest.mark.slow), pytest.param(32, 32, marks=pytest.mark.slow)],
)
def test_any_size_in_one_pass(pipe, height, width):
    made = pipe([RED] * 4, seed=[1, 2, 1, 3], height=height, width=width, output_type="uint8")
    assert made.images.shape == (4, height, width, 3)
    np.testing.assert_array_equal(made.images[0], made.images[2])
    assert (made.images[0] != made.images[1]).any()


def test_inpainting_changes_nothing_outside_the_mask(pipe, picture):
    box = (5, 4, 11, 9)  # touches rows 1 and 2, columns 1 and 2
    made = pipe.inpaint(RED, picture, box, num_images_per_prompt=4, output_type="uint8")
    stays = np.ones((4, 4), bool)
    stays[1:3, 1:3] = False
    for tokens, image in zip(made.tokens, made.images, strict=True):
        np.testing.assert_array_equal(tokens[stays], tokens_of(pipe, picture)[stays])
        pixels = stays.repeat(CELL, 0).repeat(CELL, 1)
        np.testing.assert_array_equal(image[pixels], picture[pixels])
    assert len({tokens.tobytes() for tokens in made.tokens}) > 1


def test_outpainting_keeps_what_is_given(pipe, picture):
    made = pipe.outpaint([RED] * 4, picture, left=8, bottom=4, seed=[1, 2, 3, 4], output_type="uint8")
    assert made.images.shape == (4, 20, 24, 3)
    for tokens, image in zip(made.tokens, made.images, strict=True):
        np.testing.assert_array_equal(image[:16, 8:], picture)
        np.testing.assert_array_equal(tokens[:4, 2:], made.tokens[0][:4, 2:])
    assert len({tokens.tobytes() for tokens in made.tokens}) > 1


def test_strength_0_gives_the_image_back_and_1_ignores_it(pipe, picture):
    kept = pipe.edit([RED] * 4, picture, strength=0, output_type="uint8")
    for image in kept.images:
        np.testing.assert_array_equal(image, picture)
    np.testing.assert_array_equal(kept.tokens[0], tokens_of(pipe, picture))
    fresh = [pipe.edit([RED] * 4, image, strength=1.0, seed=5).tokens for image in (picture, 255 - picture)]
    np.testing.assert_array_equal(fresh[0], fresh[1])
    np.testing.assert_array_equal(fresh[0], pipe([RED] * 4, seed=5).tokens)
    between = [pipe.edit([RED] * 4, image, strength=0.5, seed=5).tokens for image in (picture, 255 - picture)]
    assert (between[0] != between[1]).any()
    masked = pipe.edit([RED] * 4, picture, (0, 0, 8, 16), strength=0.8)
    np.testing.assert_array_equal(masked.tokens[0][:, 2:], tokens_of(pipe, picture)[:, 2:])


def test_a_picture_of_another_size_is_edited_as_it_is(pipe, picture):
    large = np.concatenate([picture, picture[::-1]], axis=1)[:, :28]  # 16 x 28
    kept = pipe.edit([RED] * 4, large, strength=0, resize=False, output_type="uint8")
    np.testing.assert_array_equal(kept.images, np.stack([large] * 4))
    made = pipe.inpaint([RED] * 4, large, (20, 0, 28, 8), resize=False, seed=[1, 2, 3, 4], output_type="uint8").images
    stays = np.ones((16, 28), bool)
    stays[:8, 20:] = False
    np.testing.assert_array_equal(made[:, stays], np.stack([large[stays]] * 4))
    assert (made != large).any()
    more = pipe.outpaint([RED] * 4, large, bottom=3, resize=False, output_type="uint8").images
    assert more.shape == (4, 19, 28, 3)
    np.testing.assert_array_equal(more[:, :16], np.stack([large] * 4))


def test_interpolation_between_equal_prompts_is_that_prompt(pipe):
    equal = pipe.interpolate([RED, RED], 4, seed=2)
    plain = pipe([RED] * 4, seed=[2] * 4)
    np.testing.assert_array_equal(equal.tokens, plain.tokens)
    way = pipe.interpolate([RED, BLUE], 4, seed=2)
    np.testing.assert_array_equal(way.tokens[0], plain.tokens[0])
    np.testing.assert_array_equal(way.tokens[-1], pipe([BLUE] * 4, seed=[2] * 4).tokens[0])


def test_a_prompt_for_every_region(pipe):
    equal = pipe.compose([RED, RED], num_images_per_prompt=4, seed=3)
    plain = pipe([RED], num_images_per_prompt=4, seed=3)
    np.testing.assert_array_equal(equal.tokens, plain.tokens)
    columns = pipe.compose([RED, BLUE], num_images_per_prompt=4, seed=3)
    boxes = pipe.compose([RED, BLUE], [(0, 0, 8, 16), (8, 0, 16, 16)], num_images_per_prompt=4, seed=3)
    np.testing.assert_array_equal(columns.tokens, boxes.tokens)
    turned = pipe.compose([BLUE, RED], num_images_per_prompt=4, seed=3)
    assert (columns.tokens != turned.tokens).any()


def test_variations_follow_the_picture(pipe, picture):
    one, again = (pipe.variations(picture, seed=1).tokens for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert one.shape == (4, 4, 4)
    assert (one != pipe.variations(255 - picture, seed=1).tokens).any()


def test_guidance_where_it_is_off_by_default(pipe, picture, without_guidance, compiled):
    plain = PaellaPipeline(pipe.stages | {"base": without_guidance(pipe.stages["base"])}, max_batch_size=4)

    def calls(pipe, scale):
        made = (
            pipe([RED] * 4, "a circle" if scale != 1 else "", seed=1, guidance_scale=scale),
            pipe.interpolate([RED, BLUE], 4, seed=1, guidance_scale=scale),
            pipe.variations(picture, seed=1, guidance_scale=scale),
        )
        return np.stack([x.tokens for x in made])

    off = calls(plain, 1.0)
    compiled.clear()
    on = calls(plain, 3.0)
    assert not compiled
    assert (on != off).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(on, calls(pipe, 3.0))
    np.testing.assert_array_equal(off, calls(pipe, 1.0))


def test_new_values_compile_nothing(pipe, picture, compiled):
    def calls(prompt, seed, scale, strength, box):
        pipe([prompt] * 4, seed=seed, guidance_scale=scale, typical_p=scale / 10)
        pipe.inpaint([prompt] * 4, picture, box, seed=seed, guidance_scale=scale)
        pipe.edit([prompt] * 4, picture, strength=strength, seed=seed, guidance_scale=scale)
        pipe.interpolate([prompt, BLUE], 4, seed=seed, guidance_scale=scale)

    calls(RED, 0, 3.0, 0.5, (0, 0, 8, 8))
    del compiled[:]
    calls("a blue circle", 9, 5.0, 0.9, (3, 5, 16, 16))
    calls("a blue circle", 9, 1.0, 0.9, (3, 5, 16, 16))
    assert not compiled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe.edit(RED, image, strength=1.5), "strength is 1.5"),
        (lambda pipe, image: pipe(RED, height=18), "height is 18; expected a multiple of 4"),
        (lambda pipe, image: pipe(RED, width=8), "smallest pictures have 16"),
        (lambda pipe, image: pipe.interpolate([RED], 4), "between 2 prompts"),
        (lambda pipe, image: pipe.interpolate([RED, BLUE], 1), "num_pictures is 1"),
        (lambda pipe, image: pipe.compose([RED]), "give two or more"),
        (lambda pipe, image: pipe.compose([RED, BLUE], [(0, 0, 8, 8)]), "one for each prompt"),
        (lambda pipe, image: pipe.compose([RED, BLUE], [(0, 0, 8, 8), (0, 0, 99, 8)]), "doesn't lie within"),
        (lambda pipe, image: pipe.outpaint(RED, image[:, :15], left=3, resize=False), "multiples of 4"),
        (lambda pipe, image: pipe(RED, typical_p=0.0), "typical_p is 0"),
    ],
)
def test_what_cannot_work_is_refused(pipe, picture, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, picture)


def test_variations_need_an_encoder_of_pictures(pipe, picture):
    base = pipe.stages["base"]
    model = dataclasses.replace(base.spec.model, picture_encoder=False)
    params = {name: value for name, value in base.params.items() if not name.startswith("picture")}
    stage = dataclasses.replace(base, spec=dataclasses.replace(base.spec, model=model), params=params)
    with pytest.raises(PipelineError, match="picture_encoder=True"):
        PaellaPipeline({**pipe.stages, "base": stage}).variations(picture)


def test_variations_by_the_command(pipe, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save("pipeline")
    PIL.Image.fromarray(picture).save("picture.png")
    values = absl_flags.FlagValues()
    edit.define_flags(values)
    flags = ["--image=picture.png", "--variations", "--num_images_per_prompt=4"]
    values(["edit", "--pipeline=pipeline", "--batch_size=4", *flags])
    record = edit.edit(values)
    assert len({made["file"] for made in record["pictures"]}) == 4
    for made in record["pictures"]:
        with PIL.Image.open(tmp_path / "edits" / made["file"]) as image:
            assert image.size == (SIZE, SIZE)
    assert (tmp_path / "edits" / "grid.png").is_file()


def test_a_folder_opens_as_what_it_is(pipe, tmp_path):
    pipe.save(tmp_path / "pipeline")
    opened = MusePipeline.load(tmp_path / "pipeline", max_batch_size=4)
    assert isinstance(opened, PaellaPipeline)
    np.testing.assert_array_equal(opened([RED] * 4).tokens, pipe([RED] * 4).tokens)
