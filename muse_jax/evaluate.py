"""Measures a pipeline: how well its pictures follow prompts, and what its tokenizers lose.

    python -m muse_jax.evaluate --pipeline=DIR [--num_prompts=500 --seed=0 --out=FILE]

Held-out prompts of generated scenes are drawn with the pipeline's own sampler settings, and a
reader that sees nothing but the pixels says which of each caption's statements hold: how many
objects there are, the shape, colour and size of each, how they stand, the background. Beside that:
the same without guidance, prompts with combinations of colour and shape that no training picture
had, and PSNR, SSIM, codebook usage and readability of the tokenizers' reconstructions of true
pictures, which bound what any model of their tokens can reach.

Of a pipeline with classes (MaskGIT) it is the share of pictures that show one object, of the right
colour and shape.

With --editing, how well it edits true pictures is measured instead: inpainting, mask-free editing
and outpainting. With --sweep, what mask schedules, numbers of steps and samplers do to the base model's
pictures: accuracy and Fréchet distance, as a table, sweep.json and sweep.png.

For a pipeline trained on other pictures, only the tokenizers can be measured (on the pictures that
its config holds out; `--data_path` names their folder where it has moved).

The figures are printed as a table and written as JSON, with settings, seed and versions.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from muse_jax import sample
from muse_jax.data import make_source, scenes
from muse_jax.evaluation import classes, edits, prompts, reconstruction, sweep
from muse_jax.sampling import folder
from muse_jax.specs import DataSpec

WORKERS = 2  # threads that draw pictures and read them


class EvaluationError(ValueError):
    """Something that cannot be measured; the message says why and what to do."""


def evaluate(
    pipeline: Any,
    count: int = 500,
    *,
    unguided: int = 100,
    held_out: int = 100,
    reconstructed: int = 500,
    seed: int = 0,
    data_path: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """All figures of a pipeline.

    Args:
      pipeline: a `MusePipeline`.
      count: prompts of the test split.
      unguided: the first of them that are drawn without guidance too, at most `count`; 0: none.
      held_out: prompts of the held-out combinations, at most `count`; 0: none.
      reconstructed: pictures that the tokenizers are tried on, at most `count` of scenes.
      seed: of the scenes and the sampling.
      data_path: where a pipeline's own pictures lie now.
      progress: shows a bar.

    Returns:
      tokenizers: see `measure_tokenizers`; prompts: see `measure_prompts`, or classes: see
      `classes.measure`, missing where the pipeline was not trained on scenes; evaluation: how it was measured.
    """
    start = time.monotonic()
    figures: dict[str, Any] = {}
    if _knows_scenes(pipeline):
        reconstructed = min(reconstructed, count)
        figures["tokenizers"] = measure_tokenizers(pipeline, reconstructed, seed=seed)
        if pipeline.classes:
            figures["classes"] = classes.measure(pipeline, count, unguided=min(unguided, count), seed=seed)
        else:
            figures["prompts"] = measure_prompts(
                pipeline, count, unguided=min(unguided, count), held_out=min(held_out, count), seed=seed,
                progress=progress,
            )  # fmt: skip
    else:
        figures["tokenizers"] = measure_tokenizers(pipeline, reconstructed, seed=seed, data_path=data_path)
    figures["evaluation"] = {
        "seed": seed,
        "sampler": {
            name: dataclasses.asdict(stage.spec.sample)
            for name, stage in pipeline.stages.items()
            if name in ("base", "superres")
        },
        "batch_size": pipeline.max_batch_size,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
    }
    return figures


def _knows_scenes(pipeline: Any) -> bool:
    return pipeline.stages["base"].spec.data.name == "scenes"


def versions() -> dict[str, str]:
    """Of what decides about the figures."""
    packages = ("muse_jax", "jax", "jaxlib", "flax", "numpy", "scipy")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in packages if name in installed}}


# --------------------------------------------------------------------------------------- prompts


def measure_prompts(
    pipeline: Any, count: int, *, unguided: int, held_out: int, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """How well a pipeline follows prompts of generated scenes that it has not seen.

    Returns:
      count, statements (share of all statements that hold), all_statements (share of pictures of
      which all hold), and the same with _unguided and _held_out after the name (count_unguided, ...);
      statements_guided_same, all_statements_guided_same: with guidance, on just the prompts that
      were also drawn without;
      by_kind: statements by what they are about (and by_kind_unguided, ...);
      statements_low, all_statements_low: read from the low-resolution pictures, which the base
      model made alone.

    Raises:
      EvaluationError: the pipeline was trained on something else than scenes.
    """
    if not _knows_scenes(pipeline):
        name = pipeline.stages["base"].spec.data.name
        raise EvaluationError(
            f"this pipeline was trained on data.name={name!r}; whether pictures follow their prompts can be read from "
            "generated scenes alone (data.name='scenes'). Reconstruction can be measured on any pictures."
        )
    if count < 1:
        raise EvaluationError(f"the number of prompts is {count}; expected at least 1.")
    scales = ["guidance_scale", *["superres_guidance_scale"] * ("superres" in pipeline.stages)]
    without_guidance = dict.fromkeys(scales, 1.0)
    runs = {
        "": (scenes.scenes(range(count), seed, "test"), {}),
        "_unguided": (scenes.scenes(range(unguided), seed, "test"), without_guidance),
        "_held_out": (scenes.scenes(range(held_out), seed, "held_out"), {}),
    }
    figures: dict[str, Any] = {}
    size = min(pipeline.max_batch_size, max(len(items) for items, _ in runs.values()))
    with tqdm(total=count + unguided + held_out, unit="picture", disable=not progress) as bar:
        for ending, (items, settings) in runs.items():
            if not items:
                continue
            bar.set_description("prompts" + ending.replace("_", " "))
            captions = [item.caption for item in items]
            scores, low_scores = _draw_and_score(pipeline, captions, size, seed, settings, bar.update)
            figures |= {f"{key}{ending}": value for key, value in prompts.summarize(scores).items()}
            if not ending:  # the low-resolution pictures tell whether the base model or super-resolution is at fault
                figures |= _chosen(prompts.summarize(low_scores), "_low")
                if unguided:
                    figures |= _chosen(prompts.summarize(scores[:unguided]), "_guided_same")
    return figures


def _chosen(summary: Mapping[str, Any], ending: str) -> dict[str, Any]:
    return {f"{key}{ending}": summary[key] for key in ("statements", "all_statements")}


def _draw_and_score(
    pipeline: Any,
    captions: Sequence[str],
    size: int,
    seed: int,
    settings: Mapping[str, Any],
    advance: Callable[[int], Any],
) -> tuple[list[dict[str, bool]], list[dict[str, bool]]]:
    """Scores of each caption's final and low-resolution picture; picture i has the seed seed + i."""

    def drawn(start: int) -> list[tuple[dict[str, bool], dict[str, bool]]]:
        chunk = list(captions[start : start + size])
        filled = chunk + chunk[-1:] * (size - len(chunk))  # always the same shape: one compilation
        seeds = [(seed + start + i) % 2**32 for i in range(size)]
        output = pipeline(filled, seed=seeds, output_type="uint8", **settings)
        read = [map(prompts.score, images, chunk) for images in (output.images, output.low_images)]
        return list(zip(*read, strict=True))

    pairs: list[tuple[dict[str, bool], dict[str, bool]]] = []
    # Two at a time: while some are drawn, others are read, and short operations leave no core of a CPU idle.
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as workers:
        for found in workers.map(drawn, range(0, len(captions), size)):
            pairs += found
            advance(len(found))
    return [score for score, _ in pairs], [low for _, low in pairs]


# ------------------------------------------------------------------------------------ tokenizers


def measure_tokenizers(pipeline: Any, count: int, *, seed: int = 0, data_path: str = "") -> dict[str, Any]:
    """What the tokenizers make of pictures they were not trained on.

    Args:
      count: pictures, at most as many as the data hold out.
      seed: of the scenes, the same that `measure_prompts` takes its captions from.
      data_path: instead of the `data.path` that the stages were trained with.

    Returns:
      {"low", "high" and, if the pipeline has it, "decoder": see `reconstruction.measure`}.

    Raises:
      EvaluationError: the pictures are not there.
    """
    pictures: dict[str, tuple[np.ndarray, list[str] | None]] = {}  # by their section of the config, in words
    figures = {}
    stages = {"low": "tokenizer_low", "high": "tokenizer_high", "decoder": "decoder"}
    for name, decoder in stages.items():
        if decoder not in pipeline.stages:
            continue
        encoder = folder.finest(pipeline.stages) if name == "decoder" else decoder
        data = dataclasses.replace(pipeline.stages[encoder].spec.data, **({"path": data_path} if data_path else {}))
        if repr(data) not in pictures:
            pictures[repr(data)] = _pictures(data, count, seed)
        images, captions = pictures[repr(data)]
        batch_size = min(pipeline.max_batch_size, len(images))
        rest = -len(images) % batch_size
        filled = np.concatenate([images, np.repeat(images[-1:], rest, axis=0)])  # one compilation
        tokens = pipeline.encode(encoder, filled)
        decoded = pipeline.decode_tokens(decoder, tokens)
        codes = pipeline.stages[encoder].spec.model.codebook_size
        keep = slice(len(images))
        figures[name] = reconstruction.measure(images, decoded[keep], tokens[keep], codes, captions)
    return figures


def _pictures(data: DataSpec, count: int, seed: int) -> tuple[np.ndarray, list[str] | None]:
    """Held-out pictures [n, s, s, 3], and their captions where they are scenes."""
    if data.name == "scenes":
        items = scenes.scenes(range(count), seed, "test")
        return scenes.render_batch(items, data.image_size), [item.caption for item in items]
    try:
        source = make_source(data, "eval")
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the pictures that this pipeline's tokenizers are measured on can't be read: {error} "
            "Name their folder with --data_path=DIR."
        ) from error
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    return np.stack([source[int(i)]["image"] for i in chosen]), None


# --------------------------------------------------------------------------------------- command


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'reconstruction':<22}{'PSNR':>7}{'SSIM':>8}{'codes used':>15}{'statements':>12}{'all true':>10}"]
    for name, row in figures["tokenizers"].items():
        codes = f"{row['codes']} of {row['codebook_size']}"
        read = "".join(f"{row[key]:>{width}.1%}" for key, width in _READ if key in row)
        lines.append(f"{name:<22}{row['psnr']:>7.2f}{row['ssim']:>8.3f}{codes:>15}{read}")
    if "prompts" in figures:
        lines += ["", *_prompt_lines(figures["prompts"])]
    if "classes" in figures:
        lines += ["", classes.table(figures["classes"])]
    return "\n".join(lines)


_READ = (("statements", 12), ("all_statements", 10))
_RUNS = {"": "prompts", "_unguided": "without guidance", "_held_out": "held-out combinations"}


def _prompt_lines(figures: Mapping[str, Any]) -> list[str]:
    kinds = [kind for kind in prompts.KINDS if kind in figures["by_kind"]]
    head = "".join(f"{kind:>{len(kind) + 2}}" for kind in kinds)
    lines = [f"{'following the prompt':<22}{'pictures':>9}{'statements':>12}{'all true':>10}  {head}"]
    for ending, title in _RUNS.items():
        if f"count{ending}" in figures:
            read = "".join(f"{figures[key + ending]:>{width}.1%}" for key, width in _READ)
            by_kind = figures[f"by_kind{ending}"]
            cells = (f"{by_kind[k]:.0%}" if k in by_kind else "" for k in kinds)
            kinds_read = "".join(f"{cell:>{len(kind) + 2}}" for kind, cell in zip(kinds, cells, strict=True))
            lines.append(f"{title:<22}{figures['count' + ending]:>9}{read}  {kinds_read}")
    same = "".join(f"{figures[f'{key}_low']:>{width}.1%}" for key, width in _READ)
    lines.append(f"{'at low resolution':<22}{figures['count']:>9}{same}")
    return lines


def editing_table(figures: Mapping[str, Any]) -> str:
    """What `edits.measure` gave, as text."""
    lines = [f"{'editing':<22}{'pictures':>9}{'as asked':>12}{'the rest':>10}{'all of it':>11}"]
    for name, row in figures.items():
        read = "".join(f"{row[key]:>{width}.1%}" for key, width in _EDITED if key in row)
        kept = f"  {row['pixels_kept']:.1%} keep the given part bit for bit" if "pixels_kept" in row else ""
        lines.append(f"{name.replace('_', '-'):<22}{row['count']:>9}{read}{kept}")
    return "\n".join(lines)


_EDITED = (("changed", 12), ("others", 10), ("others_all", 11))


def evaluate_editing(pipeline: Any, count: int, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """The figures of editing; see `edits.measure`.

    Raises:
      EvaluationError: the pipeline was trained on something else than scenes.
    """
    if not _knows_scenes(pipeline):
        raise EvaluationError("editing can be measured on generated scenes alone (data.name='scenes').")
    start = time.monotonic()
    with tqdm(total=3 * count, unit="picture", disable=not progress, desc="editing") as bar:
        editing = edits.measure(pipeline, count, seed, bar.update)
    seconds = round(time.monotonic() - start, 1)
    return {"editing": editing, "evaluation": {"seed": seed, "seconds": seconds, "versions": versions()}}


def evaluate_sweep(
    pipeline: Any, count: int, steps: Sequence[int], seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """The figures of schedules and samplers; see `sweep.measure`. They are the base model's: its pictures alone.

    Raises:
      EvaluationError: the pipeline was trained on something else than scenes, or a number of steps can't be.
    """
    if not _knows_scenes(pipeline):
        raise EvaluationError("a sweep reads what pictures show from generated scenes alone (data.name='scenes').")
    if not steps or min(steps) < 1:
        raise EvaluationError(f"--sweep_steps is {','.join(map(str, steps))!r}; expected numbers of at least 1.")
    if count < 2:
        raise EvaluationError(f"--num_swept is {count}; a Fréchet distance needs at least 2 pictures.")
    start = time.monotonic()
    stages = {name: pipeline.stages[name] for name in folder.NEEDED}
    base = type(pipeline)(stages, max_batch_size=pipeline.max_batch_size)
    total = count * len(steps) * (len(sweep.SCHEDULES) + len(sweep.SAMPLERS))
    own = stages["base"].spec.sample.selection_rule
    rule = own if own == "anywhere" else "most_confident"  # Paella's renoises anywhere
    with tqdm(total=total, unit="picture", disable=not progress, desc="sweep") as bar:
        figures = sweep.measure(base, count, steps, seed, bar.update, rule)
    seconds = round(time.monotonic() - start, 1)
    settings = dataclasses.asdict(base.stages["base"].spec.sample)
    about = {"seed": seed, "sampler": settings, "seconds": seconds, "versions": versions()}
    return {"sweep": figures, "evaluation": about}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; called by the command alone, since others have flags of the same names."""
    for name, default, text in (
        ("pipeline", "", "Pipeline folder; by default the one that comes with the package."),
        (
            "out",
            "",
            "JSON file to write; by default evaluation.json in the pipeline's folder, or here without a local one.",
        ),
        ("data_path", "", "Folder of the pictures, where it is no longer the one trained on."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    flags.DEFINE_bool("editing", False, "Measure editing instead.", values)
    flags.DEFINE_bool("sweep", False, "Compare schedules, numbers of steps and samplers instead.", values)
    flags.DEFINE_list("sweep_steps", list(map(str, sweep.STEPS)), "With --sweep: numbers of decoding steps.", values)
    for name, default, text in (
        ("num_prompts", 500, "Held-out prompts that are drawn."),
        ("num_unguided", 100, "How many of them are drawn without guidance too."),
        ("num_held_out", 100, "Prompts with combinations that no training picture had."),
        ("num_reconstructed", 500, "Pictures that the tokenizers are tried on."),
        ("num_edits", 300, "With --editing: pictures for each way of editing."),
        ("num_swept", 256, "With --sweep: pictures for each schedule or sampler and number of steps."),
        ("batch_size", 16, "Pictures drawn at a time."),
        ("seed", 0, "Of the scenes and the sampling."),
    ):
        least = 0 if name in ("num_unguided", "num_held_out", "seed") else 1
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)


def out_path(values: flags.FlagValues) -> pathlib.Path:
    """Where the figures go."""
    name = "editing.json" if values.editing else "sweep.json" if values.sweep else "evaluation.json"
    beside = values.pipeline if "://" not in values.pipeline else ""  # a bucket's pipeline is left as it is
    return pathlib.Path(values.out or pathlib.Path(beside or ".") / name)


def _evaluate_all(pipeline: Any, values: flags.FlagValues) -> dict[str, Any]:
    if not _knows_scenes(pipeline):
        print(
            "Not measured: whether the pictures follow their prompts. That can be read from generated scenes alone, "
            f"and this pipeline was trained on data.name={pipeline.stages['base'].spec.data.name!r}.",
            file=sys.stderr,
        )
    return evaluate(
        pipeline,
        values.num_prompts,
        unguided=values.num_unguided,
        held_out=values.num_held_out,
        reconstructed=values.num_reconstructed,
        seed=values.seed,
        data_path=values.data_path,
    )


def _numbers(values: Sequence[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError as error:
        raise EvaluationError(f"--sweep_steps is {','.join(values)!r}; expected whole numbers.") from error


def run(values: flags.FlagValues) -> dict[str, Any]:
    """What the command does: measures, prints, writes; returns what it wrote."""
    from muse_jax.sampling.pipeline import MusePipeline

    if values.editing and values.sweep:
        raise EvaluationError("--editing and --sweep are measurements of their own; give one of them.")
    pipeline = MusePipeline.load(values.pipeline or None, max_batch_size=values.batch_size)
    out = out_path(values)
    sample.check_out(out)
    if values.editing:
        figures = evaluate_editing(pipeline, values.num_edits, values.seed)
        shown = editing_table(figures["editing"])
    elif values.sweep:
        figures = evaluate_sweep(pipeline, values.num_swept, _numbers(values.sweep_steps), values.seed)
        shown = sweep.table(figures["sweep"])
    else:
        figures = _evaluate_all(pipeline, values)
        shown = table(figures)
    figures["evaluation"]["pipeline"] = values.pipeline or "packaged"
    print(f"\n{shown}\n")
    text = json.dumps(figures, indent=1) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    sample.write_whole(out, lambda path: path.write_text(text, encoding="utf-8"))
    if values.sweep:
        from muse_jax import figures as drawings

        sample.write_whole(out.with_suffix(".png"), lambda path: drawings.sweep(path, figures["sweep"]))
    print(f"{figures['evaluation']['seconds']:.0f} seconds; written to {out}")
    return figures


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:  # the pipeline's and ours name the mend
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
