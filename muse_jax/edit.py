"""Edits a picture by a prompt: inpainting, outpainting, or mask-free editing (Muse, section 3.3); and Paella's ways.

    python -m muse_jax.edit --image=photo.png --prompt="..." --mask_image=mask.png    # white is repainted
    python -m muse_jax.edit --image=photo.png --prompt="..." --box=10,10,40,40        # left, top, right, bottom
    python -m muse_jax.edit --image=photo.png --prompt="..." --right=32 --bottom=16   # extended by these pixels
    python -m muse_jax.edit --image=extended.png --noresize --prompt="..." --top=8    # and extended again
    python -m muse_jax.edit --image=photo.png --prompt="..."                          # all of it, little by little

Without a picture:

    python -m muse_jax.edit --prompt="..." --prompt="..." --interpolate=5             # pictures from one to the other

With the pipeline of a Paella model (arXiv 2211.07292, section 4) as --pipeline also:

    python -m muse_jax.edit --image=photo.png --prompt="..." --strength=0.5           # 0 keeps the image, 1 ignores it
    python -m muse_jax.edit --image=photo.png --variations                            # others like it, without a prompt
    python -m muse_jax.edit --prompt="..." --prompt="..." --compose --width=64        # each prompt its own region

Without --pipeline the small one for generated scenes is used that comes with the package. With a
pipeline of classes (MaskGIT) --class_label="red circle" takes the prompt's place. Any size
and mode of picture will do. In --out: a PNG for each prompt and seed; grid.png with what was given
beside what was made; strip.png with the iterations of mask-free editing; edits.json with everything
that made them. --best_of=N draws N pictures for each and keeps the one that follows the prompt best.
Same picture, prompt, seed and settings, same result.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from muse_jax import sample

SIDES = ("left", "top", "right", "bottom")
WITHOUT_IMAGE = ("interpolate", "compose")
WAYS = ("variations", *WITHOUT_IMAGE)  # flags that name a method
PAELLA = ("strength", "variations", "compose")  # flags of its pipelines alone
# Of the methods, as edits.json has them; what else made a picture is in it by other names.
ARGUMENTS = (*SIDES, "mask_image", "blend", "resize", "share", "strength", "num_pictures", "regions")
OF_AN_IMAGE = ("image", "box", "mask_image", "mask_free", "share", "strength", *SIDES)  # what else has no use for


def method_of(values: flags.FlagValues) -> tuple[str, dict[str, Any]]:
    """Which method of the pipeline the flags ask for, and its own arguments.

    Raises:
      ValueError: for flags that don't go together.
    """
    ways = [name for name in WAYS if values[name].value or (name == "interpolate" and values.interpolate is not None)]
    if values.region and not values.compose:
        raise ValueError("--region is of --compose; give both.")
    if ways:
        return ways[0], _own(values, ways)
    amounts = {side: values[side].value for side in SIDES if values[side].value}
    if values.box and values.mask_image:
        raise ValueError("--box and --mask_image both say what to repaint; give one of them.")
    mask = _box("--box", values.box) if values.box else values.mask_image or None
    shared = {"blend": values.blend, **({} if values.resize else {"resize": False})}
    chosen = {name: values[name].value for name in ("share", "strength") if values[name].value is not None}
    if amounts and (mask is not None or values.mask_free or chosen):
        raise ValueError("--left, --top, --right and --bottom extend a picture; they go with no mask and no strength.")
    if amounts:
        return "outpaint", {**amounts, **shared}
    if mask is None or values.mask_free or chosen:
        return "edit", {"mask_image": mask, **shared, **chosen, "history": True}
    return "inpaint", {"mask_image": mask, **shared}


def _own(values: flags.FlagValues, ways: Sequence[str]) -> dict[str, Any]:
    """The arguments of a way that has flags of its own."""
    way = ways[0]
    allowed = ("image",) if way not in WITHOUT_IMAGE else ()
    given = [name for name in OF_AN_IMAGE if values[name].present and name not in allowed]
    others = [*ways[1:], *given]
    if way == "variations":
        others += [name for name in ("prompt", "class_label", "negative_prompt") if values[name].value]
    if way == "interpolate" and values.num_images_per_prompt > 1:
        others.append("num_images_per_prompt")
    if others:
        raise ValueError(f"--{way} is a way of its own; leave --{' and --'.join(others)} out.")
    if way == "interpolate":
        return {"num_pictures": values.interpolate}
    if way == "compose" and values.region:
        return {"regions": [_box("--region", region.split(",")) for region in values.region]}
    return {}


def _box(flag: str, numbers: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in numbers)
    except ValueError as error:
        raise ValueError(f"{flag}={','.join(numbers)}: expected left,top,right,bottom in pixels.") from error


def _shared(values: flags.FlagValues, pipeline: Any, name: str) -> dict[str, Any]:
    """The arguments that ways have in common; some have no prompt, no image, or a number of pictures of their own."""
    arguments = {"seed": values.seed, "output_type": "uint8", **sample.settings_given(values)}
    if name != "variations":
        negative = values.negative_prompt
        arguments["prompt"] = sample.prompts_given(values, pipeline)
        arguments["negative_prompt"] = negative[0] if negative and len(negative) == 1 else negative
    if name not in WITHOUT_IMAGE:
        arguments["image"] = values.image
    if name != "interpolate":
        arguments["num_images_per_prompt"] = values.num_images_per_prompt * values.best_of
    return arguments


def edit(values: flags.FlagValues, command: Sequence[str] = ()) -> dict[str, Any]:
    """What the command does; returns what edits.json holds.

    Raises:
      PipelineError, StageError, ValueError, TypeError: naming what to mend, before anything is compiled.
    """
    from muse_jax.assemble import versions
    from muse_jax.evaluation import ranking
    from muse_jax.sampling.pipeline import MusePipeline

    name, arguments = method_of(values)
    if not values.image and name not in WITHOUT_IMAGE:
        raise ValueError("--image is missing; give the picture to edit.")
    if values.best_of > 1 and name in WAYS:
        raise ValueError(f"--best_of needs one prompt a picture to compare with, which --{name} has not.")
    out = pathlib.Path(values.out)
    sample.check_out(out / "edits.json")
    pipeline = MusePipeline.load(values.pipeline or None, max_batch_size=values.batch_size)
    own = "strength" if "strength" in arguments else name
    paella = hasattr(pipeline, "compose")
    if own in PAELLA and not paella:
        raise ValueError(f"--{own} is for Paella's models; name a pipeline that has one with --pipeline.")
    if name == "edit" and not values.resize and not paella:
        raise ValueError(
            "--noresize is not for mask-free editing, whose pictures have the model's size; leave it out, or give a "
            "mask to inpaint or a side to extend by."
        )
    arguments |= _shared(values, pipeline, name)
    if values.best_of > 1:
        ranking.check(sample.captions(pipeline, arguments["prompt"]))
    output = getattr(pipeline, name)(**arguments)
    kept = list(range(len(output.prompts)))
    if values.best_of > 1:
        captions = sample.captions(pipeline, output.prompts)
        kept = ranking.best(list(output.images), captions, values.best_of, pipeline.image_size)
    pictures = _write(out, output, kept, values.image, strip=name == "edit")
    about = {"command": list(command), "method": name, "pipeline": values.pipeline or "packaged"}
    given = {key: value for key, value in arguments.items() if key in ARGUMENTS}
    record = {**about, "image": values.image, **given, "best_of": values.best_of, "settings": output.settings}
    record |= {"manifest": pipeline.manifest, "pictures": pictures, "versions": versions()}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    sample.write_whole(out / "edits.json", lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    for picture in pictures:
        print(f"{out / picture['file']}    {picture['prompt']}")
    print(f"All together in {out / 'grid.png'}, what made them in {out / 'edits.json'}.")
    return record


def _write(out: pathlib.Path, output: Any, kept: Sequence[int], image: str, strip: bool) -> list[Mapping[str, Any]]:
    import numpy as np
    from PIL import Image

    from muse_jax import figures
    from muse_jax.data import transforms
    from muse_jax.text import vocabulary

    out.mkdir(parents=True, exist_ok=True)
    columns_of = (output.prompts, output.negative_prompts, output.seeds)
    prompts, negatives, seeds = ([values[i] for i in kept] for values in columns_of)
    names = sample.file_names(prompts, seeds, negatives)
    for name, index in zip(names, kept, strict=True):
        sample.write_whole(out / name, Image.fromarray(output.images[index]).save)
    shown = slice(sample.GRID_PROMPTS)
    titles = [vocabulary.clean(prompt) for prompt in prompts][shown]
    columns = {"made": [output.images[i] for i in kept][shown]}
    if image:
        given = np.asarray(transforms.to_rgb(transforms.upright(transforms.open_image(image))))
        columns = {"given": [given] * len(titles), **columns}
    sample.write_whole(out / "grid.png", lambda path: figures.samples(path, titles, columns))
    if strip:
        shown_rows = zip(names[:4], kept[:4], strict=True)
        rows = {name.removesuffix(".png"): list(output.decoding(i)["base"].images) for name, i in shown_rows}
        title = titles[0] if len(set(titles[: len(rows)])) == 1 else ""
        sample.write_whole(out / "strip.png", lambda path: figures.decoding(path, title, rows))
    return [
        {"file": name, "prompt": prompt, "negative_prompt": negative, "seed": seed}
        for name, prompt, negative, seed in zip(names, prompts, negatives, seeds, strict=True)
    ]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags: those of `sample`, and what is to be edited how."""
    sample.define_flags(values)
    flags.DEFINE_string("image", "", "The picture to edit.", values)
    flags.DEFINE_string("mask_image", "", "Picture of the image's size; its white part is repainted.", values)
    flags.DEFINE_list("box", [], "left,top,right,bottom in pixels of the image, instead of a mask.", values)
    flags.DEFINE_bool("mask_free", False, "With a mask: mask-free editing within it.", values)
    flags.DEFINE_bool("blend", True, "Put the original's pixels back where nothing was repainted.", values)
    flags.DEFINE_bool("resize", True, "Resize the image to what the model makes; --noresize: take it as it is.", values)
    flags.DEFINE_float(
        "share", None, "Mask-free: share of the tokens drawn at each iteration; 0.08.", flag_values=values
    )
    flags.DEFINE_float("strength", None, "Paella: 0 keeps the image, 1 ignores it; by default 2/3.", flag_values=values)
    flags.DEFINE_bool("variations", False, "Paella: pictures like the image; no prompt.", values)
    flags.DEFINE_integer("interpolate", None, "So many pictures from one prompt to another.", flag_values=values)
    flags.DEFINE_bool("compose", False, "Paella: several prompts, each for a region of one picture.", values)
    flags.DEFINE_multi_string("region", None, "left,top,right,bottom of each prompt; by default columns.", values)
    for side in SIDES:
        flags.DEFINE_integer(side, 0, f"Pixels to extend the picture by: {side}.", 0, flag_values=values)
    values.set_default("out", "edits")


if __name__ == "__main__":
    define_flags()
    app.run(lambda argv: sample.main(argv, edit))
