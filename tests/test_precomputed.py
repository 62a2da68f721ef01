"""Whose tokens a run may read, from keys alone; tests/test_precompute.py has the tokens themselves."""

import dataclasses
import pathlib
import types

import pytest

from muse_jax import ahead, precomputed, specs
from muse_jax.text.vocabulary import ByteVocabulary

CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs/pictures/base.py"
TASK = types.SimpleNamespace(tokenizers={})


def run(**data):
    """A run whose pictures, or the tokens made of them, have random crops."""
    config = ahead.read_config(f"{CONFIG}:tiny")
    config.task.tokenizer = "somewhere"
    spec = specs.from_config(config)
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, **{"crop": "random", **data}))


def mixture(**own):
    """A run on two precomputed sources; the second has keys of its own."""
    sources = {label: {"name": "precomputed", "path": label, "weight": 1} for label in ("a", "b")}
    sources["b"].update(own)
    return run(name="mixture", sources=sources)


def check(spec, **crops):
    """Of sources whose tokens were made with these crops."""
    keys = {label: precomputed.key(run(crop=crop), TASK, ByteVocabulary()) for label, crop in crops.items()}
    found = {label: types.SimpleNamespace(key=key, features={}, seed=0) for label, key in keys.items()}
    source = types.SimpleNamespace(sources=found) if spec.data.name == "mixture" else found["alone"]
    precomputed.check(spec, TASK, source, ByteVocabulary())


def test_a_mixtures_source_is_compared_with_its_own_crop():
    check(run(name="precomputed"), alone="random")
    check(mixture(), a="random", b="random")
    check(mixture(crop="center"), a="random", b="center")
    with pytest.raises(specs.SpecError, match=r"data\.sources\.b\.crop is 'center' and was 'random'"):
        check(mixture(crop="center"), a="random", b="random")
    with pytest.raises(specs.SpecError, match=r"data\.sources\.b\.crop is 'random' and was 'center'"):
        check(mixture(), a="random", b="center")
    with pytest.raises(specs.SpecError, match=r"data\.sources\.b\.flip is True and was False"):
        check(mixture(flip=True), a="random", b="random")
    with pytest.raises(specs.SpecError, match=r"data\.path .*data\.crop is 'random' and was 'center'"):
        check(run(name="precomputed"), alone="center")
