"""A pipeline of one resolution whose prompts are classes (MaskGIT): its calls, its editing, its folder."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from muse_jax import specs
from muse_jax.models import predictors
from muse_jax.sampling.pipeline import MusePipeline, PipelineError
from muse_jax.text import vocabulary
from muse_jax.training import checkpoint

NAMES = vocabulary.ClassVocabulary(["red circle", "blue square", "green cross"])
ROWS = COLUMNS = 4
SIZE, CODES = 16, 11


@pytest.fixture(scope="module")
def base() -> checkpoint.Stage:
    spec = specs.from_config(
        {
            "seed": 0,
            "task": {"name": "tokens", "tokenizer": "x"},
            "model": {
                "name": "maskgit",
                "codebook_size": CODES,
                "grid": (ROWS, COLUMNS),
                "classes": 3,
                "layers": 2,
                "width": 16,
                "heads": 2,
                "mlp_width": 16,
            },
            "data": {"name": "scenes", "image_size": SIZE, "vocabulary": "classes"},
            "train": {"steps": 1, "batch_size": 1},
            "sample": {"num_inference_steps": 3, "guidance_scale": 3.0},
        }
    )
    ids = jnp.ones((1, 1), jnp.int32)
    init = partial(predictors.from_spec(spec.model).init, jax.random.key(0))
    shapes = jax.eval_shape(lambda: meta.unbox(init(jnp.zeros((1, ROWS * COLUMNS), jnp.int32), ids, ids > 0)["params"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.4).astype(np.float32), shapes)
    return checkpoint.Stage(spec, params, NAMES.to_json(), "somewhere/base", 7)


@pytest.fixture(scope="module")
def pipe(base, tiny) -> MusePipeline:
    return MusePipeline({"base": base, "tokenizer_low": tiny.stages["tokenizer_low"]}, max_batch_size=4)


def tokens(pipe, *args, **settings):
    return pipe(*args, output_type="latent", **settings).images


def test_one_resolution(pipe):
    output = pipe(class_label=["red circle", "blue square", ""], output_type="uint8", history=True)
    assert pipe.image_size == pipe.low_image_size == SIZE
    assert output.images.shape == (3, SIZE, SIZE, 3)
    assert output.tokens.max() < CODES
    np.testing.assert_array_equal(output.images, output.low_images)
    np.testing.assert_array_equal(output.images, output.high_images)
    frames = output.decoding(1)
    assert list(frames) == ["base"]
    np.testing.assert_array_equal(frames["base"].images[-1], output.images[1])
    assert output.prompts == ("red circle", "blue square", "")


def test_matches_the_model_called_by_hand(pipe, base):
    """One step, no noise: the argmax of u + s (c - u), of the class and of no class or another one."""
    apply = jax.jit(predictors.from_spec(base.spec.model).apply)
    blank = jnp.full((1, ROWS * COLUMNS), CODES)
    settings = {"guidance_scale": 30.0, "num_inference_steps": 1, "token_temperature": 0.0}
    found = []
    for negative, other in ((None, 0), ("green cross", 3)):
        conditional, unconditional = (
            apply({"params": base.params}, blank, jnp.full((1, 1), i), jnp.full((1, 1), i > 0)) for i in (2, other)
        )
        expected = jnp.argmax(unconditional + 30.0 * (conditional - unconditional), axis=-1)
        made = tokens(pipe, "blue square", negative, num_images_per_prompt=3, **settings)
        np.testing.assert_array_equal(made.reshape(3, -1), np.broadcast_to(expected, (3, ROWS * COLUMNS)))
        found.append(expected)
    assert not np.array_equal(*found), "what is moved away from matters"


def test_a_class_by_its_name_or_number(pipe):
    made = [
        tokens(pipe, **{word: label}, num_images_per_prompt=3, seed=5)
        for word, label in (
            ("class_label", "blue square"),
            ("class_label", 1),
            ("class_label", " Blue_SQUARE "),
            ("class_label", "1"),
            ("prompt", np.int64(1)),
            ("prompt", ["blue square"]),
        )
    ]
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])
    far = {
        "guidance_scale": 30.0,
        "num_images_per_prompt": 3,
        "seed": 5,
    }  # with random parameters classes differ little
    by_class = [tokens(pipe, class_label=label, **far) for label in (0, 1, 2, "")]
    assert len({made.tobytes() for made in by_class}) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_label": "red dog"}, "Unknown class 'red dog'.*red circle, blue square, green cross"),
        ({"class_label": ["red circle", 3]}, "Unknown class 3; classes have the numbers 0 to 2"),
        ({"prompt": "a red circle", "seed": 1}, "Unknown class 'a red circle'. Did you mean 'red circle'"),
        ({"class_label": "red circle", "negative_prompt": "x"}, "Unknown class 'x'"),
        ({}, "give a prompt or a class_label"),
        ({"prompt": 1, "class_label": 1}, "not both"),
    ],
)
def test_what_is_no_class_is_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_texts_have_no_classes_and_one_resolution_no_super_resolution(pipe, pipeline):
    with pytest.raises(ValueError, match="conditioned on text; give a prompt"):
        pipeline(class_label=1)
    with pytest.raises(TypeError, match="superres_top_k is given, but this pipeline has no super-resolution"):
        pipe(class_label=1, superres_top_k=3)
    with pytest.raises(TypeError, match="remasking is 'much'; expected a number"):
        pipe(class_label=1, remasking="much")
    with pytest.raises(TypeError, match=r"selection_rule is \['remask'\]; expected a name"):
        pipe(class_label=1, selection_rule=["remask"])


def test_another_class_seed_or_guidance_compiles_nothing(pipe, compiled):
    def call(labels, **settings):
        return pipe(class_label=labels, output_type="np", **settings).images

    call([0, 1, 2])
    compiled.clear()
    call(["", 2, 2], seed=99, guidance_scale=9.5, guidance_start=0.3, guidance_ramp="power_cosine", schedule="linear")
    call([2, 1, 0, 0], negative_prompt=1, choice_temperature=1.0, guidance_power=4.0)
    call([1, 1, 0], guidance_scale=1.0)
    assert compiled == []


@pytest.mark.parametrize("rule", ["halton", "remask", "revocable"])
def test_samplers_of_a_call(pipe, rule):
    plain = tokens(pipe, class_label=[0, 1, 2], seed=[1, 2, 3])
    made = tokens(pipe, class_label=[0, 1, 2], seed=[1, 2, 3], selection_rule=rule)
    assert made.max() < CODES
    assert not np.array_equal(made, plain)


def test_a_box_is_replaced_by_another_class_and_nothing_else(pipe):
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    given = pipe.encode("tokenizer_low", picture[None])[0]
    made = pipe.inpaint(["red circle", 1, ""], picture, (4, 4, 12, 9), seed=[1, 2, 3], output_type="uint8")
    inside = np.zeros((ROWS, COLUMNS), bool)
    inside[1:3, 1:3] = True  # a token has 4 pixels
    for ids, image in zip(made.tokens, made.images, strict=True):
        np.testing.assert_array_equal(ids[~inside], given[~inside])
        outside = ~inside.repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(image[outside], picture[outside])
    assert made.tokens.max() < CODES
    assert len({ids.tobytes() for ids in made.tokens}) > 1
    with pytest.raises(ValueError, match="Unknown class 'dog'"):
        pipe.inpaint("dog", picture, (4, 4, 12, 9))


def test_outpainting_keeps_what_is_there(pipe):
    picture = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    made = pipe.outpaint(["red circle"] * 3, picture, right=8, bottom=4, output_type="uint8").images
    assert made.shape == (3, SIZE + 4, SIZE + 8, 3)
    np.testing.assert_array_equal(made[:, :SIZE, :SIZE], np.broadcast_to(picture, (3, SIZE, SIZE, 3)))


def test_mask_free_editing_by_class(pipe):
    picture = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    given = pipe.encode("tokenizer_low", picture[None])[0]
    made = pipe.edit(["red circle", "blue square", "green cross"], picture, num_inference_steps=3, share=0.1)
    assert made.tokens.max() < CODES
    assert all(0 < (ids != given).sum() <= 3 * 2 for ids in made.tokens), "a tenth of 16, rounded up, at each step"


def test_from_one_class_to_another(pipe):
    way = pipe.interpolate(["red circle", "Blue Square"], 3, guidance_scale=2.0)
    np.testing.assert_array_equal(way.tokens[0], pipe("red circle", guidance_scale=2.0).tokens[0])
    with pytest.raises(ValueError, match="mauve"):
        pipe.interpolate(["red circle", "mauve hexagon"])
    numbered = pipe.interpolate([0, 1], 3, guidance_scale=2.0)
    np.testing.assert_array_equal(numbered.tokens, way.tokens)


def test_a_folder_remembers_the_classes(pipe, tmp_path):
    pipe.save(tmp_path / "p")
    again = MusePipeline.load(tmp_path / "p", max_batch_size=4)
    assert again.classes == pipe.classes
    np.testing.assert_array_equal(tokens(again, class_label=[0, 1, 2]), tokens(pipe, class_label=[0, 1, 2]))


def test_stages_that_do_not_fit_are_named(base, tiny):
    low = tiny.stages["tokenizer_low"]
    two = dataclasses.replace(base, vocabulary=vocabulary.ClassVocabulary(["a", "b"]).to_json())
    with pytest.raises(PipelineError, match="names of 2 classes, but its model knows 3"):
        MusePipeline({"base": two, "tokenizer_low": low})
    with pytest.raises(PipelineError, match="lacks the stage tokenizer_low"):
        MusePipeline({"base": base})
    with pytest.raises(PipelineError, match="lacks the stage tokenizer_high; it needs"):
        MusePipeline({name: stage for name, stage in tiny.stages.items() if name != "tokenizer_high"})
    with pytest.raises(PipelineError, match="base is a VQGAN model; expected Base or MaskGIT"):
        MusePipeline({"base": low, "tokenizer_low": low})
