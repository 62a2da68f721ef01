"""Sweeps and classes on a pipeline that draws what it is told, when it is told to take enough steps."""

import json
import types

import numpy as np
import pytest

from muse_jax import evaluate, figures
from muse_jax.data import scenes
from muse_jax.evaluation import classes, sweep

NAMES = [" ".join(pair) for pair in scenes.CLASSES]


class Painter:
    """True pictures of what it is asked from 4 steps on, grey ones before; by the linear schedule from 8 on."""

    max_batch_size = 8
    image_size = 32

    def __init__(self, by_class):
        self.classes = tuple(NAMES) if by_class else ()
        items = (scenes.single_objects if by_class else scenes.scenes)(range(200), 3, "test")
        named = {" ".join(scenes.CLASSES[scenes.label(s)]) if by_class else s.caption: s for s in items}
        self._scenes = named
        self.calls = []

    def __call__(self, prompt, *, seed, output_type, num_inference_steps=8, **settings):
        assert output_type == "uint8"
        assert len(prompt) == len(seed)
        self.calls.append((tuple(prompt), tuple(seed), num_inference_steps, tuple(sorted(settings.items()))))
        images = scenes.render_batch([self._scenes[text] for text in prompt], 32)
        if num_inference_steps < (8 if settings.get("schedule") == "linear" else 4):
            images[:] = 128
        return types.SimpleNamespace(images=images)

    def encode(self, stage, images):
        return images

    def decode_tokens(self, stage, tokens):
        return tokens // 2


@pytest.mark.parametrize("by_class", [True, False])
def test_a_sweep(by_class, tmp_path):
    painter, made = Painter(by_class), []
    found = sweep.measure(painter, 10, (2, 4, 8), seed=3, advance=made.append)
    assert sum(made) == 10 * 3 * (len(sweep.SCHEDULES) + len(sweep.SAMPLERS))
    assert set(found["schedules"]) >= {"cosine", "linear", "square", "cubic", "circle", "sqrt", "log"}
    cosine, linear = found["schedules"]["cosine"], found["schedules"]["linear"]
    assert [row["steps"] for row in cosine] == [2, 4, 8]
    assert [row["accuracy"] for row in cosine][1:] == [1, 1]
    assert [row["accuracy"] for row in linear][1] == cosine[0]["accuracy"] < 0.3
    assert cosine[0]["frechet"] > cosine[2]["frechet"]
    assert found["true"] < found["tokenizer"]
    assert json.loads(json.dumps(found)) == found
    # The same prompts and seeds every time, so that they are compared on nothing else.
    assert len({call[:2] for call in painter.calls}) == 2, "10 pictures in batches of 8"
    text = sweep.table(found)
    assert all(name in text for name in (*sweep.SCHEDULES, *sweep.SAMPLERS))
    figures.sweep(tmp_path / "sweep.png", found)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_classes_are_read_from_the_pixels():
    painter = Painter(by_class=True)
    found = classes.measure(painter, 48, unguided=24, seed=3)
    assert found["right"] == found["right_unguided"] == 1
    assert found["by_kind"] == {"count": 1, "shape": 1, "color": 1}
    assert set(found["by_class"]) == set(NAMES)
    assert "100.0%" in classes.table(found)
    painter._scenes["red circle"] = painter._scenes["blue circle"]
    wrong = classes.measure(painter, 48, unguided=0, seed=3)
    assert wrong["by_class"]["red circle"] == 0
    assert wrong["right"] == pytest.approx(46 / 48)
    assert wrong["by_kind"] == {"count": 1, "shape": 1, "color": pytest.approx(46 / 48)}
    assert "worst: red circle 0%" in classes.table(wrong)


def test_what_cannot_be_swept_is_said():
    scene = types.SimpleNamespace(spec=types.SimpleNamespace(data=types.SimpleNamespace(name="scenes")))
    folder = types.SimpleNamespace(spec=types.SimpleNamespace(data=types.SimpleNamespace(name="folder")))
    with pytest.raises(evaluate.EvaluationError, match="scenes alone"):
        evaluate.evaluate_sweep(types.SimpleNamespace(stages={"base": folder}), 4, (1,))
    with pytest.raises(evaluate.EvaluationError, match="--sweep_steps is '0,4'"):
        evaluate.evaluate_sweep(types.SimpleNamespace(stages={"base": scene}), 4, (0, 4))
    with pytest.raises(evaluate.EvaluationError, match="'4,x'; expected whole numbers"):
        evaluate._numbers(["4", "x"])
    with pytest.raises(evaluate.EvaluationError, match="--num_swept is 1; a Fréchet distance needs"):
        evaluate.evaluate_sweep(types.SimpleNamespace(stages={"base": scene}), 1, (4,))


def test_samplers_differ_from_the_default_in_what_a_sampler_knows():
    from muse_jax.sampling import sampler

    for settings in (*sweep.SCHEDULES.values(), *sweep.SAMPLERS.values()):
        sampler.make_plan(tokens=16, grid=(4, 4), num_inference_steps=4, **settings)
    assert np.all([settings for name, settings in sweep.SAMPLERS.items() if name != "default"])
