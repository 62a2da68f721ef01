"""Puts trained stages together in one folder that can be sampled from.

    python -m muse_jax.assemble --stages=runs/emoji --pipeline=runs/emoji/pipeline [--dtype=float16]

--stages holds a folder for each stage: tokenizer_low, tokenizer_high, base, superres and, if there is
one, decoder; workdirs of runs, or stage folders. Of one resolution (MaskGIT) it is tokenizer_low and base
alone. A tokenizer that has no folder there is the one that the model was trained with. Of a quickstart's
folder the figures of its report.json go into the pipeline's manifest.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from etils import epath

from muse_jax import process, sample
from muse_jax.evaluate import versions
from muse_jax.sampling import folder as pipeline_folder
from muse_jax.sampling.pipeline import MusePipeline
from muse_jax.training import checkpoint, reading, trees

FIGURES = ("tokenizers", "prompts")  # of report.json
TRAINED_ON = {  # a model's tokenizers, by their names in its config
    "base": {"tokenizer": "tokenizer_low"},
    "superres": {"tokenizer": "tokenizer_high", "low_tokenizer": "tokenizer_low"},
}


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
      PipelineError, StageError: if a stage is missing or damaged, or two don't fit; a model and another
        tokenizer than it was trained on, of the same sizes, too, as far as the model's checkpoints are there.
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
    loaded = {name: checkpoint.load_stage(path) for name, path in found.items()}
    specs = {name: stage.spec for name, stage in loaded.items()}
    pipeline_folder.check(specs)
    for model in filter(loaded.__contains__, TRAINED_ON):
        _check_tokenizers(model, loaded)
    manifest = {
        "command": command,
        "seed": specs["base"].seed,
        "steps": {name: spec.train.steps for name, spec in specs.items()},
        "versions": versions(),
        "figures": dict(figures or {}),
    }
    return MusePipeline.assemble(out, found, manifest=manifest, dtype=dtype)


def _check_tokenizers(model: str, stages: Mapping[str, checkpoint.Stage]) -> None:
    """Codes of another tokenizer mean other things; encoder and codebook, which make them, must be the same bits."""
    trained_on = _frozen(stages[model].path)
    for key, name in TRAINED_ON[model].items():
        prefixes = f"{key}/encoder/", f"{key}/quantizer/"
        wanted = {leaf.removeprefix(f"{key}/"): x for leaf, x in trained_on.items() if leaf.startswith(prefixes)}
        own = trees.fingerprints({part: stages[name].params[part] for part in ("encoder", "quantizer")})
        if wanted and wanted != own:
            raise pipeline_folder.PipelineError(
                f"{model} ({stages[model].path}) was trained on another tokenizer than {name} ({stages[name].path}), "
                f"though of the same sizes; name the one it was trained on, or train {model} again."
            )


def _frozen(folder: str) -> Mapping[str, int]:
    """Fingerprints of the networks that a run was trained on; a stage folder, which isn't its workdir, has none."""
    checkpoints = reading.checkpoints_in(folder)
    for step in reversed(reading.steps_in(checkpoints)):
        with contextlib.suppress(reading.Damaged):
            return reading.read_meta(checkpoints / str(step))["frozen"]
    return {}


def _report(path: epath.Path) -> dict[str, Any]:
    """A quickstart's report.json; {} where there is none."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise pipeline_folder.PipelineError(
            f"{path} is damaged ({error}); delete it to go without its figures, or let the quickstart write it again."
        ) from error


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    process.quiet()
    stages, out = epath.Path(_STAGES.value), epath.Path(_PIPELINE.value)
    try:
        sample.check_above(_PIPELINE.value, "--pipeline")
        figures = _report(stages / "report.json")
        command = figures.get("command", f"python -m muse_jax.train for each stage of {stages.name}")
        chosen = {key: figures[key] for key in FIGURES if key in figures}
        pipeline = assemble(stages, out, command=command, figures=chosen, dtype=_DTYPE.value)
    except (ValueError, OSError, reading.CheckpointError) as error:  # PipelineError and StageError among them
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
