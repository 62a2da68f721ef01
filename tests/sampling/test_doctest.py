"""The examples in the docstrings of this room."""

import doctest
import importlib

import pytest

ROOM = ("guidance", "requests", "sampler", "schedules", "selection")


@pytest.mark.parametrize("module", [f"muse_jax.sampling.{name}" for name in ROOM] + ["muse_jax.sample"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed
