"""`python -m muse_jax.edit` on the tiny quickstart's pipeline: what each way of editing leaves."""

import json

import numpy as np
import pytest
from absl import flags as absl_flags
from PIL import Image

from muse_jax import edit
from muse_jax.data import scenes
from muse_jax.sampling.pipeline import MusePipeline

PIPELINE = "--pipeline=runs/quickstart/pipeline"
PROMPT = "a large red circle on a white background"


def parsed(*flags):
    values = absl_flags.FlagValues()
    edit.define_flags(values)
    values(["edit", *flags])
    return values


@pytest.fixture(scope="module")
def here(tiny_quickstart):
    folder = tiny_quickstart[0].parent.parent
    picture = scenes.render(scenes.scene(3), 64)
    Image.fromarray(picture).save(folder / "picture.png")
    Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), ((4, 40), (4, 40)))).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("flags", "method", "size"),
    [
        (["--mask_image=mask.png"], "inpaint", (64, 64)),
        (["--box=4,4,24,24", "--best_of=2"], "inpaint", (64, 64)),
        (["--right=13", "--noblend", "--best_of=2"], "outpaint", (77, 64)),
        (["--num_inference_steps=3", "--num_images_per_prompt=2"], "edit", (64, 64)),
    ],
)
def test_it_leaves_what_it_names(here, monkeypatch, capsys, flags, method, size):
    monkeypatch.chdir(here)
    out = here / "edited" / method / str(len(flags))
    edit.edit(parsed(PIPELINE, "--image=picture.png", f"--prompt={PROMPT}", f"--out={out}", *flags))
    said = capsys.readouterr().out
    record = json.loads((out / "edits.json").read_text())
    assert record["method"] == method
    assert len(record["pictures"]) == (2 if "--num_images_per_prompt=2" in flags else 1)
    for picture in record["pictures"]:
        with Image.open(out / picture["file"]) as made:
            assert made.size == size
        assert picture["file"] in said
    expected = {"grid.png", "edits.json", *(p["file"] for p in record["pictures"])}
    assert {path.name for path in out.iterdir()} == expected | ({"strip.png"} if method == "edit" else set())
    if method == "inpaint":
        given = np.asarray(Image.open(here / "picture.png"))
        made = np.asarray(Image.open(out / record["pictures"][0]["file"]))
        np.testing.assert_array_equal(made[24:], given[24:])
        np.testing.assert_array_equal(made[:, 24:], given[:, 24:])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--image is missing"),
        (["--image=picture.png"], "--prompt is missing"),
        (["--image=nowhere.png", f"--prompt={PROMPT}"], "'nowhere.png' can't be read"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--box=1,2,3"], "left, top, right, bottom"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--box=1,2,3,4", "--left=8"], "they go with no mask"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--left=8", "--share=0.1"], "no strength"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--box=0,0,abc,4"], "--box=0,0,abc,4: expected"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--box=0,0,8,8", "--strength=0.5"], "--strength is for Paella"),
        (["--interpolate=3", f"--prompt={PROMPT}", "--image=picture.png", "--right=8"], "leave --image and --right"),
        (["--interpolate=3", *[f"--prompt={PROMPT}"] * 2, "--num_images_per_prompt=4"], "leave --num_images_per"),
        (["--image=picture.png", f"--prompt={PROMPT}", "--noresize"], "--noresize is not for mask-free editing"),
        (["--interpolate=0", f"--prompt={PROMPT}", f"--prompt={PROMPT}"], "num_pictures is 0"),
        (["--variations", "--image=picture.png", f"--prompt={PROMPT}"], "leave --prompt out"),
        (["--image=picture.png", "--prompt=a cat", "--best_of=2"], "'a cat' is no caption"),
    ],
)
def test_what_cannot_work_names_the_mend(here, monkeypatch, flags, message):
    monkeypatch.chdir(here)
    values = parsed(PIPELINE, *flags)
    with pytest.raises(ValueError, match=message):
        edit.edit(values)


def test_every_picture_has_its_file_and_its_row_of_iterations(here, monkeypatch, tmp_path):
    """Also where only prompts, or only negative prompts, tell pictures apart."""
    monkeypatch.chdir(here)
    again = "a small blue square on a white background"
    prompts = [f"--prompt={prompt}" for prompt in (PROMPT, again, PROMPT)]
    negatives = [f"--negative_prompt={color}" for color in ("blue", "blue", "green")]
    flags = ["--image=picture.png", "--num_inference_steps=3", f"--out={tmp_path}"]
    pictures = edit.edit(parsed(PIPELINE, *prompts, *negatives, *flags))["pictures"]
    assert [picture["negative_prompt"] for picture in pictures] == ["blue", "blue", "green"]
    assert len({picture["file"] for picture in pictures}) == 3
    assert all((tmp_path / picture["file"]).exists() for picture in pictures)
    edit.edit(parsed(PIPELINE, prompts[0], *flags[:2], f"--out={tmp_path / 'one'}"))
    with Image.open(tmp_path / "strip.png") as three, Image.open(tmp_path / "one" / "strip.png") as one:
        assert three.height > 2.5 * one.height  # a row each


def test_a_folder_that_cannot_be_is_known_before_anything_is_drawn(here, monkeypatch, tmp_path):
    monkeypatch.chdir(here)
    monkeypatch.setattr(MusePipeline, "edit", lambda *args, **kwargs: pytest.fail("drawn"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match="file is a file; name another"):
            edit.edit(parsed(PIPELINE, "--image=picture.png", f"--prompt={PROMPT}", f"--out={out}"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--variations"], ("variations", {})),
        (["--interpolate=3"], ("interpolate", {"num_pictures": 3})),
        (["--compose"], ("compose", {})),
        (
            ["--compose", "--region=0,0,8,8", "--region=8,0,16,8"],
            ("compose", {"regions": [(0, 0, 8, 8), (8, 0, 16, 8)]}),
        ),
        (["--strength=0.3"], ("edit", {"mask_image": None, "blend": True, "strength": 0.3, "history": True})),
        (["--share=0.3"], ("edit", {"mask_image": None, "blend": True, "share": 0.3, "history": True})),
        (
            ["--box=0,0,8,8", "--strength=0.3", "--noresize"],
            (
                "edit",
                {"mask_image": (0, 0, 8, 8), "blend": True, "resize": False, "strength": 0.3, "history": True},
            ),
        ),
    ],
)
def test_flags_choose_the_method(flags, expected):
    assert edit.method_of(parsed(*flags)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variations", "--interpolate=3"], "--variations is a way of its own"),
        (["--compose", "--strength=0.5"], "--compose is a way of its own"),
        (["--region=0,0,8,8"], "--region is of --compose"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        edit.method_of(parsed(*flags))
