"""What schedules, numbers of steps and samplers do to the pictures: MaskGIT's ablation (section 4.4, table 3).

Measured on generated scenes: how many of the statements of captions (or which share of the classes) can be
read from the pixels, and the Fréchet distance from true pictures of other captions (see `frechet`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from muse_jax.data import scenes
from muse_jax.evaluation import frechet, prompts

STEPS = (1, 2, 4, 8, 16, 32)
TRUE = 1024  # true pictures that the others are compared with
CONCAVE, CONVEX = ("circle", "cosine", "square", "cubic"), ("sqrt", "log")
SCHEDULES = {name: {"schedule": name} for name in (*CONCAVE, "linear", *CONVEX)}
# Against the pipeline's own settings, at equal steps.
SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "most confident": {"selection_rule": "most_confident"},
    "halton": {"selection_rule": "halton"},
    "halton, arccos": {"selection_rule": "halton", "schedule": "arccos"},
    "remask": {"selection_rule": "remask"},
    "revocable": {"selection_rule": "revocable"},
    "guidance from 0.4": {"guidance_start": 0.4},
    "power-cosine guidance": {"guidance_ramp": "power_cosine"},
}


def measure(
    pipeline: Any,
    count: int,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda made: None,
    rule: str = "most_confident",
) -> dict[str, Any]:
    """Draws the same prompts with the same seeds by every schedule and sampler, with every number of steps.

    Args:
      pipeline: a `MusePipeline` for scenes.
      count: pictures of each.
      steps: numbers of decoding steps, of the base model.
      advance: called with the number of pictures that were made.
      rule: which the schedules are compared with; MaskGIT's.

    Returns:
      schedules, samplers: {name: one {"steps", "accuracy" (0..1), "frechet"} for each number of steps};
      true: the Fréchet distance of as many true pictures, below which there is nothing to gain;
      tokenizer: the same of their reconstructions, which bounds what a model of these tokens can reach;
      count; accuracy_of: what the accuracy is a share of.
    """
    given = (scenes.single_objects if pipeline.classes else scenes.scenes)(range(count + TRUE), seed, "test")
    true = scenes.render_batch(given, pipeline.image_size)
    reference = frechet.features(true[count:])
    asked = [_asked(item, bool(pipeline.classes)) for item in given[:count]]

    def run(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
        images = _drawn(pipeline, [prompt for prompt, _ in asked], {**settings, "num_inference_steps": number}, seed)
        advance(count)
        held = [prompts.score(image, caption).values() for image, (_, caption) in zip(images, asked, strict=True)]
        accuracy = (
            np.mean([all(one) for one in held]) if pipeline.classes else np.mean([v for one in held for v in one])
        )
        found = frechet.distance(frechet.features(images), reference)
        return {"steps": number, "accuracy": float(accuracy), "frechet": found}

    # Numbers of steps outermost: what is compiled for one serves all schedules.
    schedules = {name: {"selection_rule": rule, **settings} for name, settings in SCHEDULES.items()}
    tables = {"schedules": schedules, "samplers": SAMPLERS}
    rows = {kind: {name: [] for name in table} for kind, table in tables.items()}
    for number in steps:
        for kind, table in tables.items():
            for name, settings in table.items():
                rows[kind][name].append(run(settings, number))
    decoded = pipeline.decode_tokens("tokenizer_low", pipeline.encode("tokenizer_low", true[:count]))
    return {
        "count": count,
        "accuracy_of": "classes" if pipeline.classes else "statements",
        "true": frechet.distance(frechet.features(true[:count]), reference),
        "tokenizer": frechet.distance(frechet.features(decoded), reference),
        **rows,
    }


def _asked(item: scenes.Scene, classes: bool) -> tuple[str, str]:
    """The prompt, and the caption whose statements are to hold."""
    if not classes:
        return item.caption, item.caption
    group = item.groups[0]
    return f"{group.color} {group.shape}", f"a {group.color} {group.shape}"


def _drawn(pipeline: Any, asked: Sequence[str], settings: Mapping[str, Any], seed: int) -> np.ndarray:
    images = []
    for start in range(0, len(asked), pipeline.max_batch_size):
        chunk = list(asked[start : start + pipeline.max_batch_size])
        seeds = [(seed + start + i) % 2**32 for i in range(len(chunk))]
        images.append(pipeline(chunk, seed=seeds, output_type="uint8", **settings).images)
    return np.concatenate(images)


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: accuracy and Fréchet distance, a row for each schedule and sampler."""
    steps = [row["steps"] for row in figures["samplers"]["default"]]
    head = f"Share of {figures['accuracy_of']} that hold, Fréchet distance"
    lines = []
    for kind in ("schedules", "samplers"):
        lines.append(f"{kind + ', by steps':<24}" + "".join(f"{number:>16}" for number in steps))
        for name, rows in figures[kind].items():
            lines.append(f"{name:<24}" + "".join(f"{row['accuracy']:>8.1%}{row['frechet']:>8.2f}" for row in rows))
        lines.append("")
    lines.append(
        f"{head}; {figures['count']} pictures each; of true pictures {figures['true']:.2f}, of their reconstructions "
        f"{figures['tokenizer']:.2f}"
    )
    return "\n".join(lines)
