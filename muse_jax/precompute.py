"""Computes ahead what a run's frozen networks would compute in every step: image tokens, text embeddings.

  python -m muse_jax.precompute --config=configs/superres_512.py --out=data/tokens [--text_embeddings] [--epochs=4]

Takes the config of the run that is to train on it, and writes the tokens of its tokenizers (of super-resolution
both) and the captions, as ArrayRecord shards. Then train with the same config and
  --config.data.name=precomputed --config.data.path=data/tokens

On any mesh and any number of processes: on a TPU slice the same command runs on every host, elsewhere every process
gets --coordinator, --num_processes and --process_id, as of `muse_jax.train`. Stopped and started again, it goes on
with the next shard. With --epochs=N there are N different crops, flips and captions of each picture: the first N
epochs of the run see what they would have seen. Tokens of other tokenizers, crops or sizes than the run's are
refused when it starts.

The data's own filters (data.min_side, data.max_aspect) leave out what the tokens then lack; the run that trains on the
tokens has none.

Exit codes: 0 done; 1 an error, said in one message where it is the config's, the data's or another process's; 124
stuck for longer than the config's `deadlines` allow.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_flags

from muse_jax import data, precomputed, specs, stages, train
from muse_jax.data import array_records
from muse_jax.data import precomputed_source as records
from muse_jax.data.loader import Batches
from muse_jax.specs import SpecError
from muse_jax.training import checkpoint, hosts, locks, sharding
from muse_jax.training.watchdog import Watchdog

SPLITS = ("train", "eval")
PER_SHARD = 8192
_SMALL = 2**16  # codes that two bytes can tell apart


@dataclasses.dataclass(frozen=True)
class _Work:
    """One shard: the ids first..last of a split, `number` of `count`."""

    split: str
    first: int
    last: int
    number: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}.array_record"

    def part(self, folder: epath.Path) -> epath.Path:
        """The file that says that the shard is done."""
        return folder / array_records.PARTS / f"{self.split}-{self.number:05d}.json"

    def is_done(self, folder: epath.Path) -> bool:
        """Whether it is, and the shard is still there."""
        return array_records.done(folder, self.part(folder).name, "tokens") is not None


def precompute(
    spec: specs.Spec, out: str, *, text_embeddings: bool = False, epochs: int = 1, per_shard: int = PER_SHARD
) -> dict[str, Any]:
    """Writes the tokens of a run's data, or what is missing of them.

    Args:
      spec: the run that is to train on them, with the data that they are made of.
      out: the folder; all processes must see the same one.
      text_embeddings: whether to write the frozen text encoder's embeddings too.
      epochs: of the training data.
      per_shard: examples a file.

    Returns:
      The manifest.

    Raises:
      SpecError: if the config fits none of this.
      ValueError: if the folder was begun with something else.
    """
    spec = _checked(spec, text_embeddings, epochs, per_shard)
    if not out:
        raise SpecError("--out is empty; name a folder for the shards.")
    out = os.path.expanduser(out)
    with Watchdog(spec.deadlines) as watch, hosts.telling(watch.described):
        _precompute(spec, out, text_embeddings, epochs, per_shard, watch)
    return array_records.read_manifest(out, "tokens")[1]


def _precompute(
    spec: specs.Spec, out: str, text_embeddings: bool, epochs: int, per_shard: int, watch: Watchdog
) -> None:
    vocabulary = data.make_vocabulary(spec.data)
    train.check_vocabulary(spec, vocabulary)
    task = _task(spec, text_embeddings)
    batches = {split: _batches(spec, split) for split in SPLITS if split == "train" or spec.train.eval_batches}
    worked = {"train": epochs}
    if "eval" in batches:
        examples = spec.train.eval_batches * spec.train.batch_size
        worked["eval"] = math.ceil(examples / len(batches["eval"][0])) if _draws(spec.data) else 1
    plan = {
        "key": precomputed.key(spec, task, vocabulary),
        "data": {split: source.fingerprint() for split, (source, _) in batches.items()},
        "epochs": worked,
        "per_shard": per_shard,
        "seed": spec.seed,
        "text_embeddings": text_embeddings,
    }
    folder = epath.Path(out)
    with contextlib.ExitStack() as stack:
        if hosts.from_leader("beginning the shards", lambda: _begun(folder, plan, stack)):
            return
        work = [one for split in batches for one in _work(split, len(batches[split][0]), worked[split], per_shard)]
        features = _features(spec, task, text_embeddings)
        made = {split: made for split, (_, made) in batches.items()}
        watch.enter("restore", 0)
        _Computer(spec, task, vocabulary, made, features, watch).run(folder, work)
        watch.enter("save", len(work))
        hosts.everywhere("computing the shards", lambda: None)  # until all are there

        def write_manifest() -> None:
            parts = [json.loads(one.part(folder).read_text()) for one in work]
            more = {"key": plan["key"], "epochs": worked, "features": features, "seed": spec.seed}
            if spec.data.vocabulary in ("", "captions"):  # the data's own, of which the records lack some captions
                more["vocabulary"] = vocabulary.to_json()
            array_records.write_manifest(folder, "tokens", parts, **more)

        hosts.from_leader("writing the manifest", write_manifest)


def _begun(folder: epath.Path, plan: Mapping[str, Any], stack: contextlib.ExitStack) -> bool:
    """Makes the folder, or finds it; returns whether there is nothing left to do."""
    array_records.check(folder, plan)  # before the lock, which leaves its file
    stack.enter_context(locks.held(folder, "--out"))
    finished = array_records.begin(folder, plan)
    array_records.sweep(folder)
    return finished


def _checked(spec: specs.Spec, text_embeddings: bool, epochs: int, per_shard: int) -> specs.Spec:
    if not isinstance(spec.task, specs.TokensTaskSpec):
        raise SpecError("--config trains a tokenizer; name that of a model which reads tokens.")
    if isinstance(spec.model, specs.MaskGITSpec):
        raise SpecError("--config trains a model of classes; tokens are written with texts: name one that reads texts.")
    if spec.data.name in ("precomputed", "mixture"):
        hint = "precompute each of its sources by itself, and mix those." if spec.data.sources else "it is done."
        raise SpecError(f"data.name is {spec.data.name!r}; {hint}")
    if text_embeddings and spec.model.text.trainable:
        raise SpecError("--text_embeddings: model.text is trained, so that its embeddings change; leave it out.")
    if epochs < 1:
        raise SpecError(f"--epochs is {epochs}; expected at least 1.")
    if per_shard < 1:
        raise SpecError(f"--per_shard is {per_shard}; expected at least 1.")
    if epochs > 1 and not _draws(spec.data):
        raise SpecError(f"--epochs is {epochs}, but with data.crop='center' and no flip all are alike; leave it out.")
    return spec


def _draws(data_spec: specs.DataSpec) -> bool:
    """Whether a picture's crop, flip or caption is drawn anew in each epoch."""
    return data_spec.crop != "center" or data_spec.flip or data_spec.name in ("tfds", "array_record")


def _task(spec: specs.Spec, text_embeddings: bool) -> Any:
    if not text_embeddings and not spec.model.text.trainable:  # no encoder is needed, so none is opened
        spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, text_embeddings=True))
    return stages.build_task(spec, checkpoint.load_stage)


def _batches(spec: specs.Spec, split: str) -> tuple[Any, Batches]:
    source = data.make_source(spec.data, split)
    made = Batches(
        source,
        batch_size=spec.train.batch_size,
        seed=spec.seed,
        split=split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return source, made


def _features(spec: specs.Spec, task: Any, text_embeddings: bool) -> dict[str, Any]:
    """{name: dtype and shape} of what a record has."""

    def tokens(grid: tuple[int, int], codes: int) -> dict[str, Any]:
        return {"dtype": "uint16" if codes <= _SMALL else "int32", "shape": [grid[0] * grid[1]]}

    model = spec.model
    found = {"low_tokens": tokens(model.grid, model.codebook_size)}
    if task.model.super_resolution:
        found = {
            "low_tokens": tokens(model.low_grid, model.low_codebook_size),
            "high_tokens": tokens(model.grid, model.codebook_size),
        }
    if text_embeddings:
        shape = [spec.data.text_length, model.text.width]
        found[records.EMBEDDINGS] = {"dtype": model.dtype, "shape": shape}
    return found


def _work(split: str, length: int, epochs: int, per_shard: int) -> list[_Work]:
    """The shards of a split, none across two epochs."""
    count = math.ceil(length / per_shard)
    return [
        _Work(
            split,
            epoch * length + number * per_shard,
            epoch * length + min((number + 1) * per_shard, length),
            epoch * count + number,
            epochs * count,
        )
        for epoch in range(epochs)
        for number in range(count)
    ]


class _Computer:
    """Computes shards, as many at a time as there are processes: each loads and writes its own."""

    def __init__(
        self,
        spec: specs.Spec,
        task: Any,
        vocabulary: Any,
        batches: Mapping[str, Batches],
        features: Mapping[str, Any],
        watch: Watchdog,
    ):
        self._watch, self._done = watch, 0  # batches
        self._batches, self._features = batches, features
        self._vocabulary, self._text_length = vocabulary, spec.data.text_length
        self._rows = spec.train.batch_size // jax.process_count()
        self._mesh, self._rules = sharding.make_mesh(spec.mesh), spec.rules
        sharding.check_batch(spec, self._mesh)
        self._sharding = sharding.batch_sharding(self._mesh, spec.rules)
        embeddings = records.EMBEDDINGS in features
        frozen = {name: part for name, part in task.frozen().items() if embeddings or name != "text_encoder"}
        layout = sharding.param_specs(frozen, spec.rules, self._mesh)
        frozen = sharding.unbox(frozen)
        self._frozen = sharding.place(frozen, sharding.shardings(frozen, layout, self._mesh))
        self._inputs = ("image", "text_ids", "text_mask") if embeddings else ("image",)
        self._compute = jax.jit(
            lambda frozen, batch: task.precomputable(frozen, batch, embeddings), out_shardings=self._sharding
        )

    def run(self, folder: epath.Path, work: Sequence[_Work]) -> None:
        """Makes the shards that aren't there."""
        with futures.ThreadPoolExecutor(array_records.THREADS) as pool:
            missing = ~np.array(list(pool.map(lambda one: one.is_done(folder), work)))
        missing = multihost_utils.broadcast_one_to_all(missing) if jax.process_count() > 1 else missing
        left = [one for one, wanted in zip(work, missing, strict=True) if wanted]
        processes, mine = jax.process_count(), jax.process_index()
        for start in range(0, len(left), processes):
            group = left[start : start + processes]
            count = max(math.ceil((one.last - one.first) / self._rows) for one in group)
            # A process without a shard of its own takes part in the computation, and writes nothing.
            self._shard(folder, group[min(mine, len(group) - 1)], count, mine < len(group))

    def _shard(self, folder: epath.Path, one: _Work, count: int, wanted: bool) -> None:
        starts = [one.first + number * self._rows for number in range(count)]
        with futures.ThreadPoolExecutor(1) as loading, array_records.ShardWriter(folder, one.name) as writer:
            ahead = loading.submit(self._load, one, starts[0])
            for start, following in zip(starts, [*starts[1:], None], strict=True):
                self._watch.enter("data", self._done)
                batch = ahead.result()
                self._watch.enter("step" if self._done else "compile", self._done)
                made = self._start(batch)
                if following is not None:  # loaded while the devices compute
                    ahead = loading.submit(self._load, one, following)
                found = {name: sharding.take(value) for name, value in made.items()}
                self._done += 1
                if wanted:
                    self._write(writer, {**batch, **found}, min(one.last - start, self._rows))
            self._watch.enter("save", self._done)
            shard = writer.finish() if wanted else None
        if shard:
            array_records.write_json(one.part(folder), {"shards": {one.split: dataclasses.asdict(shard)}})

    def _load(self, one: _Work, start: int) -> dict[str, Any]:
        """A batch of this process; after the shard's last example that one again."""
        made = self._batches[one.split].examples([min(start + row, one.last - 1) for row in range(self._rows)])
        made["text_ids"], made["text_mask"] = self._vocabulary.encode_batch(made["text"], self._text_length)
        return made

    def _start(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        given = sharding.put({name: batch[name] for name in self._inputs}, self._sharding)
        with sharding.layout(self._mesh, self._rules):
            return self._compute(self._frozen, given)

    def _write(self, writer: array_records.ShardWriter, batch: Mapping[str, Any], rows: int) -> None:
        for row in range(rows):
            example = {name: batch[name][row] for name in (*self._features, records.MASK)}
            label = int(batch["label"][row]) if "label" in batch else None
            writer.write(records.pack(example, batch["text"][row], self._features, label))


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        spec = specs.from_config(_CONFIG.value)
        train.join(spec.deadlines)
        manifest = precompute(
            spec,
            _OUT.value,
            text_embeddings=_EMBEDDINGS.value,
            epochs=_EPOCHS.value,
            per_shard=_PER_SHARD.value,
        )
    except Exception as error:
        train.fail(error, (*train.MENDABLE, ValueError, OSError))
    if not hosts.leads():
        return
    for split, found in manifest["splits"].items():
        each = found["bytes"] / found["records"]
        print(f"{split}: {found['records']} records in {len(found['shards'])} shards, {each:.0f} bytes each")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "That of the run which is to train.", lock_config=True)
    _OUT = flags.DEFINE_string("out", None, "Folder of the shards.")
    _EMBEDDINGS = flags.DEFINE_bool("text_embeddings", False, "Also the frozen text encoder's embeddings.")
    _EPOCHS = flags.DEFINE_integer("epochs", 1, "Of the training data: so many crops of each picture.")
    _PER_SHARD = flags.DEFINE_integer("per_shard", PER_SHARD, "Examples a file.")
    train.define_process_flags()
    flags.mark_flags_as_required(["config", "out"])
    app.run(main, flags_parser=train.parse_flags)
