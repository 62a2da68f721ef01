"""The cost of checkpoints and metrics: how it is read from two runs' metrics."""

import doctest

import pytest

from muse_jax import overhead


def test_the_examples_of_docstrings():
    found = doctest.testmod(overhead)
    assert found.attempted
    assert not found.failed


def test_all_seconds_count_but_those_of_starting_and_compiling():
    lines = [
        {"compile_seconds": 30.0},
        {"trained_seconds": 6.0, "time/step": 0.2, "time/start": 0.3, "time/compile": 0.4},  # of 30 s
        {"eval/loss": 1.0},
        {"trained_seconds": 15.0, "time/step": 0.9, "time/start": 0.0, "time/compile": 0.0, "time/checkpoint": 0.1},
    ]
    assert overhead.spent(lines) == pytest.approx(30 * (1 - 0.7) + 10)
