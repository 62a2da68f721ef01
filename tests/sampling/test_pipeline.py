"""MusePipeline on tiny random models: what it promises about calls, compilation, seeds and folders.

Compiling is what costs here: tests ask for three or four pictures where they can, one shape for all.
"""

import dataclasses
import json
import shutil
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from muse_jax.models import muse, vqgan
from muse_jax.sampling.pipeline import MusePipeline, PipelineError
from muse_jax.training import checkpoint

PROMPTS = ["a red circle", "a blue square", "", "red"]

# ----------------------------------------------------------------------------------------- calls


def test_pictures_of_every_kind(pipeline):
    output = pipeline(PROMPTS[:3])
    assert [image.size for image in output.images] == [(16, 16)] * 3
    assert [image.size for image in output.low_images] == [(8, 8)] * 3
    assert all(isinstance(image, PIL.Image.Image) for image in output.high_images)
    assert output.tokens.shape == (3, 4, 4)
    assert output.low_tokens.shape == (3, 2, 2)
    assert output.tokens.max() < 13  # no place is left masked
    assert output.low_tokens.max() < 11
    assert not np.array_equal(np.asarray(output.images[0]), np.asarray(output.high_images[0]))  # another decoder
    pixels = pipeline(PROMPTS[:3], output_type="uint8").images
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, [np.asarray(image) for image in output.images])
    unit = pipeline(PROMPTS[:3], output_type="np").images
    np.testing.assert_allclose(unit, pixels / 255, atol=1e-6)
    np.testing.assert_array_equal(pipeline(PROMPTS[:3], output_type="latent").images, output.tokens)


def test_matches_the_models_called_by_hand(pipeline, tiny):
    """One step, no noise: the tokens are the argmax of the guided logits, at both resolutions."""
    output = pipeline(
        "a red circle",
        "blue",
        guidance_scale=3.0,
        num_inference_steps=1,
        token_temperature=0.0,
        superres_guidance_scale=2.0,
        superres_num_inference_steps=1,
        superres_token_temperature=0.0,
        output_type="uint8",
    )
    low = None
    for name, scale in (("base", 3.0), ("superres", 2.0)):
        stage = tiny.stages[name]
        predict = jax.jit(muse.TokenTransformer(stage.spec.model).apply)
        blank = jnp.full((1, np.prod(stage.spec.model.grid)), stage.spec.model.codebook_size)
        ids = jnp.array([[2, 5, 4, 0, 0, 0], [3, 0, 0, 0, 0, 0]])  # a red circle; blue
        both = [predict({"params": stage.params}, blank, i[None], i[None] > 0, low) for i in ids]
        low = jnp.argmax(both[1] + scale * (both[0] - both[1]), axis=-1)
    np.testing.assert_array_equal(output.tokens.reshape(1, -1), low)
    decoder = tiny.stages["decoder"]
    network = jax.jit(partial(vqgan.VQGAN(decoder.spec.model).apply, method="decode_tokens"))
    image = network({"params": decoder.params}, output.tokens)
    np.testing.assert_allclose(output.images, vqgan.to_uint8(image), atol=1)


def test_tokens_of_pictures_are_those_of_the_encoder(pipeline, tiny):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)  # more than a batch
    stage = tiny.stages["tokenizer_high"]
    apply = jax.jit(partial(vqgan.VQGAN(stage.spec.model).apply, method="tokens"))
    expected = apply({"params": stage.params}, vqgan.to_unit(jnp.asarray(images)))
    np.testing.assert_array_equal(pipeline.encode("tokenizer_high", images), expected)


def test_same_seed_same_picture_whatever_the_batch(pipeline):
    alone = [pipeline(prompt, seed=5, output_type="latent").images[0] for prompt in PROMPTS]
    together = pipeline(PROMPTS, seed=5, output_type="latent").images
    np.testing.assert_array_equal(together, alone)
    pieces = pipeline(PROMPTS * 2, seed=[5] * 4 + [6] * 4, output_type="latent").images  # more than max_batch_size
    np.testing.assert_array_equal(pieces[:4], alone)
    assert not np.array_equal(pieces[4:], alone)
    several = pipeline(PROMPTS[0], num_images_per_prompt=3, seed=4, output_type="latent")
    assert several.seeds == (4, 5, 6)
    np.testing.assert_array_equal(several.images[1], alone[0])


def test_other_values_do_not_compile_again(pipeline, compiled):
    def call(*args, count=3, **settings):
        output = pipeline(*args, num_images_per_prompt=count, output_type="np", **settings)
        return output.images, output.low_images, output.high_images

    call("a red circle")  # three pictures: the shape of four
    compiled.clear()
    call(
        "blue",
        "red",
        seed=99,
        guidance_scale=9.5,
        token_temperature=0.3,
        choice_temperature=1.0,
        schedule="linear",
        guidance_ramp="constant",
        superres_guidance_scale=1.5,
        superres_schedule="square",
        count=4,
    )
    call(["", "a"], guidance_scale=[2.0, 4.0], seed=[1, 2], superres_top_p=1.0, count=2)
    assert compiled == []
    call("a red circle", num_inference_steps=4)
    assert len(compiled) == 1  # the base model's loop alone; and the count can rise


def test_guidance_of_a_stage_that_is_not_meant_to_be_guided_compiles_nothing(tiny, without_guidance, compiled):
    pipe = MusePipeline(tiny.stages | {"superres": without_guidance(tiny.stages["superres"])}, {}, max_batch_size=4)
    settings = {"seed": [1, 2, 3, 4], "output_type": "latent"}
    prompts = ["a red circle"] * 4
    off = pipe(prompts, "blue", **settings).images
    compiled.clear()
    on = pipe(prompts, "blue", superres_guidance_scale=3.0, **settings).images
    mixed = pipe(prompts, "blue", superres_guidance_scale=[1.0, 3.0, 1.0, 3.0], **settings).images
    assert compiled == []
    assert not np.array_equal(on, off)
    np.testing.assert_array_equal(mixed, [off[0], on[1], off[2], on[3]])
    # what a stage draws that is meant to be guided, whose program has both halves side by side
    meant = MusePipeline(tiny.stages, {}, max_batch_size=4)
    np.testing.assert_array_equal(on, meant(prompts, "blue", superres_guidance_scale=3.0, **settings).images)
    np.testing.assert_array_equal(off, meant(prompts, "blue", superres_guidance_scale=1.0, **settings).images)


def test_guidance_moves_pictures_and_needs_a_scale(pipeline):
    settings = {"seed": [1, 2, 3, 4], "output_type": "latent"}
    prompts = ["a red circle"] * 4
    off = pipeline(prompts, guidance_scale=1.0, **settings).low_tokens
    on = pipeline(prompts, guidance_scale=8.0, **settings).low_tokens
    away = pipeline(prompts, "blue", guidance_scale=8.0, **settings).low_tokens
    assert not np.array_equal(off, on)
    assert not np.array_equal(on, away)
    # Guided by 1 in a call where others are guided: the picture without guidance.
    mixed = pipeline(prompts, guidance_scale=[1.0, 8.0, 1.0, 8.0], **settings).low_tokens
    np.testing.assert_array_equal(mixed, [off[0], on[1], off[2], on[3]])
    with pytest.warns(UserWarning, match="negative_prompt has no effect at guidance_scale=1"):
        pipeline(prompts, "blue", guidance_scale=1.0, superres_guidance_scale=1.0, **settings)


def test_history(pipeline):
    prompts = PROMPTS + PROMPTS[:3]  # in two pieces
    output = pipeline(prompts, history=True, seed=2)
    np.testing.assert_array_equal(output.tokens, pipeline(prompts, seed=2, output_type="latent").tokens)
    frames = output.decoding(5)
    assert frames["base"].images.shape == (3, 8, 8, 3)
    assert frames["base"].masked.shape == (3, 2, 2)
    assert frames["base"].masked.sum(axis=(1, 2)).tolist() == [3, 2, 0]
    assert frames["superres"].masked.sum(axis=(1, 2)).tolist() == [13, 8, 0]
    np.testing.assert_array_equal(frames["superres"].images[-1], np.asarray(output.images[5]))
    np.testing.assert_array_equal(frames["base"].images[-1], np.asarray(output.low_images[5]))
    with pytest.raises(ValueError, match="history=True"):
        pipeline(PROMPTS, output_type="latent").decoding()


def test_settings_are_told(pipeline):
    scales = [2.0, 4.5, 0.1]
    settings = pipeline(PROMPTS[:3], guidance_scale=scales, superres_top_k=3, output_type="latent").settings
    assert settings["base"]["guidance_scale"] == scales
    assert settings["base"]["num_inference_steps"] == 3
    assert settings["superres"]["top_k"] == 3
    assert settings["superres"]["guidance_scale"] == 2.0
    assert json.loads(json.dumps(settings)) == settings


def test_unknown_words_are_named(pipeline):
    with pytest.warns(UserWarning, match="never seen these words.*'dragon', 'green'"):
        pipeline(["a red dragon", "a circle", ""], "a green dragon", output_type="latent")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": 3.0}, "no setting 'guidance'; expected one of guidance_scale"),
        ({"superres_steps": 3}, "no setting 'superres_steps'"),
        ({"num_inference_steps": 0}, "base: num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; expected a whole number"),
        ({"superres_schedule": "cosin"}, "superres: Unknown schedule 'cosin'"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 values for 1 prompts"),
        ({"superres_token_temperature": "hot"}, "superres_token_temperature is 'hot'; expected a number"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; expected one of 'pil'"),
        ({"top_p": 2.0}, "base: top_p"),
        ({"seed": "1"}, "seed is '1'"),
    ],
)
def test_wrong_calls_are_refused_before_compiling(pipeline, compiled, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipeline("a", **arguments)
    assert compiled == []


def test_threads_share_programs_and_get_what_they_would_alone(tiny, compiled):
    """Eight threads at once, with a number of steps that nobody asked for yet: each program is compiled once."""
    pipeline = MusePipeline(tiny.stages, max_batch_size=4)
    steps = {"num_inference_steps": 5, "superres_num_inference_steps": 4}
    got = {}

    def work(i):
        got[i] = pipeline(PROMPTS[i % 4], seed=i, output_type="uint8", **steps).images

    compiled.clear()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) in (2, 3)  # base, super-resolution, and the decoder if no test has used it
    for i in range(8):
        expected = pipeline(PROMPTS[i % 4], seed=i, output_type="uint8", **steps).images
        np.testing.assert_array_equal(got[i], expected)


# --------------------------------------------------------------------------------------- folders


def test_saved_and_loaded_it_makes_the_same_pictures(pipeline, tmp_path):
    pipeline.save(tmp_path / "pipeline")
    loaded = MusePipeline.load(tmp_path / "pipeline")
    assert loaded.manifest == {"command": "made by a test"}
    content = json.loads((tmp_path / "pipeline" / "pipeline.json").read_text())
    assert content["format"] == 1
    assert sorted(content["stages"]) == ["base", "decoder", "superres", "tokenizer_high", "tokenizer_low"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]  # nothing beside it
    for name, stage in pipeline.stages.items():
        assert loaded.stages[name].spec == stage.spec
    args = {"prompt": PROMPTS[0], "seed": 3, "output_type": "uint8"}
    np.testing.assert_array_equal(loaded(**args).images, pipeline(**args).images)


def test_assembled_from_stage_folders(tiny, tmp_path):
    folders = {}
    for name in ("tokenizer_low", "tokenizer_high", "base", "superres"):
        stage = tiny.stages[name]
        params = stage.params
        if name.startswith("tokenizer"):  # as its training keeps them
            params = {**params, "discriminator": {"kernel": np.ones((3, 3), np.float32)}}
        folders[name] = tmp_path / "runs" / name
        checkpoint.save_stage(folders[name], stage.spec, params, stage.vocabulary, step=5)
    made = MusePipeline.assemble(tmp_path / "out" / "pipeline", folders, {"seed": 1}, dtype="float16")
    output = made("a red circle", output_type="uint8")
    np.testing.assert_array_equal(output.images, output.high_images)  # no fine-tuned decoder
    loaded_from = tmp_path / "out" / "pipeline"
    loaded = MusePipeline.load(loaded_from)
    assert loaded.manifest == {"seed": 1}
    assert not (tmp_path / "out" / "pipeline" / "decoder").exists()
    stored = checkpoint.load_stage(tmp_path / "out" / "pipeline" / "tokenizer_low").params
    assert "discriminator" not in stored
    own = (
        folders["tokenizer_low"] / "params.safetensors",
        tmp_path / "out" / "pipeline" / "tokenizer_low" / "params.safetensors",
    )
    assert own[1].stat().st_size < 0.7 * own[0].stat().st_size, "float16 on the disk"
    assert loaded("a red circle", output_type="uint8").images.shape == (1, 16, 16, 3)


def test_a_frozen_text_encoder_is_found_and_kept(tiny, pipeline, tmp_path):
    """Checkpoints of a run leave it out; a pipeline that is written has it."""
    base = tiny.stages["base"]
    params = {name: value for name, value in base.params.items() if name != "text_encoder"}
    weights = tmp_path / "t5"
    text = dataclasses.replace(base.spec.model.text, trainable=False, weights=str(weights))
    spec = dataclasses.replace(base.spec, model=dataclasses.replace(base.spec.model, text=text))
    frozen = dataclasses.replace(base, spec=spec, params=params)
    with pytest.raises(PipelineError, match="trained with the text encoder .*t5/params.safetensors, which is not"):
        MusePipeline({**tiny.stages, "base": frozen})
    checkpoint.save_stage(weights, base.spec, base.params["text_encoder"])
    MusePipeline({**tiny.stages, "base": frozen}).save(tmp_path / "pipeline")
    shutil.rmtree(weights)
    loaded = MusePipeline.load(tmp_path / "pipeline").stages["base"].params
    jax.tree.map(np.testing.assert_array_equal, loaded, base.params)


def test_a_save_that_fails_leaves_what_was_there(pipeline, tmp_path, monkeypatch):
    pipeline.save(tmp_path / "pipeline")
    before = (tmp_path / "pipeline" / "base" / "params.safetensors").read_bytes()

    def broken(folder, *_):
        if folder.name == "superres":
            raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_stage", broken)
    with pytest.raises(OSError, match="no space left"):
        pipeline.save(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "base" / "params.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_something_else_is_not_overwritten(pipeline, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PipelineError, match="holds something else than a pipeline"):
        pipeline.save(tmp_path)


@pytest.mark.parametrize("theirs", ["notes.txt", "samples/mine.png", "base/checkpoints/1/array"])
def test_what_the_user_keeps_in_a_pipeline_folder_is_not_deleted(pipeline, tmp_path, theirs):
    folder = tmp_path / "pipeline"
    pipeline.save(folder)
    pipeline.save(folder)  # what is a pipeline alone is replaced
    (folder / theirs).parent.mkdir(parents=True, exist_ok=True)
    (folder / theirs).write_text("theirs")
    pipeline.save(folder)
    pipeline.save(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "pipeline.1"]
    assert (tmp_path / "pipeline.1" / theirs).read_text() == "theirs"
    assert not (folder / theirs).exists()
    assert sorted(MusePipeline.load(folder).stages) == sorted(pipeline.stages)


def test_through_a_link_the_folder_is_replaced_that_it_leads_to(pipeline, tmp_path):
    pipeline.save(tmp_path / "pipeline")
    (tmp_path / "link").symlink_to(tmp_path / "pipeline")
    changed = MusePipeline(pipeline.stages, {"command": "again"})
    changed.save(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipeline"]
    assert (tmp_path / "link").is_symlink()
    assert MusePipeline.load(tmp_path / "pipeline").manifest == {"command": "again"}


def test_folders_that_are_no_pipeline_are_refused_with_the_mend(pipeline, tmp_path):
    with pytest.raises(PipelineError, match="is not there.*name a folder that the quickstart"):
        MusePipeline.load(tmp_path / "nowhere")
    with pytest.raises(PipelineError, match="is a folder without pipeline.json"):
        MusePipeline.load(tmp_path)
    folder = tmp_path / "pipeline"
    pipeline.save(folder)
    file = folder / "pipeline.json"
    content = json.loads(file.read_text())

    def written(**changes):
        file.write_text(json.dumps({**content, **changes}))
        return folder

    with pytest.raises(PipelineError, match="has format 2, and this version of muse_jax reads 1"):
        MusePipeline.load(written(format=2))
    fewer = {name: name for name in content["stages"] if name != "superres"}
    with pytest.raises(PipelineError, match="lacks the stage superres; it needs tokenizer_low"):
        MusePipeline.load(written(stages=fewer))
    with pytest.raises(PipelineError, match="has a stage 'critic'"):
        MusePipeline.load(written(stages={**content["stages"], "critic": "critic"}))
    with pytest.raises(PipelineError, match="lacks the folders of base"):
        MusePipeline.load(written(stages={**content["stages"], "base": "gone"}))
    for text in ("{", "[]", '{"format": 1, "stages": ["base"]}', '{"format": 1, "stages": {"base": 1}}'):
        file.write_text(text)
        with pytest.raises(PipelineError, match="is damaged"):
            MusePipeline.load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_low", {"codebook_size": 12}, "base has 11 codes, but tokenizer_low has 12"),
        ("tokenizer_high", {"codebook_size": 12}, "superres has 13 codes, but tokenizer_high has 12"),
        ("superres", {"low_codebook_size": 9}, "superres has 9 low-resolution codes, but base has 11"),
        ("superres", {"low_grid": (1, 4)}, r"superres has \(1, 4\) low-resolution tokens, but base has \(2, 2\)"),
        ("decoder", {"codebook_size": 12}, "decoder has 12 codes, but tokenizer_high has 13"),
        ("decoder", {"stem_patch": 2}, "decoder has 2 pixels a token, but tokenizer_high has 4"),
    ],
)
def test_stages_that_do_not_fit_are_refused(tiny, compiled, name, changes, message):
    stage = tiny.stages[name]
    other = dataclasses.replace(stage, spec=tiny.spec(name, **changes))
    with pytest.raises(PipelineError, match=message + ".*: they were not trained together"):
        MusePipeline({**tiny.stages, name: other})
    assert compiled == []


def test_wrong_models_parameters_and_vocabularies_are_refused(tiny):
    def opened(name, stage):
        return MusePipeline({**tiny.stages, name: stage})

    with pytest.raises(PipelineError, match="superres is a Base model; expected SuperRes"):
        opened("superres", tiny.stages["base"])
    base = tiny.stages["base"]
    params = {**base.params, "head": {**base.params["head"], "extra": np.zeros(3)}}
    with pytest.raises(PipelineError, match=r"base \(somewhere/base\).*head/extra the shape None, and the file has"):
        opened("base", dataclasses.replace(base, params=params))
    with pytest.raises(PipelineError, match="not of the same run"):
        opened("base", tiny.stage("base", width=32) and dataclasses.replace(base, spec=tiny.spec("base", width=32)))
    with pytest.raises(PipelineError, match="no vocabulary.json"):
        opened("base", dataclasses.replace(base, vocabulary=None))
    words = {"kind": "words", "words": [f"word{i}" for i in range(99)]}
    with pytest.raises(PipelineError, match="vocabulary of 101 ids, but its text encoder knows 7"):
        opened("base", dataclasses.replace(base, vocabulary=words))


def test_another_codebook_under_the_decoder_is_refused(tiny):
    """The fine-tuned decoder has tokenizer_high's codebook bit for bit, or its pictures mean something else."""
    with pytest.raises(PipelineError, match="different codebooks.*fine-tune it from somewhere/tokenizer_high"):
        MusePipeline({**tiny.stages, "decoder": tiny.stage("decoder", seed=9)})
