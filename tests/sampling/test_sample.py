"""python -m muse_jax.sample: what it writes, and what it says when it can't."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from absl import flags

from muse_jax import sample


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "pipeline"
    pipeline.save(path)
    return path


def values(**given):
    parsed = flags.FlagValues()
    sample.define_flags(parsed)
    parsed(["sample"])
    for name, value in given.items():
        setattr(parsed, name, value)
    return parsed


def opened(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def test_pictures_grid_and_settings(pipeline, folder, tmp_path, capsys):
    given = {"pipeline": str(folder), "out": str(tmp_path / "out"), "batch_size": 4, "seed": 5, "guidance_scale": 2.5}
    prompts = ["a red circle", "a blue  SQUARE"]
    record = sample.run(values(prompt=prompts, negative_prompt=["red"], num_images_per_prompt=2, **given))
    files = ["a-red-circle_5.png", "a-red-circle_6.png", "a-blue-square_5.png", "a-blue-square_6.png"]
    assert [picture["file"] for picture in record["pictures"]] == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "grid.png", "samples.json"])
    expected = pipeline(prompts, "red", guidance_scale=2.5, num_images_per_prompt=2, seed=5).images
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(opened(tmp_path / "out" / file), np.asarray(image))
    assert opened(tmp_path / "out" / "grid.png").shape > (100, 100)
    written = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert written["settings"]["base"]["guidance_scale"] == 2.5
    assert written["settings"]["superres"]["num_inference_steps"] == 3
    assert written["pictures"][3] == {"file": files[3], "prompt": prompts[1], "negative_prompt": "red", "seed": 6}
    assert written["manifest"] == {"command": "made by a test"}
    said = capsys.readouterr().out
    assert str(tmp_path / "out" / files[0]) in said
    assert "The first picture took" in said


def test_the_settings_that_were_written_make_the_picture_again(pipeline, folder, tmp_path):
    """samples.json holds every setting of the call, those that the pipeline filled in among them."""
    args = {"pipeline": str(folder), "out": str(tmp_path), "batch_size": 4, "prompt": ["red"]}
    record = sample.run(values(num_images_per_prompt=4, superres_token_temperature=0.5, **args))
    settings = {**record["settings"]["base"], **{f"superres_{k}": v for k, v in record["settings"]["superres"].items()}}
    again = pipeline(["red"] * 4, seed=[0, 1, 2, 3], **settings).images
    np.testing.assert_array_equal(opened(tmp_path / "red_3.png"), np.asarray(again[3]))


def test_slugs():
    assert sample.slug("A red circle -- above: a square!") == "a-red-circle-above-a-square"
    assert sample.slug(" ") == "empty"
    assert sample.slug("../../etc/passwd") == "etc-passwd"
    assert sample.slug("日本 \ud800") == "日本"
    assert sample.slug("!?").startswith("prompt-")
    long = ["word " * 50 + end for end in "ab"]
    assert sample.slug(long[0]) != sample.slug(long[1])
    assert all(len(sample.slug(prompt).encode()) < 120 for prompt in (*long, "é" * 500))


def test_no_file_is_written_twice():
    names = sample.file_names(["a b", "a, b", "a b", "A B"], [0, 0, 1, 0])
    assert names == ["a-b_0.png", "a-b_0_2.png", "a-b_1.png", "a-b_0_3.png"]
    assert sample.file_names(["a", "a", "a"], [0, 0, 0], ["b", "c", "b"]) == ["a_0.png", "a_0_2.png", "a_0.png"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.png").write_bytes(b"before")

    def half(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sample.write_whole(tmp_path / "a.png", half)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--pipeline=nowhere"], "PipelineError: nowhere is not there"),
        (["--pipeline=PIPELINE"], "--prompt is missing"),
        (["--prompt=a", "--pipeline=PIPELINE", "--superres_schedule=cosin"], "superres: Unknown schedule 'cosin'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, tmp_path, arguments, message):
    command = [sys.executable, "-m", "muse_jax.sample", *(a.replace("PIPELINE", str(folder)) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
