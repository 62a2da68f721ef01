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
    seconds = overhead.measure("tiny", 1)
    assert len(seconds) == 3  # without, with, without: from the steps 60, 80 and 100 on
    assert min(seconds) > 0
    assert saved == [40, 80, 120, 121]  # the last is the end
    assert lines == [10, 40, 50, 80, 90, 120, 121]
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("extra", [0.0, 0.3])
def test_what_turns_with_a_checkpoint_take_more_is_found_on_a_machine_that_gets_slower(extra):
    seconds = 10 * (1 + 0.01 * np.arange(61) + 0.02 * np.random.default_rng(0).random(61))
    seconds[1::2] += extra
    printed = float(overhead.cost(seconds.tolist()).split("takes ")[1].split("%")[0])
    assert printed == pytest.approx(100 * extra / seconds[::2].mean(), abs=0.5)
