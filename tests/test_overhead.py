"""The cost of checkpoints and metrics: which steps have them, and how it is read from the steps' seconds."""

import doctest
import pathlib

import numpy as np
import pytest

from muse_jax import overhead
from muse_jax.training import logs


def test_the_examples_of_docstrings():
    found = doctest.testmod(overhead)
    assert found.attempted
    assert not found.failed


def test_every_other_turn_has_a_checkpoint_and_metrics(monkeypatch, tmp_path):
    saved = []
    save = overhead.InTurns._save

    def watched(self):
        saved.append(self.step)
        save(self)
        lines[:] = [line["step"] for line in logs.read_metrics(self.workdir) if "loss" in line]

    lines: list[int] = []
    monkeypatch.setattr(overhead.InTurns, "_save", watched)
    monkeypatch.setattr(overhead, "TURN", 20)
    monkeypatch.setattr(overhead.tempfile, "tempdir", str(tmp_path))
    kept, without = overhead.measure("tiny", 1)
    assert kept.shape == without.shape == (1, 20)
    assert min(kept.min(), without.min()) > 0
    assert saved == [40, 80, 81]  # the last is the end
    assert lines == [10, 40, 50, 80, 81]
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("extra", [0.0, 0.3])
def test_what_a_step_after_a_checkpoint_takes_more_is_found_under_noise_that_lasts(extra):
    rng = np.random.default_rng(0)
    slow = 1 + 0.1 * rng.random((2, 20, 1)) + 0.02 * rng.random((2, 20, 50))  # whole turns, then steps
    kept, without = 0.25 * slow
    kept[:, 0] += extra
    printed = float(overhead.cost(kept, without).split(": ")[1].split("%")[0])
    assert printed == pytest.approx(100 * extra / without.mean() / 50, abs=2)
