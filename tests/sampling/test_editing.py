"""Editing on tiny random models: what is outside the mask stays, whatever the picture, the side or the prompt."""

import numpy as np
import PIL.Image
import pytest

from muse_jax.sampling import editing
from muse_jax.sampling.pipeline import MusePipeline

SIZE = 16  # of the pipeline's pictures: 2x2 low tokens of 8 pixels, 4x4 high tokens of 4
RED = "a red circle"


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def of_tokens(pipeline, image):
    low = pipeline.encode("tokenizer_low", editing.decimated(image[None], 2))
    return low[0], pipeline.encode("tokenizer_high", image[None])[0]


def test_inpainting_changes_nothing_outside_the_mask(pipeline, picture):
    low, high = of_tokens(pipeline, picture)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[9:12, 2:6] = True  # touches the low token (1, 0) and the high tokens (2, 0), (2, 1)
    made = pipeline.inpaint(RED, picture, mask, num_images_per_prompt=3, output_type="uint8")
    low_open, high_open = np.zeros((2, 2), bool), np.zeros((4, 4), bool)
    low_open[1, 0] = high_open[2, 0] = high_open[2, 1] = True
    for tokens, low_tokens, image in zip(made.tokens, made.low_tokens, made.images, strict=True):
        np.testing.assert_array_equal(tokens[~high_open], high[~high_open])
        np.testing.assert_array_equal(low_tokens[~low_open], low[~low_open])
        assert tokens.max() < 13
        assert low_tokens.max() < 11
        stays = ~high_open.repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(image[stays], picture[stays])
    assert len({tokens.tobytes() for tokens in made.tokens}) > 1, "seeds differ"
    plain = pipeline.inpaint(RED, picture, mask, num_images_per_prompt=3, output_type="uint8", blend=False)
    np.testing.assert_array_equal(plain.tokens, made.tokens)
    assert (plain.images[:, stays] != picture[stays]).any(), "without blending all pixels are the decoder's"
    again = pipeline.inpaint(RED, picture, mask, num_images_per_prompt=3, output_type="uint8")
    np.testing.assert_array_equal(again.images, made.images)


def test_a_mask_is_a_picture_or_a_box(pipeline, picture, tmp_path):
    mask = PIL.Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (2, 9, 6, 12))
    mask.save(tmp_path / "mask.png")
    PIL.Image.fromarray(picture).save(tmp_path / "picture.png")
    made = [
        pipeline.inpaint([RED] * 3, image, given, output_type="uint8").images
        for image, given in (
            (picture, mask),
            (PIL.Image.fromarray(picture), (2, 9, 6, 12)),
            (str(tmp_path / "picture.png"), str(tmp_path / "mask.png")),
            ([picture] * 3, [mask, np.asarray(mask), np.asarray(mask) > 0]),
            (picture, [str(tmp_path / "mask.png")]),
            ((picture,) * 3, (str(tmp_path / "mask.png"), tmp_path / "mask.png", [2, 9, 6, 12])),
        )
    ]
    for images in made[1:]:
        np.testing.assert_array_equal(images, made[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_pictures_of_any_size_and_mode(pipeline, mode):
    values = np.arange(37 * 50, dtype=np.uint16).reshape(37, 50) * 30
    image = (
        PIL.Image.fromarray(values) if mode == "I;16" else PIL.Image.fromarray(values.astype(np.uint8)).convert(mode)
    )
    made = pipeline.inpaint([RED] * 3, image, (0, 0, 25, 37))
    assert made.images[0].size == (SIZE, SIZE)


def test_everything_may_be_repainted(pipeline, picture):
    """With nothing known it is a picture of the prompt, the one that a call makes."""
    made = pipeline.inpaint([RED] * 3, picture, (0, 0, SIZE, SIZE), seed=[4, 5, 6])
    called = pipeline([RED] * 3, seed=[4, 5, 6])
    np.testing.assert_array_equal(made.tokens, called.tokens)


@pytest.mark.parametrize(
    ("amounts", "shape"),
    [
        ({"right": 8}, (16, 24)),
        ({"left": 24}, (16, 40)),
        ({"top": 8, "bottom": 16}, (40, 16)),
        ({"left": 8, "right": 8, "top": 8}, (24, 32)),
    ],
)
def test_outpainting_keeps_the_picture(pipeline, picture, amounts, shape):
    made = pipeline.outpaint([RED] * 3, picture, **amounts, output_type="uint8")
    assert made.images.shape == (3, *shape, 3)
    top, left = amounts.get("top", 0), amounts.get("left", 0)
    for image, tokens in zip(made.images, made.tokens, strict=True):
        np.testing.assert_array_equal(image[top : top + SIZE, left : left + SIZE], picture)
        assert tokens.shape == (shape[0] // 4, shape[1] // 4)
        assert tokens.max() < 13
    assert made.low_tokens.max() < 11
    assert made.seeds == (0, 0, 0)


def test_outpainting_goes_on_from_a_longer_picture(pipeline, picture):
    first = pipeline.outpaint([RED] * 3, picture, right=8, output_type="uint8").images
    second = pipeline.outpaint([RED] * 3, list(first), right=8, output_type="uint8").images
    assert second.shape == (3, 16, 32, 3)
    np.testing.assert_array_equal(second[:, :, :24], first)


def test_outpainting_goes_on_from_a_picture_that_grew_on_both_sides(pipeline, picture):
    first = pipeline.outpaint([RED] * 3, picture, right=8, bottom=8, output_type="uint8").images
    second = pipeline.outpaint([RED] * 3, list(first), left=8, resize=False, output_type="uint8").images
    assert second.shape == (3, 24, 32, 3)
    np.testing.assert_array_equal(second[:, :, 8:], first)
    box = (14, 4, 30, 22)
    painted = pipeline.inpaint([RED] * 3, list(second), box, resize=False, output_type="uint8")
    assert painted.images.shape == second.shape
    assert painted.tokens.max() < 13
    assert painted.low_tokens.max() < 11
    stays = np.ones((24, 32), bool)
    stays[4:24, 12:32] = False  # the box, in high tokens of 4 pixels
    np.testing.assert_array_equal(painted.images[:, stays], second[:, stays])
    assert (painted.images != second).any()


@pytest.mark.parametrize("kept", [(0, 0), (0, 16), (8, 8), (16, 16)])
def test_inpainting_a_larger_picture_of_which_little_is_kept(pipeline, kept):
    """Less than a window of the models, which is 16 pixels: 8 in a corner or in the middle."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    mask = np.ones((24, 24), bool)
    mask[kept[0] : kept[0] + 8, kept[1] : kept[1] + 8] = False
    made = pipeline.inpaint([RED] * 3, image, mask, resize=False, output_type="uint8")
    assert made.tokens.max() < 13
    assert made.low_tokens.max() < 11
    np.testing.assert_array_equal(made.images[:, ~mask], np.stack([image[~mask]] * 3))


def test_outpainting_by_less_than_a_token_cuts_the_rest_off(pipeline, picture):
    whole = pipeline.outpaint([RED] * 3, picture, right=8, top=8, output_type="uint8")
    made = pipeline.outpaint([RED] * 3, picture, right=3, top=5, output_type="uint8")
    np.testing.assert_array_equal(made.images, whole.images[:, 3:, :-5])
    np.testing.assert_array_equal(made.images[:, 5:, :16], np.stack([picture] * 3))
    assert made.low_images.shape == (3, 10, 10, 3), "half of the pixels, as near as can be"


def test_a_mask_of_strokes_on_nothing_repaints_the_strokes(pipeline, picture):
    strokes = np.zeros((SIZE, SIZE, 4), np.uint8)
    strokes[9:12, 2:6] = 255
    palette = PIL.Image.fromarray((strokes[..., 3] > 0).astype(np.uint8)).convert("P")
    palette.putpalette([255, 255, 255] * 2)  # all white, and what is 0 transparent
    palette.info["transparency"] = 0
    made = [
        pipeline.inpaint([RED] * 3, picture, mask, output_type="uint8").images
        for mask in (PIL.Image.fromarray(strokes), strokes, strokes[..., 3:], np.array([2, 9, 6, 12]), palette)
    ]
    plain = pipeline.inpaint([RED] * 3, picture, (2, 9, 6, 12), output_type="uint8").images
    for images in made:
        np.testing.assert_array_equal(images, plain)


def test_a_thin_mask_on_a_large_picture_is_seen(pipeline):
    image = PIL.Image.new("RGB", (1200, 900), "white")
    line = PIL.Image.new("L", image.size, 0)
    line.paste(255, (600, 100, 601, 101))
    made = pipeline.inpaint([RED] * 3, image, line)
    open_ = made.originals["decoder"][1][0]
    rows, columns = np.nonzero(open_)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 3, 8, 11), "the token with the pixel"


def test_mask_free_editing_redraws_a_share_at_a_time(pipeline, picture):
    low, _ = of_tokens(pipeline, picture)
    made = pipeline.edit([RED] * 3, picture, num_inference_steps=5, top_k=0, share=0.25, history=True)
    steps, masked = made.steps["base"]
    before = np.stack([low] * 3)
    for i, (after, again) in enumerate(zip(steps, masked, strict=True)):
        assert ((after != before).sum(axis=(1, 2)) <= 1).all(), "a quarter of 4 tokens"
        assert (again.sum(axis=(1, 2)) == (0 if i == 4 else 1)).all()
        before = after
    np.testing.assert_array_equal(made.low_tokens, before)
    assert len(made.decoding(1)["base"].images) == 5
    assert (made.low_tokens != low).any()


def test_mask_free_editing_within_a_mask(pipeline, picture):
    low, high = of_tokens(pipeline, picture)
    made = pipeline.edit([RED] * 3, picture, (0, 0, 8, 16), num_inference_steps=5, top_k=0, share=0.25)
    np.testing.assert_array_equal(made.low_tokens[:, :, 1], np.stack([low[:, 1]] * 3))
    np.testing.assert_array_equal(made.tokens[:, :, 2:], np.stack([high[:, 2:]] * 3))
    stays = np.stack([picture[:, 8:]] * 3)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in made.images])[:, :, 8:], stays)
    again = dict(num_inference_steps=5, top_k=0, share=0.25, blend=False, output_type="uint8")
    assert (pipeline.edit([RED] * 3, picture, (0, 0, 8, 16), **again).images[:, :, 8:] != stays).any()


def test_interpolation_starts_with_one_prompt_and_ends_with_the_other(pipeline):
    def latent(output):
        return np.concatenate([x.reshape(len(x), -1) for x in (output.low_tokens, output.tokens)], axis=1)

    red, blue = (latent(pipeline([text] * 4, seed=[2] * 4, guidance_scale=3.0)) for text in ("a red circle", "blue"))
    assert (red[0] != blue[0]).any()
    way = latent(pipeline.interpolate(["a red circle", "blue"], 4, guidance_scale=3.0, seed=2))
    np.testing.assert_array_equal(way[[0, -1]], [red[0], blue[0]])
    equal = latent(pipeline.interpolate(["a red circle"] * 2, 4, guidance_scale=3.0, seed=2))
    np.testing.assert_array_equal(equal, red)


def test_of_many_interpolated_pictures_each_has_its_label(pipeline):
    for count, second in ((101, "99% a, 1% red"), (150, "99.3% a, 0.7% red")):
        made = pipeline.interpolate(["a", "red"], count, num_inference_steps=1, output_type="latent")
        assert len(set(made.prompts)) == count
        assert made.prompts[1] == second


def test_interpolation_without_guidance_and_with_a_negative_prompt(pipeline):
    way = pipeline.interpolate(["a red circle", "blue"], 3, guidance_scale=1.0, superres_guidance_scale=1.0)
    plain = pipeline("a red circle", guidance_scale=1.0, superres_guidance_scale=1.0)
    np.testing.assert_array_equal(way.tokens[0], plain.tokens[0])
    away = pipeline.interpolate(["a red circle", "blue"], 4, "a square", guidance_scale=8.0)
    assert (away.low_tokens != pipeline.interpolate(["a red circle", "blue"], 4, guidance_scale=8.0).low_tokens).any()


def test_interpolation_where_guidance_is_off_by_default(tiny, pipeline, without_guidance):
    stages = tiny.stages | {name: without_guidance(tiny.stages[name]) for name in ("base", "superres")}
    scales = {"guidance_scale": 3.0, "superres_guidance_scale": 2.0}
    for settings in (scales, dict.fromkeys(scales, 1.0)):
        call = dict(seed=2, output_type="latent", **settings)
        ways = [
            pipe.interpolate(["a red circle", "blue"], 4, "a square" if settings is scales else "", **call)
            for pipe in (pipeline, MusePipeline(stages, {}, max_batch_size=4))
        ]
        np.testing.assert_array_equal(*(way.low_tokens for way in ways))
        np.testing.assert_array_equal(*(way.tokens for way in ways))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.interpolate(["a"]), "between 2 prompts, and 1"),
        (lambda pipe: pipe.interpolate("a red circle"), "expected a list"),
        (lambda pipe: pipe.interpolate(["a", "b"], 1), "num_pictures is 1"),
        (lambda pipe: pipe.interpolate(["a", "b"], True), "num_pictures is True"),
    ],
)
def test_wrong_interpolations_are_refused_before_anything_is_compiled(pipeline, compiled, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(pipeline)
    assert compiled == []


def test_other_prompts_masks_and_values_do_not_compile_again(pipeline, picture, compiled):
    def all_of_it(prompt, box, **settings):
        pipeline.inpaint([prompt] * 3, picture, box, **settings, output_type="latent")
        pipeline.edit([prompt] * 3, picture, box, num_inference_steps=5, top_k=0, **settings, output_type="latent")
        pipeline.interpolate([prompt, "a square"], 3, **settings, output_type="latent")

    all_of_it(RED, (0, 0, 8, 8))
    compiled.clear()
    all_of_it("blue", (3, 5, 16, 9), seed=9, guidance_scale=2.5, negative_prompt="red", choice_temperature=1.0)
    all_of_it("blue", (3, 5, 16, 9), guidance_scale=1.0, superres_guidance_scale=1.0)
    assert compiled == []


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("inpaint", {"mask_image": np.zeros((8, 8), bool)}, "mask_image is 8 x 8 .* 16 x 16"),
        ("inpaint", {"mask_image": np.zeros((16, 16), bool)}, "repaints nothing"),
        ("inpaint", {"mask_image": (0, 0, 17, 4)}, "within the image of 16 x 16"),
        ("inpaint", {"mask_image": (0, 0, 4)}, "left, top, right, bottom"),
        ("inpaint", {"mask_image": "nowhere.png"}, "mask_image 'nowhere.png' can't be read"),
        ("inpaint", {"mask_image": ["a.png"] * 4}, "4 entries for 1 prompts"),
        ("inpaint", {"mask_image": (0, 0, 4, 4), "image": np.zeros((4, 4, 3))}, "float64.*uint8"),
        ("inpaint", {"mask_image": [(0, 0, 4, 4)] * 2, "prompt": [RED] * 3}, "2 entries for 3 prompts"),
        ("outpaint", {}, "all 0"),
        ("inpaint", {"mask_image": (0, 0, float("nan"), 4)}, "left, top, right, bottom"),
        ("inpaint", {"mask_image": (0, 0, float("inf"), 4)}, "left, top, right, bottom"),
        ("inpaint", {"mask_image": None}, "mask_image is None"),
        ("inpaint", {"mask_image": (0, 0, 4, 4), "image": np.zeros((4, 4, 5), np.uint8)}, "expected uint8"),
        ("inpaint", {"mask_image": (0, 0, 4, 4), "image": np.zeros((18, 16, 3), np.uint8), "resize": False}, "16 x 18"),
        ("outpaint", {"right": 8, "image": np.zeros((8, 16, 3), np.uint8), "resize": False}, "at least 16"),
        ("edit", {"mask_image": np.zeros((16, 16), bool)}, "repaints nothing"),
        ("outpaint", {"left": -8}, "left is -8"),
        ("edit", {"share": 0.0}, "share is 0.0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(
    pipeline, picture, compiled, method, arguments, message
):
    with pytest.raises(ValueError, match=message):
        getattr(pipeline, method)(**{"prompt": RED, "image": picture, **arguments})
    assert compiled == []
