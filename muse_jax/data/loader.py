"""One loader for all data: shuffled, repeatable, sharded by process, its position a step number.

The stream of examples is a function of the seed: position p lies in epoch ``p // len(source)``, and
each epoch is shuffled by itself, by index (`Order`). Batch n
holds positions ``n * batch_size`` and on, so it depends on (seed, n) alone, every example comes once
an epoch, and a restart needs no more than the step. A process makes its own rows of each batch.

A Grain element is a whole batch: sources that can make many examples at once do so, and a step
pays Grain's overhead once.
"""

import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from muse_jax.data import processes
from muse_jax.specs import DataSpec, batch_of
from muse_jax.text.vocabulary import Vocabulary

_STEPS = 2**40  # Grain wants an end; no run gets there
_LISTED = 2**14  # examples up to which an epoch's order is a list
_REBUILDS = 3  # times that loading processes may die, in so many seconds:
_REBUILD_SECONDS = 3600
_STOP_SECONDS = 10.0
_DECODE_THREADS = 16
_SPLIT_STREAM = {"train": 0, "eval": 1}


class Order:
    """A shuffled order of the indices 0..length-1, another in every epoch; ``order[p]`` for any position p."""

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}
        # Grain computes an entry alone, without a list; but it walks 2**16 / length steps to it.
        self._large = grain.MapDataset.range(length).shuffle(seed=seed) if length >= _LISTED else None

    def __getitem__(self, position: int) -> int:
        if self._large is not None:
            return int(self._large[position])
        epoch, at = divmod(position, self._length)
        order = self._epochs.get(epoch)
        if order is None:  # several threads may make it at once, the same
            bits = np.random.PCG64((self._seed, epoch)).random_raw(self._length)  # the same in every NumPy
            order = np.argsort(bits, kind="stable")
            self._epochs = {**{e: o for e, o in self._epochs.items() if abs(e - epoch) < 3}, epoch: order}
        return int(order[at])

    def id(self, position: int) -> int:
        """The example id: ``epoch * length + index``, wrapped so that it stays in int32."""
        epochs = max((2**31 - 1) // self._length, 1)
        return position // self._length % epochs * self._length + self[position]


class Batches:
    """Random access to the batches of a run: ``batches[n]`` is this process's part of batch n.

    Args:
      source: see `muse_jax.data.make_source`.
      batch_size: global.
      seed: of the order, the crops and the flips.
      vocabulary: for `text_ids`; None if `text_length` is 0.
      text_length: ids of a text; 0: the batch has none.
      split: "train" or "eval": different orders from one seed.
      process_index, process_count: which rows: the process_index-th of process_count equal parts.
    """

    def __init__(
        self,
        source: Any,
        *,
        batch_size: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
        text_length: int = 0,
        split: str = "train",
        process_index: int = 0,
        process_count: int = 1,
        skip_batches: Sequence[Sequence[int]] = (),
    ):
        if batch_size % process_count or not 0 <= process_index < process_count:
            raise ValueError(
                f"train.batch_size {batch_size} does not divide into {process_count} processes (this one is "
                f"{process_index}); choose a multiple of {process_count}."
            )
        self._source = source
        self._batch_size = batch_size
        self._skipped = tuple(skip_batches)
        self._rows = batch_size // process_count
        self._first_row = self._rows * process_index
        self._vocabulary = vocabulary
        self._text_length = text_length
        self._seed = int(np.random.SeedSequence((seed % 2**64, _SPLIT_STREAM[split])).generate_state(1)[0])
        self._order = source.order(self._seed) if hasattr(source, "order") else Order(len(source), self._seed)
        self._pool: futures.ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return _STEPS

    def ids(self, step: int) -> list[int]:
        """The example ids of this process's rows of a batch.

        An id is ``epoch * len(source) + index``: ids of one batch differ also where the source is smaller
        than the batch, and the id modulo the source's length leads back to the example.
        """
        start = batch_of(step, self._skipped) * self._batch_size + self._first_row
        return [self._order.id(position) for position in range(start, start + self._rows)]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.make(self.ids(int(step)))

    def make(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """The batch of these examples."""
        made = self.examples(ids)
        texts = made.pop("text", None)
        batch = {"example_id": np.array(ids, np.int32), **made}
        if self._text_length:
            batch["text_ids"], batch["text_mask"] = self._vocabulary.encode_batch(texts, self._text_length)
        if "label" in made:
            batch["label"] = np.asarray(made["label"], np.int32)
        return batch

    def examples(self, ids: Sequence[int]) -> dict[str, Any]:
        """What the source gives, stacked, and the texts as a list; the id decides crop, flip and caption."""
        indices, seeds = [i % len(self._source) for i in ids], [(self._seed, i) for i in ids]
        if hasattr(self._source, "batch"):
            return dict(self._source.batch(indices, seeds))
        threads = min(os.cpu_count() or 1, _DECODE_THREADS, len(indices))
        if self._pool is None:  # made here, since a pool cannot be sent to another process
            self._pool = futures.ThreadPoolExecutor(threads, "decode")
        # A few long tasks: handing over each example would take longer than an example from memory.
        tasks = [self._pool.submit(self._read, indices[i::threads], seeds[i::threads]) for i in range(threads)]
        parts = [task.result() for task in tasks]
        examples = [parts[row % threads][row // threads] for row in range(len(indices))]
        made = {key: [example[key] for example in examples] for key in examples[0]}
        return {key: values if key == "text" else np.stack(values) for key, values in made.items()}

    def _read(self, indices: Sequence[int], seeds: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        return [self._source.example(index, seed) for index, seed in zip(indices, seeds, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


class Loader:
    """Iterates over batches start_step, start_step + 1, ... without end, some made ahead in the background.

    Attributes:
      batches: random access to any batch.
      step: of the batch that comes next.
    """

    def __init__(self, batches: Batches, *, start_step: int = 0, prefetch: int = 2, workers: int = 0):
        self.batches = batches
        self.step = start_step
        self._prefetch = max(prefetch, 0)
        self._workers = workers
        self._rebuilt: list[float] = []  # when, in seconds
        self._running: list[Any] = []
        # At the interpreter's end Grain's own clean-up comes too late.
        self._finalizer = weakref.finalize(self, _stop, self._running)
        self._running.append(self._build())

    def _build(self) -> Any:
        dataset = grain.MapDataset.source(self.batches)[self.step :]
        if not self._workers:
            options = grain.ReadOptions(num_threads=min(self._prefetch, 4), prefetch_buffer_size=self._prefetch)
            return iter(dataset.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():  # Grain's processes read its flags, and this may be no absl command
            flags.FLAGS.mark_as_parsed()
        # One thread a process: the processes are what runs at the same time.
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=max(self._prefetch // self._workers, 1)
        )
        self._processes = processes.Processes()
        return iter(dataset.mp_prefetch(options, worker_init_fn=self._processes.started))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._running:
            raise ValueError("This loader is closed.")
        while True:
            try:
                batch = self._processes.next(self._running[0]) if self._workers else next(self._running[0])
                break
            except RuntimeError as error:
                # A loading process was killed (for memory, perhaps). The position is only a number, so start anew.
                now = time.monotonic()
                self._rebuilt = [then for then in self._rebuilt if now - then < _REBUILD_SECONDS]
                if not self._workers or len(self._rebuilt) == _REBUILDS:
                    raise
                self._rebuilt.append(now)
                logging.error("Loading processes failed at step %d (%s); starting them again.", self.step, error)
                self._processes.kill()
                _stop_soon(self._running)
                self._running.append(self._build())
        self.step += 1
        # Arrays of other processes lie in shared memory that Grain takes back when they are dropped.
        return {key: np.array(value) for key, value in batch.items()} if self._workers else batch

    def close(self) -> None:
        """Stops threads and processes; what they had made ahead is lost."""
        _stop_soon(self._running)


def _stop(running: list[Any]) -> None:
    while running:
        running.pop().close()


def _stop_soon(running: list[Any]) -> None:
    """Stops what can be stopped in `_STOP_SECONDS`. Grain joins its threads, and one that asks a process which ended as
    if all were well for its next batch does so for ever; it is left behind."""
    thread = threading.Thread(target=_stop, args=([*running],), daemon=True, name="muse_jax stopping")
    running.clear()
    thread.start()
    thread.join(_STOP_SECONDS)


def make_loader(
    spec: DataSpec,
    *,
    batch_size: int,
    seed: int,
    vocabulary: Vocabulary | None = None,
    split: str = "train",
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_batches: Sequence[Sequence[int]] = (),
    source: Any = None,
) -> Loader:
    """The loader that the data section of a config describes.

    Args:
      spec: the data section.
      batch_size: global; each process gets its batch_size / process_count rows.
      seed: with the step, all that decides which examples a batch has.
      vocabulary: what `muse_jax.data.make_vocabulary` made, or the one a stage was trained with.
      split: "train" or "eval".
      start_step: the first batch's number; a loader started there goes on as one started at 0.
      process_index, process_count: of this process.
      skip_batches: train.skip_batches of a config.
      source: one already made; by default `make_source(spec, split)`.

    Returns:
      An endless iterator over dicts with `example_id` int32 [b], `image` uint8 [b, h, w, 3], and, where
      the data and the spec have them, `text_ids` int32 and `text_mask` bool [b, t], `label` int32 [b].
      Precomputed data have `low_tokens` and `high_tokens` int32 [b, n] in the place of `image`, and with
      data.text_embeddings `text_embeddings` [b, t, d] in that of `text_ids`.

    Raises:
      ValueError: if text is asked for and there is no vocabulary or there are no captions, or the batch
        does not divide by the processes.
    """
    from muse_jax.data import make_source

    if split not in _SPLIT_STREAM:
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'.")
    source = make_source(spec, split) if source is None else source
    text_length = 0 if spec.text_embeddings else spec.text_length
    if text_length and vocabulary is None:
        raise ValueError("data.text_length asks for text, but no vocabulary was given; pass make_vocabulary(spec).")
    if text_length and "text" not in source[0]:
        raise ValueError(f"data.text_length asks for text, but data.name={spec.name!r} gives no captions here.")
    batches = Batches(
        source,
        batch_size=batch_size,
        seed=seed,
        vocabulary=vocabulary,
        text_length=text_length,
        split=split,
        process_index=process_index,
        process_count=process_count,
        skip_batches=skip_batches,
    )
    return Loader(batches, start_step=start_step, prefetch=spec.prefetch, workers=spec.workers)
