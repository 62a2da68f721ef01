"""The evaluation command: a pipeline that draws what it is told, one that doesn't, and a real tiny one."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from absl import flags
from flax.core import meta
from PIL import Image

from muse_jax import evaluate, specs
from muse_jax.data import scenes
from muse_jax.models import muse, vqgan
from muse_jax.sampling.pipeline import MusePipeline
from muse_jax.text import vocabulary
from muse_jax.training import checkpoint

WORDS = vocabulary.WordVocabulary(scenes.WORDS)
TEXT = {"vocabulary_size": WORDS.size, "layers": 1, "width": 8, "heads": 2, "head_dim": 4, "mlp_width": 8}
TRANSFORMER = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 16, "text": TEXT}
CODES = {"low": 11, "high": 13}
TOKENIZER = {"name": "vqgan", "code_dim": 4, "channels": 4, "channel_multipliers": [1], "res_blocks": 1}
MODELS = {
    "tokenizer_low": {**TOKENIZER, "codebook_size": CODES["low"], "stem_patch": 8, "normalization": "layer"},
    "tokenizer_high": {**TOKENIZER, "codebook_size": CODES["high"], "stem_patch": 8, "normalization": "layer"},
    "base": {"name": "base", "codebook_size": CODES["low"], "grid": [4, 4], **TRANSFORMER},
    "superres": {
        "name": "superres",
        "codebook_size": CODES["high"],
        "grid": [6, 6],
        "low_codebook_size": CODES["low"],
        "low_grid": [4, 4],
        "low_layers": 1,
        "block": [2, 2],
        **TRANSFORMER,
    },
}
SIZES = {"tokenizer_low": 32, "tokenizer_high": 48, "base": 32, "superres": 48}
SAMPLE = {"num_inference_steps": 2, "guidance_scale": 2.0}


def _spec(name, **data):
    tokens = "tokenizer" not in name
    return specs.from_config(
        {
            "seed": 0,
            "task": {"name": "tokens", "tokenizer": "x", "low_tokenizer": "y"} if tokens else {"name": "tokenizer"},
            "model": MODELS[name],
            "data": {"name": "scenes", "image_size": SIZES[name], "text_length": 24 * tokens, **data},
            "train": {"steps": 1, "batch_size": 1},
            "sample": SAMPLE,
        }
    )


def _params(spec):
    """Random parameters, as a run's checkpoint of the stage has them."""
    if isinstance(spec.model, specs.VQGANSpec):
        model, args = vqgan.VQGAN(spec.model), [np.zeros((1, 8, 8, 3), np.float32)]
    else:
        text = np.ones((1, 24), np.int32)
        model = muse.TokenTransformer(spec.model)
        args = [np.zeros((1, int(np.prod(spec.model.grid))), np.int32), text, text > 0]
        args += [np.zeros((1, 16), np.int32)] if isinstance(spec.model, specs.SuperResSpec) else []
    shapes = jax.eval_shape(lambda *x: meta.unbox(model.init(jax.random.key(0), *x)["params"]), *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.5).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def stages():
    made = {}
    for name in MODELS:
        spec = _spec(name)
        words = None if "tokenizer" in name else WORDS.to_json()
        made[name] = checkpoint.Stage(spec, _params(spec), words, name, 1)
    return made


class Painter:
    """Stands in for a pipeline: draws true pictures of the captions, or those of other captions.

    Args:
      follows: whether a call with these settings draws what it is told.
    """

    max_batch_size = 16
    classes = ()

    def __init__(self, stages, follows):
        self.stages = {**stages, "decoder": stages["tokenizer_high"]}
        self._follows = follows
        self.calls = []
        items = [s for split in ("test", "held_out") for s in scenes.scenes(range(100), 3, split)]
        self._scenes = {item.caption: item for item in items}
        self._others = dict(zip(self._scenes, [*items[1:], items[0]], strict=False))

    def __call__(self, prompt, *, seed, output_type, **settings):
        assert output_type == "uint8"
        self.calls.append((list(prompt), list(seed), settings))
        table = self._scenes if self._follows(settings) else self._others
        items = [table[caption] for caption in prompt]
        return types.SimpleNamespace(images=scenes.render_batch(items, 64), low_images=scenes.render_batch(items, 32))

    def encode(self, stage, images):
        apply = jax.jit(vqgan.VQGAN(self.stages[stage].spec.model).apply, static_argnames="method")
        pixels = vqgan.to_unit(jax.numpy.asarray(images))
        return np.asarray(apply({"params": self.stages[stage].params}, pixels, method="tokens"))

    def decode_tokens(self, stage, tokens):
        """Perfect reconstructions from the decoder, grey ones from the others."""
        size = SIZES.get(stage, 48)
        if stage == "decoder":
            return scenes.render_batch(scenes.scenes(range(len(tokens)), 3, "test"), size)
        return np.full((len(tokens), size, size, 3), 128, np.uint8)


def test_a_pipeline_that_draws_what_it_is_told(stages):
    painter = Painter(stages, follows=lambda settings: True)
    figures = evaluate.evaluate(painter, 40, unguided=10, held_out=20, reconstructed=30, seed=3, progress=False)
    told = figures["prompts"]
    assert (told["count"], told["count_unguided"], told["count_held_out"]) == (40, 10, 20)
    for name in ("statements", "all_statements"):
        for ending in ("", "_unguided", "_held_out", "_low", "_guided_same"):
            assert told[name + ending] == 1
    assert set(told["by_kind"]) == {"background", "count", "shape", "color", "size", "relation"}
    assert json.loads(json.dumps(figures)) == figures
    assert figures["evaluation"]["sampler"]["base"]["num_inference_steps"] == 2
    assert figures["evaluation"]["versions"]["jax"] == jax.__version__


def test_a_pipeline_that_follows_only_with_guidance(stages):
    painter = Painter(stages, follows=lambda settings: settings.get("guidance_scale") != 1)
    told = evaluate.measure_prompts(painter, 40, unguided=40, held_out=8, seed=3, progress=False)
    assert told["statements"] == told["statements_guided_same"] == told["statements_held_out"] == 1
    assert told["statements_unguided"] < 0.5
    assert told["all_statements_unguided"] < 0.1


def test_which_prompts_and_seeds_are_drawn(stages):
    painter = Painter(stages, follows=lambda settings: True)
    evaluate.measure_prompts(painter, 20, unguided=5, held_out=5, seed=3, progress=False)
    test = [(item.caption, 3 + i) for i, item in enumerate(scenes.scenes(range(20), 3, "test"))]
    held_out = [(item.caption, 3 + i) for i, item in enumerate(scenes.scenes(range(5), 3, "held_out"))]
    painter.calls[:2] = sorted(painter.calls[:2], key=lambda call: call[1])  # which were drawn at once
    calls = [list(zip(prompt, seeds, strict=True)) for prompt, seeds, _ in painter.calls]
    assert calls[0] == test[:16]
    assert calls[1][:4] == test[16:]
    assert calls[2][:5] == test[:5]  # without guidance: the same prompts and the same seeds
    assert calls[3][:5] == held_out
    assert [settings for *_, settings in painter.calls] == [
        {},
        {},
        dict.fromkeys(("guidance_scale", "superres_guidance_scale"), 1.0),
        {},
    ]
    assert {len(call) for call in calls} == {16}, "every call has the same shape, so that one compilation does"


def test_scores_are_in_the_order_of_the_prompts(stages):
    """Whichever batch is drawn first."""
    others_are_drawn = threading.Event()

    class Late(Painter):
        def __call__(self, prompt, *, seed, output_type, **settings):
            if seed[0] == 3:
                assert others_are_drawn.wait(60)
            drawn = super().__call__(prompt, seed=seed, output_type=output_type, first=seed[0] == 3)
            others_are_drawn.set()
            return drawn

    captions = [item.caption for item in scenes.scenes(range(40), 3, "test")]
    painter = Late(stages, follows=lambda settings: settings["first"])
    scores, low_scores = evaluate._draw_and_score(painter, captions, 16, 3, {}, lambda count: None)
    for found in (scores, low_scores):
        assert len(found) == 40
        assert all(all(score.values()) for score in found[:16])
        assert not any(all(score.values()) for score in found[16:])


def test_one_resolution_has_one_guidance_scale(stages):
    painter = Painter({name: stage for name, stage in stages.items() if name != "superres"}, lambda settings: True)
    evaluate.measure_prompts(painter, 1, unguided=1, held_out=0, seed=3, progress=False)
    assert [settings for *_, settings in painter.calls] == [{}, {"guidance_scale": 1.0}]


def test_tokenizers_are_measured_on_the_scenes_of_the_prompts(stages):
    painter = Painter(stages, follows=lambda settings: True)
    figures = evaluate.measure_tokenizers(painter, 20, seed=3)
    assert list(figures) == ["low", "high", "decoder"]
    assert figures["decoder"]["psnr"] == 100
    assert figures["decoder"]["statements"] == figures["decoder"]["all_statements"] == 1
    for name in ("low", "high"):
        assert figures[name]["psnr"] < 20
        assert figures[name]["statements"] < 0.2
        assert figures[name]["codebook_size"] == CODES[name]
        assert 0 < figures[name]["codebook_used"] <= 1
    del painter.stages["decoder"]
    assert list(evaluate.measure_tokenizers(painter, 2, seed=3)) == ["low", "high"]


def test_editing_is_measured(stages):
    """A pipeline that hands back what it was given changes nothing, and keeps all the rest."""
    painter = Painter(stages, follows=lambda settings: True)
    painter.image_size, painter.cell, painter.classes = 64, 8, ()

    def given(prompt, image, seed, output_type, mask_image=None, right=0):
        assert len(prompt) == len(image) == len(seed) <= 16
        return types.SimpleNamespace(images=np.pad(np.stack(image), ((0, 0), (0, 0), (0, right), (0, 0)), mode="edge"))

    painter.inpaint = painter.edit = painter.outpaint = given
    figures = evaluate.evaluate_editing(painter, 20, seed=3, progress=False)
    for name in ("inpainting", "mask_free"):
        assert figures["editing"][name] == {"count": 20, "changed": 0.0, "others": 1.0, "others_all": 1.0}
    assert figures["editing"]["outpainting"] == {"count": 20, "pixels_kept": 1.0}
    assert "mask-free" in evaluate.editing_table(figures["editing"])


def _on_folder(stages, path):
    changed = {}
    for name, stage in stages.items():
        data = dataclasses.replace(stage.spec.data, name="folder", path=str(path))
        changed[name] = dataclasses.replace(stage, spec=dataclasses.replace(stage.spec, data=data))
    return changed


def test_own_pictures_have_reconstruction_figures_alone(stages, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    painter = Painter(_on_folder(stages, tmp_path), follows=lambda settings: True)
    del painter.stages["decoder"]
    with pytest.raises(evaluate.EvaluationError, match="'folder'.*'scenes'"):
        evaluate.measure_prompts(painter, 4, unguided=0, held_out=0)
    figures = evaluate.evaluate(painter, 4)
    assert "prompts" not in figures
    assert not painter.calls
    assert 0 < figures["tokenizers"]["low"]["count"] <= 40
    assert "statements" not in figures["tokenizers"]["low"]
    assert evaluate.table(figures).count("\n") == 2
    # Moved: the error says what to do, and the flag does it.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    with pytest.raises(evaluate.EvaluationError, match="--data_path"):
        evaluate.measure_tokenizers(painter, 4)
    assert evaluate.measure_tokenizers(painter, 4, data_path=str(moved))["low"]["psnr"] > 0


def _flags(*arguments):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", *arguments])
    return values


@pytest.mark.slow  # four decode loops are compiled
def test_the_command_on_a_real_pipeline(stages, tmp_path, capsys):
    MusePipeline(stages).save(tmp_path / "pipeline")
    out = tmp_path / "new" / "figures.json"
    arguments = ["--num_prompts=2", "--num_unguided=1", "--num_held_out=1", "--seed=7", "--batch_size=2"]
    written = evaluate.run(_flags(f"--pipeline={tmp_path / 'pipeline'}", f"--out={out}", *arguments))
    assert json.loads(out.read_text()) == written
    assert written["prompts"]["count"] == 2
    assert written["evaluation"]["seed"] == 7
    printed = capsys.readouterr().out
    for words in ("PSNR", "without guidance", "held-out combinations", str(out)):
        assert words in printed


def test_where_the_figures_go():
    assert str(evaluate.out_path(_flags())) == "evaluation.json"
    assert str(evaluate.out_path(_flags("--pipeline=a/b"))) == "a/b/evaluation.json"
    assert str(evaluate.out_path(_flags("--pipeline=a/b", "--out=c.json"))) == "c.json"


@pytest.mark.parametrize(("out", "message"), [("there", "is a folder"), ("file/new/a.json", "file is a file")])
def test_where_figures_cannot_be_written_is_known_before_they_are_measured(tmp_path, monkeypatch, out, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        evaluate.run(_flags(f"--out={tmp_path / out}"))


def test_figures_are_written_whole_or_not_at_all_and_shown_in_any_case(tmp_path, monkeypatch, capsys):
    def half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    figures = {"tokenizers": {}, "evaluation": {"seconds": 1.0}}
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: figures)
    (tmp_path / "figures.json").write_text("{}")
    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        evaluate.run(_flags(f"--out={tmp_path / 'figures.json'}"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"figures.json": "{}"}
    assert "reconstruction" in capsys.readouterr().out


def test_wrong_flags_and_folders_are_named(tmp_path):
    with pytest.raises(flags.Error, match="num_prompts"):
        _flags("--num_prompts=0")
    command = [sys.executable, "-m", "muse_jax.evaluate", f"--pipeline={tmp_path / 'nothing'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
