"""Checkpoints of a run: Orbax items params, ema, optimizer and meta, saved separately under checkpoints/STEP.

A checkpoint is trusted when the leaves' fingerprints, stored in its meta, are those of what was
read. One that isn't is renamed to corrupt-STEP and the one before is used; a run whose checkpoints
are all damaged stops, it never starts again at step 0 by itself. One that can't be read at the moment
stops the run too, and stays.
"""

import contextlib
import functools
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from muse_jax.training import executable, hosts, replicas, trees
from muse_jax.training.reading import (
    FORMAT,
    CheckpointError,
    Damaged,
    brief,
    checkpoints_in,
    difference,
    read_arrays,
    read_meta,
    sealed,
    steps_in,
)
from muse_jax.training.stage import Stage, StageError, load_stage, save_stage

__all__ = ["CheckpointError", "Checkpoints", "Stage", "StageError", "load_stage", "read_meta", "save_stage"]

ARRAYS, META = ("params", "ema", "optimizer"), "meta"  # the items
TRASH = ".todelete"  # what is deleted is renamed into this first: half a deletion must not look like a step
MOST_FAILURES = 3  # saves that may fail one after the other
SAVED = ".saved"  # beside checkpoints/, with the newest step: that there was a checkpoint once
_NEVER = 10**7  # seconds; Orbax has no other word for it
_NEVER_LACKING = 16 * 2**20  # bytes
_PROBED = 2**16  # bytes that a disk must take before a save begins


class Checkpoints:
    """The checkpoints of one run, which holds the workdir's lock."""

    def __init__(self, workdir: Any, keep: int, items: Mapping[str, Mapping[str, Any]], seconds: float = 1200):
        """Looks whether checkpoints can be written, and removes what a killed run left half written.

        Args:
          workdir: the run's.
          keep: so many are kept, the newest.
          items: what will be saved, {item: {leaf's name: array or ShapeDtypeStruct with sharding}}.
          seconds: after which a save that is under way has failed; 0: never.
        """
        self.folder = checkpoints_in(workdir)
        self._in_bucket = "://" in str(self.folder)
        self.keep, self.seconds = keep, math.ceil(seconds) or _NEVER
        self._at_once = _written_at_once([leaf for leaves in items.values() for leaf in leaves.values()])
        self.failures = 0
        self._saving: int | None = None
        self._opened = 0
        self._probe()
        self._purge()
        self._manager: ocp.CheckpointManager | None = self._open()  # None after a save that failed

    def _probe(self) -> None:
        """Fails now, and not at the first checkpoint, where nothing can be written or where hosts have disks apart."""
        shared = self.folder / ".probe"
        token = hosts.from_leader("writing to the workdir", lambda: self._write(shared), CheckpointError)
        hosts.everywhere("writing to the workdir", lambda: self._write_beside(shared, token), CheckpointError)
        hosts.from_leader("tidying the workdir", shared.unlink, CheckpointError)

    def _write(self, probe: epath.Path) -> str:
        token = uuid.uuid4().hex
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(token)
        except Exception as error:  # TensorFlow's errors, of buckets, are no OSErrors
            problem = f"can't write checkpoints to {self.folder} ({error}); choose another --workdir."
            raise CheckpointError(problem) from error
        return token

    def _write_beside(self, shared: epath.Path, token: str) -> None:
        try:
            if shared.read_text() != token:
                raise FileNotFoundError(shared)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.folder} is not the same folder in all processes; choose a --workdir that all hosts share."
            ) from error
        probe = self.folder / f".probe-{jax.process_index()}"
        self._write(probe)
        try:
            probe.rename(self.folder / f"{probe.name}-renamed").unlink()
        except Exception as error:  # TensorFlow's errors, of buckets, are no OSErrors
            problem = f"can't write checkpoints to {self.folder} ({error}); choose another --workdir."
            raise CheckpointError(problem) from error

    def _purge(self) -> None:
        if hosts.leads() and (self.folder / TRASH).exists():
            (self.folder / TRASH).rmtree(missing_ok=True)

    def _open(self, sweep: bool = True) -> ocp.CheckpointManager:
        self._opened += 1
        if hosts.several():  # waits for other processes with time limits, which Orbax's own barriers lack
            flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
        # After a failure some processes may have passed barriers that others have not.
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"open-{self._opened}")
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(META, ocp.args.JsonSave, ocp.JsonCheckpointHandler(multiprocessing_options=processes))
        limits = {"save_concurrent_gb": self._at_once / 1e9, "multiprocessing_options": processes}
        for item in ARRAYS:
            handlers.add(item, ocp.args.StandardSave, ocp.StandardCheckpointHandler(**limits))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            cleanup_tmp_directories=sweep,  # of a run that was killed; we hold the lock
            todelete_subdir=TRASH,
            enable_async_checkpointing=True,
            should_save_fn=lambda *_: True,
            async_options=ocp.AsyncOptions(timeout_secs=self.seconds),
            multiprocessing_options=processes,
        )
        try:
            return ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)
        except Exception as error:
            hint = "; Orbax asks for the right storage.buckets.get, beside those of objects" if self._in_bucket else ""
            raise CheckpointError(f"can't look into {self.folder} ({brief(error)}){hint}.") from error

    def save(self, step: int, items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
        """Starts to save {item: {leaf's name: array}}; the arrays must stay as they are until it is done.

        A save that fails is logged, tidied away and counted; training goes on, and `due_again` says
        that it should be tried again soon.

        Raises:
          CheckpointError: after `MOST_FAILURES` failed saves one after the other.
          ReplicaError: devices hold different bits; nothing is saved.
        """
        self.finish()
        prints = {item: replicas.fingerprints(leaves) for item, leaves in items.items()}
        described = {
            item: {n: (*shape_dtype, prints[item][n]) for n, shape_dtype in trees.describe(dict(leaves)).items()}
            for item, leaves in items.items()
        }
        meta = sealed({"format": FORMAT, "step": step, **meta, "leaves": json.loads(json.dumps(described))})
        args = {item: ocp.args.StandardSave(trees.nest(leaves)) for item, leaves in items.items()}
        self._saving = step
        try:
            hosts.everywhere("preparing a checkpoint", lambda: self._check_space(items))
            composite = ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta))
            hosts.everywhere("starting a checkpoint", lambda: self._start(step, composite))
        except Exception as error:
            self._failed(error)

    def _start(self, step: int, items: Any) -> None:
        if self._manager is None:
            self._manager = self._open(sweep=False)
        self._manager.save(step, args=items, force=True)

    def _check_space(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        size = sum(leaf.nbytes for leaves in items.values() for leaf in leaves.values())
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:  # gs://
            return
        probe = self.folder / f".probe-{jax.process_index()}"
        probe.write_bytes(bytes(_PROBED))
        probe.unlink()
        if free < 1.1 * size:
            raise OSError(f"a checkpoint takes up to {size / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free")

    def poll(self) -> None:
        """Notices a save that has ended, well or not; returns at once.

        Several processes would notice at different steps, so they look together, before the next save.
        """
        if self._saving is not None and not hosts.several() and not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> bool:
        """Waits for the save that is under way. Returns whether the last one went well."""
        if self._saving is None:
            return self.failures == 0
        try:
            hosts.everywhere("a checkpoint", self._wait)
            hosts.from_leader("a checkpoint", self._look)
        except Exception as error:
            self._failed(error)
            return False
        self._saving, self.failures = None, 0
        self._purge()
        return True

    def _wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _look(self) -> None:
        if self._saving not in steps_in(self.folder):
            raise CheckpointError("it isn't there")
        try:
            (self.folder.parent / SAVED).write_text(str(self._saving))
        except Exception as error:  # the step itself is whole
            logging.warning("%s can't be written: %s", self.folder.parent / SAVED, brief(error))

    @property
    def due_again(self) -> bool:
        """Whether the last save failed."""
        return self.failures > 0 and self._saving is None

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self.failures += 1
        manager, self._manager = self._manager, None
        try:
            if manager is not None:
                manager.close()
        except Exception as closing:
            logging.info("closing the checkpoint manager: %s", brief(closing))
        hosts.from_leader("tidying after a checkpoint", lambda: self._tidy(step))
        if self.failures >= MOST_FAILURES:
            raise CheckpointError(
                f"saving a checkpoint to {self.folder} failed {self.failures} times, now at step {step}: "
                f"{brief(error)}. Older checkpoints are intact: {self._intact()}."
            ) from error
        logging.warning("saving the checkpoint of step %s failed, training goes on: %s", step, brief(error))

    def _intact(self) -> str:
        try:
            return str(steps_in(self.folder))
        except Exception as error:
            return f"which, storage doesn't say ({brief(error)})"

    def _tidy(self, step: int | None) -> None:
        """Removes what a failed save left. Some of Orbax's threads may still be writing, so several times."""
        for _ in range(20):
            with contextlib.suppress(Exception):  # storage may be what failed; the next start sweeps
                partial = list(self.folder.glob(f"{step}.*"))
                if self._in_bucket and step not in steps_in(self.folder):
                    partial += self.folder.glob(str(step))
                if not partial:
                    return
                for folder in partial:
                    folder.rmtree(missing_ok=True)
            time.sleep(0.1)

    def restore(self, wanted: Mapping[str, Mapping[str, Any]], check: Any) -> tuple[dict, dict] | None:
        """The newest checkpoint that is whole, or None where there has never been one.

        Args:
          wanted: {item: {leaf's name: ShapeDtypeStruct with sharding}}.
          check: called with each meta before its arrays are read; raises to refuse it.

        Returns:
          ({item: {leaf's name: array}}, meta).

        Raises:
          CheckpointError: if none is whole, one can't be read since storage fails, or the newest holds other
            parameters than are wanted.
        """
        for step in hosts.from_leader("looking for checkpoints", lambda: steps_in(self.folder)[::-1]):
            try:
                return self._restore(self.folder / str(step), wanted, check)
            except Damaged as error:
                self._set_aside(step, error)
        hosts.from_leader("looking for what is left of checkpoints", self._check_none_was_lost, CheckpointError)
        return None

    def _check_none_was_lost(self) -> None:
        aside = sorted(p.name for p in self.folder.glob("corrupt-*"))
        saved = self.folder.parent / SAVED
        if aside or saved.exists():
            lost = f"set aside as damaged: {', '.join(aside)}" if aside else f"that of step {saved.read_text()} is gone"
            raise CheckpointError(
                f"no whole checkpoint is left in {self.folder}; {lost}. "
                "Bring one back from a copy, or start again in another --workdir."
            )

    def _restore(self, folder: epath.Path, wanted: Mapping[str, Mapping[str, Any]], check: Any) -> tuple[dict, dict]:
        meta = _read_together(f"reading {folder}/meta", lambda: read_meta(folder) if hosts.leads() else None)
        check(meta)
        for item, leaves in wanted.items():
            ours = trees.describe(dict(leaves))
            stored = {n: (shape, dtype) for n, (shape, dtype, _) in meta["leaves"].get(item, {}).items()}
            if ours != stored:
                raise CheckpointError(
                    f"{folder}: {item} isn't what this version of the code makes of the config: "
                    f"{difference(stored, ours)}."
                )
        restored, found = {}, {}

        def read(item: str) -> None:
            found[item] = read_arrays(folder, item, wanted[item], meta["leaves"][item])

        for item in wanted:
            _read_together(f"reading {folder}/{item}", functools.partial(read, item))
            restored[item], prints = _settled(found.pop(item))
            for name, value in prints.items():
                if value != meta["leaves"][item][name][2]:
                    raise Damaged(f"{item}/{name} isn't what was saved")
        return restored, meta

    def _set_aside(self, step: int, error: Exception) -> None:
        hosts.from_leader("setting a damaged checkpoint aside", lambda: self._rename_damaged(step, error))
        self._manager.reload()

    def _rename_damaged(self, step: int, error: Exception) -> None:
        name = f"corrupt-{step}"
        tries = 1
        while (self.folder / name).exists():
            tries += 1
            name = f"corrupt-{step}-{tries}"
        (self.folder / str(step)).rename(self.folder / name)
        logging.error("the checkpoint of step %d is damaged (%s); set aside as %s", step, error, self.folder / name)

    def close(self) -> None:
        """Waits for what is being saved; errors are raised."""
        self.finish()
        if self._manager is not None:
            self._manager.close()


def _written_at_once(leaves: Iterable[Any]) -> int:
    """Bytes that this process compresses and writes at a time: twice its largest array, or a sixteenth of all.

    Orbax would take all at once, for which the host needs as much memory again. What no host lacks is not held back:
    Orbax takes a quarter longer where many small arrays wait for their turn.
    """

    def held(leaf: Any) -> int:
        whole = leaf.size * leaf.dtype.itemsize
        return min(whole, len(leaf.sharding.addressable_devices) * executable.device_bytes(leaf))

    sizes = [held(leaf) for leaf in leaves]
    return max(2 * max(sizes), sum(sizes) // 16, _NEVER_LACKING)


def _read_together(what: str, read: Callable[[], Any]) -> Any:
    """Calls `read` in every process and returns what process 0's returned.

    Processes must not part over one that could not read what another one could: all raise Damaged if any of them found
    damage, and CheckpointError (its own error where it was) if one failed otherwise, upon which nothing is set aside.
    """

    def tried() -> dict[str, Any]:
        try:
            return {"value": read()}
        except Damaged as error:
            return {"damage": str(error)}

    answers = hosts.everywhere(what, tried, CheckpointError)
    for answer in answers:
        if "damage" in answer:
            raise Damaged(answer["damage"])
    return answers[0]["value"]


def _settled(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """Copies in memory that a step may be donated, which that of arrays made by Orbax may not be; fingerprints."""
    shards = {name: leaf.sharding for name, leaf in leaves.items()}
    copies = jax.jit(lambda leaves: {n: jnp.copy(x) for n, x in leaves.items()}, out_shardings=shards)(leaves)
    return copies, replicas.fingerprints(copies)
