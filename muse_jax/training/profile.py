"""A profile on request: what devices and host do in a few steps, for xprof.

python -m muse_jax.train --config=... --workdir=DIR --config.profile.start_step=100 --config.profile.num_steps=5
xprof --logdir=DIR
"""

import os
import pathlib
import tempfile
from typing import Any

import jax
from absl import logging
from etils import epath

from muse_jax import specs


class Profile:
    """Records the steps that the config's `profile` section names, once; each process what its devices do.

    The files are WORKDIR/plugins/profile/TIME/HOST.xplane.pb, which is where xprof and TensorBoard look.
    """

    def __init__(self, spec: specs.ProfileSpec, workdir: Any):
        self._steps = range(spec.start_step, spec.start_step + spec.num_steps)
        self._workdir = epath.Path(workdir)
        self._scratch: Any = None

    def begin(self, step: int) -> None:
        """Says so if the run goes on from behind the steps that were asked for, and they were never recorded."""
        made = (self._workdir / "plugins/profile").exists()
        if self._steps and step >= self._steps.stop and not made:
            logging.warning(
                "no profile is made: it was asked for from step %d on, for %d steps, and the run goes on from step %d; "
                "set profile.start_step behind that.", self._steps.start, len(self._steps), step
            )  # fmt: skip

    def before(self, step: int, state: Any) -> None:
        """To be called before each step: starts with the first one that was asked for, ends after the last.

        Args:
          step: steps done.
          state: what the devices may still be working on.
        """
        if self._scratch is None and step in self._steps:
            jax.block_until_ready(state)
            self._scratch = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._scratch.name)
        elif self._scratch is not None and step not in self._steps:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what was recorded. What can't be written is said and left out; training goes on."""
        if self._scratch is None:
            return
        scratch, self._scratch, self._steps = self._scratch, None, range(0)
        jax.profiler.stop_trace()
        with scratch:
            try:
                # The profiler writes local files only; the workdir may be a bucket.
                for file in pathlib.Path(scratch.name).rglob("*.xplane.pb"):
                    target = self._workdir / os.fspath(file.relative_to(scratch.name))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    epath.Path(file).copy(target, overwrite=True)
            except OSError as error:
                logging.warning("the profile can't be written to %s: %s", self._workdir, error)
