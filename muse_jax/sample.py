"""Draws pictures of prompts.

    python -m muse_jax.sample --prompt="a large red circle above a small blue square on a white background"
    python -m muse_jax.sample --pipeline=DIR --prompt="..." --prompt="..." --num_images_per_prompt=4 --seed=1 --out=DIR
    python -m muse_jax.sample --pipeline=DIR --class_label="red circle" --class_label=7     # MaskGIT

Without --pipeline the small one for generated scenes is used that comes with the package. Settings
that aren't given are those the pipeline was made to be used with; --superres_... are those of
super-resolution. In --out: a PNG for each prompt and seed, grid.png with all of them under their
prompts, and samples.json with everything that made them. Same prompt, seed and settings, same picture.
"""

import time

STARTED = time.monotonic()

from muse_jax import process  # noqa: E402

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import dataclasses  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

from absl import app, flags  # noqa: E402

NUMBERS = {
    "guidance_scale": "s in logits = u + s (c - u); 1 is no guidance.",
    "token_temperature": "Of the softmax that tokens are drawn from; 0 takes the likeliest.",
    "choice_temperature": "Of the noise on the confidence; more makes pictures more varied.",
    "top_p": "Draw from the likeliest codes that together have this probability; 1 is off.",
    "typical_p": "Draw from the most typical codes that together have this probability; 1 is off.",
    "guidance_power": "Of the ramp power_cosine: the higher, the later guidance sets in.",
    "guidance_start": "Time in [0, 1] from which there is guidance.",
    "guidance_end": "Time in [0, 1] until which there is guidance.",
    "remasking": "Of the rule remask: highest share of the settled tokens that a step masks again.",
}
COUNTS = {
    "num_inference_steps": "Decoding steps.",
    "top_k": "Draw from the k likeliest codes; 0 is off.",
}
SIZES = {  # of a model that makes pictures of any size
    "height": "Pixels of the pictures.",
    "width": "Pixels of the pictures.",
}
NAMES = {
    "schedule": "Mask schedule: cosine, linear, square, cubic, circle, arccos, sqrt, log or exponential.",
    "guidance_ramp": "linear: guidance grows from 1 to its scale over the steps; constant; power_cosine.",
    "selection_rule": "What is masked again after a step: most_confident, halton, remask or revocable.",
}
GRID_PROMPTS, GRID_PICTURES = 32, 8  # in grid.png: prompts, and pictures of each


def slug(prompt: str) -> str:
    """A file name's beginning for a prompt.

    >>> slug("A red circle, above... a square!")
    'a-red-circle-above-a-square'
    """
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    name = "-".join(words)
    if name and len(name.encode()) <= 100:
        return name
    if not prompt.strip():
        return "empty"
    # Long prompts may begin alike, and one may have no letter at all.
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    short = name.encode()[:80].decode("utf-8", "ignore").rstrip("-") or "prompt"
    return f"{short}-{digest}"


def file_names(prompts: Sequence[str], seeds: Sequence[int], negative_prompts: Sequence[str] = ()) -> list[str]:
    """A PNG's name for each picture; where prompts differ in signs alone, or negative prompts, they get a number."""
    taken: dict[str, tuple[str, int, str]] = {}
    names = []
    for made in zip(prompts, seeds, negative_prompts or [""] * len(prompts), strict=True):
        stem, again = f"{slug(made[0])}_{made[1]}", 1
        name = stem
        while taken.setdefault(name, made) != made:
            again += 1
            name = f"{stem}_{again}"
        names.append(f"{name}.png")
    return names


def check_out(path: pathlib.Path) -> None:
    """Refuses a file for --out that could not be written: before anything is drawn or measured for it.

    Raises:
      ValueError: naming what is in the way.
    """
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder, and a file is to be written there; name another.")
    check_above(path, "--out")


def check_above(path: str | os.PathLike[str], flag: str) -> None:
    """Refuses a path that nothing could be written to because of a folder above it; buckets' are left to them."""
    if "://" in os.fspath(path):
        return
    above = next(folder for folder in pathlib.Path(path).absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{flag}: {path} can't be written, since {above} is a file; name another folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {path} can't be written, since nothing may be written in {above}; name another.")


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Lets `write` write a file beside the path, then moves it there: whole or not at all."""
    draft = path.with_name(f".draft-{path.name}")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sample(
    pipeline: Any, requests: Any, out: pathlib.Path, settings: Mapping[str, Any], best_of: int = 1
) -> dict[str, Any]:
    """Draws all pictures and writes them as they are made, then the grid and samples.json.

    Args:
      pipeline: a `MusePipeline`.
      requests: from `sampling.requests.make_requests`.
      out: the folder; made if need be.
      settings: for the pipeline's call.
      best_of: of so many neighbours among the requests the best is kept, and written at the end.

    Returns:
      What samples.json holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = file_names(requests.prompts, requests.seeds, requests.negative_prompts)
    images, used, first = [], {}, 0.0
    for start in range(0, len(requests), pipeline.max_batch_size):
        piece = slice(start, start + pipeline.max_batch_size)
        output = pipeline(
            requests.prompts[piece], requests.negative_prompts[piece], seed=requests.seeds[piece], **settings
        )
        for name, image in zip(names[piece], output.images, strict=True):
            if best_of == 1:
                write_whole(out / name, image.save)
            images.append(image)
            first = first or time.monotonic() - STARTED
        used = output.settings
    if best_of > 1:
        requests, images = _best(pipeline, requests, images, best_of)
        names = file_names(requests.prompts, requests.seeds, requests.negative_prompts)
        for name, image in zip(names, images, strict=True):
            write_whole(out / name, image.save)
    write_whole(out / "grid.png", lambda path: _grid(path, requests, images))
    pictures = [
        {"file": name, "prompt": prompt, "negative_prompt": negative, "seed": seed}
        for name, prompt, negative, seed in zip(
            names, requests.prompts, requests.negative_prompts, requests.seeds, strict=True
        )
    ]
    record = {"settings": used, "pictures": pictures, "seconds_to_first_picture": round(first, 2)}
    return {**record, "seconds": round(time.monotonic() - STARTED, 2)}


def captions(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """What pictures of the prompts are ranked by; a class is "a red circle"."""
    return [f"a {name}" for name in prompts] if pipeline.classes else list(prompts)


def _best(pipeline: Any, requests: Any, images: Sequence[Any], best_of: int) -> tuple[Any, list[Any]]:
    import numpy as np

    from muse_jax.evaluation import ranking

    arrays = [np.asarray(image) for image in images]
    kept = ranking.best(arrays, captions(pipeline, requests.prompts), best_of, pipeline.image_size)
    rows = {name: tuple(getattr(requests, name)[i] for i in kept) for name in ("prompts", "negative_prompts", "seeds")}
    each = requests.images_per_prompt // best_of
    return dataclasses.replace(requests, **rows, images_per_prompt=each), [images[i] for i in kept]


def _grid(path: pathlib.Path, requests: Any, images: Sequence[Any]) -> None:
    import numpy as np

    from muse_jax import figures
    from muse_jax.text import vocabulary

    each = requests.images_per_prompt
    prompts = [vocabulary.clean(prompt) for prompt in requests.prompts[::each][:GRID_PROMPTS]]
    columns = {}
    for i in range(min(each, GRID_PICTURES)):
        seeds = requests.seeds[i::each]
        title = f"seed {seeds[0]}" if len(set(seeds)) == 1 else ""
        columns[title or " " * i] = [np.asarray(image) for image in images[i::each][: len(prompts)]]
    figures.samples(path, prompts, columns)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; called by the command alone, since others have flags of the same names."""
    flags.DEFINE_string("pipeline", "", "Pipeline folder; by default the one that comes with the package.", values)
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times, and may be empty.", values)
    flags.DEFINE_multi_string(
        "class_label", None, "Of a pipeline with classes: what to draw, a name or number.", values
    )
    flags.DEFINE_multi_string("negative_prompt", None, "What to keep away from; one for all, or one a prompt.", values)
    flags.DEFINE_integer("num_images_per_prompt", 1, "Pictures of each prompt.", 1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the first picture of each prompt; the next ones count up.", flag_values=values)
    flags.DEFINE_string("out", "samples", "Folder to write to.", values)
    flags.DEFINE_integer("best_of", 1, "Draw this many for each picture and keep the best.", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "Pictures drawn at a time.", 1, flag_values=values)
    for prefix, stage in (("", "base model"), ("superres_", "super-resolution")):
        for table, define in ((NUMBERS, flags.DEFINE_float), (COUNTS, flags.DEFINE_integer)):
            for name, text in table.items():
                define(prefix + name, None, f"{stage}: {text}", flag_values=values)
        for name, text in NAMES.items():
            flags.DEFINE_string(prefix + name, None, f"{stage}: {text}", values)
    for name, text in SIZES.items():
        flags.DEFINE_integer(name, None, f"Paella: {text}", 1, flag_values=values)


def settings_given(values: flags.FlagValues) -> dict[str, Any]:
    """The sampler settings among the flags, for a pipeline's call."""
    names = [prefix + name for prefix in ("", "superres_") for name in (*NUMBERS, *COUNTS, *NAMES)]
    return {name: values[name].value for name in (*names, *SIZES) if values[name].value is not None}


def prompts_given(values: flags.FlagValues, pipeline: Any) -> list[str]:
    """The prompts of --prompt, or the classes' names of --class_label.

    Raises:
      ValueError: if the pipeline is conditioned on the other, or there is neither.
    """
    wanted, other = ("class_label", "prompt") if pipeline.classes else ("prompt", "class_label")
    if values[other].value and values[wanted].value:
        raise ValueError("--prompt and --class_label both say what to draw; give one of them.")
    if values.class_label and not pipeline.classes:
        raise ValueError(
            "--class_label is for a pipeline with classes, and this one is conditioned on text; see --prompt."
        )
    given = values[wanted].value or values[other].value
    if not given:
        example = pipeline.classes[0] if pipeline.classes else "a large red circle on a white background"
        raise ValueError(f'--{wanted} is missing; try --{wanted}="{example}".')
    return [pipeline.class_name(one) for one in given] if pipeline.classes else given


def run(values: flags.FlagValues, command: Sequence[str] = ()) -> dict[str, Any]:
    """What the command does; returns what samples.json holds.

    Raises:
      PipelineError, StageError, ValueError, TypeError: naming what to mend, before anything is compiled.
    """
    from muse_jax.assemble import versions
    from muse_jax.evaluation import ranking
    from muse_jax.sampling.pipeline import MusePipeline
    from muse_jax.sampling.requests import make_requests

    out = pathlib.Path(values.out)
    check_out(out / "samples.json")
    pipeline = MusePipeline.load(values.pipeline or None, max_batch_size=values.batch_size)
    requests = make_requests(
        prompts_given(values, pipeline),
        values.negative_prompt[0] if len(values.negative_prompt or []) == 1 else values.negative_prompt,
        values.num_images_per_prompt * values.best_of,
        values.seed,
    )
    if values.best_of > 1:
        ranking.check(captions(pipeline, requests.prompts))
    record = sample(pipeline, requests, out, settings_given(values), values.best_of)
    about = {"command": list(command), "pipeline": values.pipeline or "packaged", "manifest": pipeline.manifest}
    record = {**about, **record, "versions": versions()}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_whole(out / "samples.json", lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    for picture in record["pictures"]:
        print(f"{out / picture['file']}    {picture['prompt']}")
    print(
        f"All together in {out / 'grid.png'}, what made them in {out / 'samples.json'}. "
        f"The first picture took {record['seconds_to_first_picture']:.1f} s from the start, all of it "
        f"{record['seconds']:.1f} s."
    )
    return record


def main(argv: list[str], function: Callable[[flags.FlagValues, Sequence[str]], Any] = run) -> None:
    """Calls a command's function with its flags; what the user can mend ends it with a line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; put a prompt with spaces in quotes")
    process.quiet()
    if hasattr(sys.stdout, "reconfigure"):  # prompts and names may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
    try:
        function(flags.FLAGS, sys.argv)
    except (ValueError, TypeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
