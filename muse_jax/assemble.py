"""Puts trained stages together in one folder that can be sampled from.

    python -m muse_jax.assemble --stages=runs/emoji --pipeline=runs/emoji/pipeline [--dtype=float16]

--stages holds a folder for each stage: tokenizer_low, tokenizer_high, base, superres and, if there is
one, decoder; workdirs of runs, or stage folders. Of one resolution (MaskGIT) it is tokenizer_low and base
alone. A tokenizer that has no folder there is the one that the model was trained with. Of a quickstart's
folder the figures of its report.json go into the pipeline's manifest.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from etils import epath

from muse_jax import process
from muse_jax.evaluate import versions
from muse_jax.sampling import folder as pipeline_folder
from muse_jax.sampling.pipeline import MusePipeline
from muse_jax.training import checkpoint, reading

FIGURES = ("tokenizers", "prompts")  # of report.json


def assemble(
    stages: os.PathLike[str],
    out: os.PathLike[str],
    *,
    command: str,
    figures: Mapping[str, Any] | None = None,
    dtype: str = "",
) -> MusePipeline:
    """Writes the pipeline folder `out` from the folders below `stages`, and returns it opened.

    Args:
      stages: holds a folder for each stage; it and `out` may be in a bucket (gs://).
      out: replaced if it is a pipeline already.
      command: what made the stages, for the manifest.
      figures: measured on the pipeline, for the manifest.
      dtype: what the parameters are stored as; "" as they are.

    Raises:
      PipelineError, StageError: if a stage is missing or damaged, or two don't fit.
    """
    stages = epath.Path(stages)
    found = {name: str(stages / name) for name in pipeline_folder.STAGES if (stages / name).exists()}
    for model, tokenizer in (("base", "tokenizer_low"), ("superres", "tokenizer_high")):
        if model in found and tokenizer not in found:
            found[tokenizer] = checkpoint.load_stage(found[model]).spec.task.tokenizer
    missing = [name for name in pipeline_folder.needed(found) if name not in found]
    if missing:
        raise pipeline_folder.PipelineError(
            f"{stages} has no folder for {' and '.join(missing)}; train it with --workdir={stages / missing[0]}."
        )
    specs = {name: checkpoint.load_stage(path).spec for name, path in found.items()}
    manifest = {
        "command": command,
        "seed": specs["base"].seed,
        "steps": {name: spec.train.steps for name, spec in specs.items()},
        "versions": versions(),
        "figures": dict(figures or {}),
    }
    return MusePipeline.assemble(out, found, manifest=manifest, dtype=dtype)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    process.quiet()
    stages, out = epath.Path(_STAGES.value), epath.Path(_PIPELINE.value)
    report = stages / "report.json"
    figures = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    command = figures.get("command", f"python -m muse_jax.train for each stage of {stages.name}")
    try:
        chosen = {key: figures[key] for key in FIGURES if key in figures}
        pipeline = assemble(stages, out, command=command, figures=chosen, dtype=_DTYPE.value)
    except (pipeline_folder.PipelineError, checkpoint.StageError, reading.CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    size = sum(path.stat().length for stage in pipeline.stages for path in (out / stage).iterdir())
    print(f"{out}: {size / 2**20:.1f} MiB. To sample from it:")
    print(f'  python -m muse_jax.sample --pipeline={out} --{"class_label" if pipeline.classes else "prompt"}="..."')


if __name__ == "__main__":
    _STAGES = flags.DEFINE_string("stages", None, "Holds a folder for each trained stage.")
    _PIPELINE = flags.DEFINE_string("pipeline", None, "The folder to write; a pipeline that is there is replaced.")
    _DTYPE = flags.DEFINE_enum("dtype", "", ["", "float16", "float32"], "What the parameters are stored as.")
    flags.mark_flags_as_required(["stages", "pipeline"])
    app.run(main)
