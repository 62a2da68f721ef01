"""Makes `toys` importable by the tests here, and lets them share compiled programs."""

import functools
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


class _Lowered:
    def __init__(self, lower):
        self._lower = lower

    @functools.cached_property
    def _lowered(self):
        return self._lower()

    @functools.cached_property
    def _compiled(self):
        return self._lowered.compile()

    def compile(self, options=None):
        assert options is None, "these are for TPUs"
        return self._compiled

    def as_text(self):
        return self._lowered.as_text()


@pytest.fixture(autouse=True, scope="session")
def _compiled_once():
    """The same program of a toy, with the same config and batch, is compiled once for all tests in this process.

    Most of their time is the compiler's. That a restart compiles to the same bits is tested with real processes.
    """
    import toys

    from muse_jax import specs
    from muse_jax.training import step

    seen = {}

    def shared(name):
        original = getattr(step.Program, name)

        def lower(self, batch):
            if not isinstance(self.task, tuple(toys.TASKS.values())):
                return original(self, batch)
            shapes = {key: (leaf.shape, str(leaf.dtype), str(leaf.sharding)) for key, leaf in batch.items()}
            config = specs.to_config(self.spec)
            relevant = {key: config[key] for key in ("seed", "optimizer", "mesh", "rules")}
            steps = config["train"]["steps"] if config["optimizer"]["schedule"] != "constant" else 0
            key = (name, type(self.task), json.dumps(relevant), config["train"]["donate"], steps, json.dumps(shapes))
            return seen.setdefault(key, _Lowered(lambda: original(self, batch)))

        return original, lower

    patches = {name: shared(name) for name in ("lower_train", "lower_evaluate", "lower_samples")}
    for name, (_, lower) in patches.items():
        setattr(step.Program, name, lower)
    yield
    for name, (original, _) in patches.items():
        setattr(step.Program, name, original)
