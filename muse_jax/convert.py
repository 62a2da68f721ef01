"""Converts pictures with captions to ArrayRecord shards, which the loader reads in any order.

  python -m muse_jax.convert --from=webdataset --path=data/laion --out=data/pairs     # img2dataset's tars
  python -m muse_jax.convert --from=folder --path=my/pictures --out=data/pairs
  python -m muse_jax.convert --from=parquet --path='data/*.parquet' --out=data/pairs  # Hugging Face's shards
  python -m muse_jax.convert --from=tfds --dataset=coco_captions --text_key=captions/text --out=data/pairs

Then train with --config.data.name=array_record --config.data.path=data/pairs. Pictures keep their files'
bytes; each is decoded once, and what cannot be used is skipped, counted and named in DIR/manifest.json
(the first few of each reason; all of them in DIR/parts). Stopped at any point and started again, it goes on;
shards that are gone are made again. A source that changed meanwhile, and a folder with something else, are refused.

An Apache Beam pipeline (`pip install 'muse_jax[convert]'`). By default it runs here, in --workers processes;
any other flag is Beam's, so that Dataflow, Flink or Spark do it for sets that are too large for one machine:
  ... --out=gs://bucket/pairs --runner=DataflowRunner --project=P --region=R --temp_location=gs://bucket/tmp
Their workers need this package: see Beam's --setup_file and --sdk_container_image.

Exit codes: 0 done; 1 refused or failed, with one message.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from muse_jax.data import array_records, conversion, folders, inputs
from muse_jax.training import locks


def convert(job: conversion.Conversion, beam_flags: Sequence[str] = (), workers: int = 0) -> dict[str, Any]:
    """Converts all of a source, or what is missing of it.

    Args:
      job: what to convert, and where to.
      beam_flags: Beam's own; by default the pipeline runs in processes of this machine.
      workers: processes of this machine; 0: one for each of its cores.

    Returns:
      The manifest.

    Raises:
      ValueError: if the input can't be read, or the folder is another conversion's.
      resume.ResumeError: if another process is at work in the folder.
    """
    options = _options(beam_flags, workers or os.cpu_count() or 1)
    pieces = job.source.pieces()
    folder, plan = epath.Path(job.out), job.plan(pieces)
    array_records.check(folder, plan)  # before the lock, which leaves its file
    with locks.held(job.out, "--out"):
        if not array_records.begin(folder, plan):
            array_records.sweep(folder)
            _run(job, pieces, options)
    return json.loads((folder / array_records.MANIFEST).read_text())


def _run(job: conversion.Conversion, pieces: Sequence[inputs.Piece], options: Any) -> None:
    import apache_beam as beam

    numbered = [(number, len(pieces), piece) for number, piece in enumerate(pieces)]
    with beam.Pipeline(runner=_runner(options), options=options) as pipeline:
        parts = (
            pipeline
            | beam.Create(numbered)
            | beam.Reshuffle()  # each piece by itself, on whichever worker is free
            | beam.Map(lambda one: (one[0], job.convert(*one)))
        )
        # By number, since Beam keeps no order.
        _ = (
            parts
            | beam.combiners.ToList()
            | beam.Map(lambda found: job.write_manifest([part for _, part in sorted(found, key=lambda one: one[0])]))
        )


def _options(flags: Sequence[str], workers: int) -> Any:
    """Beam's options; unlike Beam's own reading of them, a flag that no runner knows is an error."""
    from apache_beam.options.pipeline_options import PipelineOptions

    mode = "multi_processing" if workers > 1 else "in_memory"
    ours = [f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    options = PipelineOptions([*ours, "--default_sdk_harness_log_level=CRITICAL", *flags])
    known = {"runner", *options.get_all_options()}
    for before, flag in itertools.pairwise(["=", *flags]):
        if not flag.startswith("-") and "=" in before:
            raise inputs.InputError(f"unexpected argument {flag!r}; flags are --name=value.")
        name = flag.split("=")[0].lstrip("-")
        if flag.startswith("-") and name not in known and name.removeprefix("no_") not in known:
            close = difflib.get_close_matches(name, [*known, *_FLAGS], n=1)
            hint = f" Did you mean --{close[0]}?" if close else ""
            raise inputs.InputError(f"--{name} is no flag of this command or of Beam.{hint}")
    return options


def _runner(options: Any) -> Any:
    """The runner that the flags name, else the one that runs pipelines on this machine.

    Beam's own default would first try another one, which it has to download.
    """
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    named = options.view_as(StandardOptions).runner
    if named:
        return named
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # an error comes as an exception, too
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(provision))


def summary(manifest: dict[str, Any]) -> str:
    """How many there are of each split, and of each reason for which samples were skipped; and the notes."""
    lines = [
        f"{split}: {found['records']} pictures in {len(found['shards'])} shards, {found['bytes'] / 1e6:.1f} MB"
        for split, found in sorted(manifest["splits"].items())
    ]
    for word, listed in (("skipped", manifest["skipped"]), ("noted", manifest.get("notes", {}))):
        for reason, found in sorted(listed.items()):
            more = ", ..." if found["count"] > len(found["first"]) else ""
            lines.append(f"{word} {found['count']}, {reason}: {', '.join(found['first'])}{more}")
    return "\n".join(lines)


_FLAGS = ("from", "path", "out", "dataset", "split", "image_key", "text_key", "per_shard", "eval_share", "min_side")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m muse_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from", dest="format", required=True, choices=inputs.FORMATS)
    parser.add_argument("--path", help="what to read: a folder, a file, or a pattern (* ? **); TFDS: its data_dir")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--dataset", help="tfds: name, such as coco_captions")
    parser.add_argument("--split", help="tfds: which split is read")
    parser.add_argument("--image_key", help="parquet, tfds: column or feature with the pictures")
    parser.add_argument("--text_key", help="column or feature with the captions; webdataset: key of the .json")
    parser.add_argument("--per_shard", type=int, help="folder, tfds: samples a shard")
    parser.add_argument(
        "--eval_share",
        type=float,
        default=folders.EVAL_SHARE,
        help="of the samples, by the hash of their keys, that go to the split test (%(default)s); a folder with "
        "sub-folders train and test keeps those",
    )
    parser.add_argument("--min_side", type=int, default=0, help="skip pictures whose shorter side has fewer pixels")
    parser.add_argument(
        "--max_aspect", type=float, default=0.0, help="skip pictures whose longer side is more times the shorter"
    )
    parser.add_argument("--allow_no_caption", action="store_true", help="keep pictures without one (for tokenizers)")
    parser.add_argument("--workers", type=int, default=0, help="processes of this machine (one for each core)")
    return parser


def _job(options: argparse.Namespace) -> conversion.Conversion:
    _check(options)
    cls = inputs.FORMATS[options.format]
    takes = {field.name: field for field in dataclasses.fields(cls)}
    given = {
        name: getattr(options, name)
        for name in ("path", "dataset", "split", "image_key", "text_key", "per_shard")
        if getattr(options, name) is not None
    }
    for name in given:
        if name not in takes:
            raise inputs.InputError(f"--{name} means nothing to --from={options.format}; leave it out.")
    for name, field in takes.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise inputs.InputError(f"--from={options.format} needs --{name}.")
    if "needs_text" in takes:
        given["needs_text"] = not options.allow_no_caption
    return conversion.Conversion(
        cls(**given),
        out=os.path.expanduser(options.out),
        eval_share=options.eval_share,
        needs_text=not options.allow_no_caption,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
    )


def _check(options: argparse.Namespace) -> None:
    """Refuses values of flags that mean nothing, before anything is begun."""
    if not options.out:
        raise inputs.InputError("--out is empty; name a folder for the shards.")
    if options.workers < 0:
        raise inputs.InputError(f"--workers is {options.workers}; expected at least 1, or 0 for one for each core.")
    if not 0 <= options.eval_share < 1:
        raise inputs.InputError(f"--eval_share is {options.eval_share}; expected 0 <= share < 1.")
    if options.min_side < 0:
        raise inputs.InputError(f"--min_side is {options.min_side}; expected at least 0 pixels.")
    if options.max_aspect and not 1 <= options.max_aspect < math.inf:
        raise inputs.InputError(f"--max_aspect is {options.max_aspect}; a longer side is at least once the shorter.")
    if options.per_shard is not None and options.per_shard < 1:
        raise inputs.InputError(f"--per_shard is {options.per_shard}; expected at least 1.")


def _message(error: Exception) -> str:
    """An error in one line; of one within the pipeline, which Beam wraps in its traceback, the innermost."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, RuntimeError):
        lines = [f"{type(error).__name__}: {' '.join(lines)}"]
    said = lines[-1] if lines else type(error).__name__
    if said.startswith("Channel closed prematurely"):  # all that Beam says of it
        return "A worker process ended (killed, perhaps for memory); start again to go on, with fewer --workers."
    return re.sub(r"^(RuntimeError: )?(\w+\.)*(?=\w+: )", "", said).split(" [while running ")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options, beam_flags = _parser().parse_known_args(arguments)
    try:
        manifest = convert(_job(options), beam_flags, options.workers)
    except ModuleNotFoundError as error:
        print(f"{error}; pip install 'muse_jax[convert]'.", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(_message(error), file=sys.stderr)
        return 1
    print(summary(manifest))
    if options.eval_share and "train" in manifest["splits"] and "test" not in manifest["splits"]:
        print(
            f"No picture went to the split test, of --eval_share={options.eval_share}. To evaluate, set "
            "config.data.eval_split=train, or convert into another --out with a larger --eval_share.",
            file=sys.stderr,
        )
    if not manifest["splits"]:
        print(f"Nothing of {options.path or options.dataset} is usable.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
