"""Folders of captioned pictures as people have them: what is used, what is skipped, and what is said about it."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from muse_jax import data
from muse_jax.data import folders, reading, transforms
from muse_jax.data.transforms import UnusableError
from muse_jax.specs import DataSpec


def picture(path: pathlib.Path, color=(200, 30, 30), size=(12, 10), **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def spec_of(root, **changes) -> DataSpec:
    return DataSpec(**{"name": "folder", "path": str(root), "image_size": 8, "text_length": 6, **changes})


def captions_of(root, **changes) -> dict[str, str]:
    """Key -> caption of all usable pictures, of both splits."""
    found = folders.scan(str(root), **changes)
    return dict(zip(found.keys, found.captions, strict=True))


def test_captions_beside_the_pictures(tmp_path):
    for name in ("a.png", "sub/b.jpg", "c.WEBP"):
        path = picture(tmp_path / name)
        path.with_suffix(".txt").write_text(f"caption\n  of {path.stem}\n")
    assert captions_of(tmp_path) == {"a.png": "caption of a", "c.WEBP": "caption of c", "sub/b.jpg": "caption of b"}
    source = data.make_source(spec_of(tmp_path))
    example = source[0]
    assert example["image"].shape == (8, 8, 3)
    assert example["image"].dtype == np.uint8
    assert example["text"] == f"caption of {pathlib.Path(source.key(0)).stem}"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_in_metadata(tmp_path, kind):
    for name in ("a.png", "sub/b.png", "own/c.png", "own/deep/d.png", "no_ending"):
        picture(tmp_path / name, format="PNG")
    rows = {"a.png": 'a "quoted", long\u2028one', "sub/b.png": "bé", "own/c.png": "not this one", "no_ending": "e"}
    own = {"c.png": "c of its own folder", "deep/d.png": "d"}
    for folder, table in ((tmp_path, rows), (tmp_path / "own", own)):
        with open(folder / f"metadata.{kind}", "w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                file.write("\ufefftext,file_name\r\n")
            for name, text in table.items():
                quoted = text.replace('"', '""')
                row = json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
                file.write(f"{row}\n\n" if kind == "jsonl" else f'"{quoted}",{name}\r\n')
    assert captions_of(tmp_path) == {
        "a.png": 'a "quoted", long one',
        "no_ending": "e",
        "own/c.png": "c of its own folder",  # the nearest metadata
        "own/deep/d.png": "d",
        "sub/b.png": "bé",
    }


def test_another_column_and_the_text_beside_goes_first(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("beside")
    rows = [{"file_name": n, "caption": "in the table", "text": "other"} for n in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = data.make_source(spec_of(tmp_path, text_key="caption"))
    assert captions_of(tmp_path, text_key="caption") == {"a.png": "in the table", "b.png": "beside"}
    assert source[0]["text"] in ("in the table", "beside")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        ("übung".encode("utf-16"), "übung"),
        (b"latin \xfc", "latin \ufffd"),
        ("a\u200fרגל".encode(), "a\u200fרגל"),
    ],
)
def test_caption_files_in_any_encoding(tmp_path, written, read):
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes(written)
    assert captions_of(tmp_path) == {"a.png": read}


@pytest.fixture
def zoo(tmp_path):
    """A folder with one file of each kind of trouble and twenty sound pictures."""
    for i in range(20):
        picture(tmp_path / f"good{i:02}.png", (10 * i, 0, 0)).with_suffix(".txt").write_text(f"good {i}")
    sound = picture(tmp_path / "caption_is_missing.png").read_bytes()
    for name, content in {
        "caption_is_empty.png": sound,
        "empty_file.png": b"",
        "not_a_picture.jpg": b"this is text",
        "half_header.png": sound[:20],
        "wrong_ending.jpg": sound,  # a PNG; sound all the same
        "vector.svg": b"<svg/>",
        "modern.heic": b"....",
    }.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("" if name == "caption_is_empty.png" else "text")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    (tmp_path / "bomb.txt").write_text("boom")
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(sound)
        file.truncate(65 << 20)  # sparse
    os.symlink("nowhere.png", tmp_path / "dangling.png")
    os.symlink("circle.png", tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path, tmp_path / "loop")
    (tmp_path / ".hidden.png").write_bytes(b"junk")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "junk.png").write_bytes(b"junk")
    (tmp_path / "README.md").write_text("about")
    return tmp_path


SKIPPED = {
    "no caption": ("caption_is_empty.png", "caption_is_missing.png"),
    "empty file": ("empty_file.png",),
    "not a readable picture": ("half_header.png", "not_a_picture.jpg"),
    "more than 64 megapixels": ("bomb.png",),
    "larger than 64 MiB": ("huge.png",),
    "not a regular file": ("circle.png", "dangling.png", "pipe.png"),
    "format not read (.svg)": ("vector.svg",),
    "format not read (.heic)": ("modern.heic",),
}


def test_what_cannot_be_used_is_skipped_counted_and_named(zoo, caplog):
    with caplog.at_level(logging.INFO):
        source = data.make_source(spec_of(zoo))
    assert source.scan.skipped == SKIPPED
    assert set(source.scan.keys) == {f"good{i:02}.png" for i in range(20)} | {"wrong_ending.jpg"}
    assert "21 of 33 pictures are usable" in caplog.text
    for reason, names in SKIPPED.items():
        assert f"Skipped {len(names)}, {reason}: {', '.join(names)}" in caplog.text


def test_many_skipped_files_are_all_listed_by_the_command(tmp_path, capsys, caplog):
    for i in range(8):
        (tmp_path / f"bad{i}.png").write_bytes(b"no")
    picture(tmp_path / "good.png").with_suffix(".txt").write_text("good")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.txt").write_text("cut")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    data.make_source(spec_of(tmp_path))
    assert "bad4.png, ..." in caplog.text
    assert "python -m muse_jax.data.folders" in caplog.text
    folders.main([str(tmp_path), "--decode"])
    printed = capsys.readouterr().out
    assert all(f"bad{i}.png\tnot a readable picture" in printed for i in range(8))
    assert "cut.png\tbroken pixel data" in printed
    assert "1 pictures are usable" in printed


def test_the_command_lists_a_folder_without_a_usable_picture(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no")
    assert folders.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "bad.png\tnot a readable picture\n0 pictures are usable by their headers.\n"
    assert folders.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere', which is no folder. Expected picture files" in capsys.readouterr().err


def test_the_command_runs_without_a_warning(zoo):
    command = [sys.executable, "-W", "error", "-m", "muse_jax.data.folders", str(zoo)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "bomb.png\tmore than 64 megapixels" in done.stdout
    assert "21 pictures are usable" in done.stdout


def test_pixels_that_turn_out_broken_are_replaced_and_counted(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for i in range(40):
        path = tmp_path / f"{i:02}.png"
        Image.fromarray(noise + np.uint8(i)).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}")
        if i % 4 == 0:
            path.write_bytes(path.read_bytes()[:2000])  # a sound header, half of the pixels
    source = data.make_source(spec_of(tmp_path))
    first = [source[i] for i in range(len(source))]
    broken = [i for i in range(len(source)) if int(source.key(i)[:2]) % 4 == 0]
    assert set(source.broken) == {source.key(i) for i in broken}
    assert all(f"Skipped {source.key(i)} (broken pixel data" in caplog.text for i in broken)
    for i, example in enumerate(first):
        stem = int(example["text"].split()[1])
        assert stem % 4, "a broken picture came through"
        assert (f"{stem:02}.png" == source.key(i)) == (i not in broken)  # the caption goes with the picture
    other = data.make_source(spec_of(tmp_path))  # read in another order: the same substitutes
    for i in reversed(range(len(source))):
        np.testing.assert_array_equal(other[i]["image"], first[i]["image"])
        assert other[i]["text"] == first[i]["text"]


@pytest.mark.parametrize("held_out", ["", "test/0.png"])
def test_training_pictures_stand_in_where_all_that_is_held_out_is_broken(tmp_path, held_out):
    """Of a small folder one picture is held out, and that may be the broken one."""

    def cut(path):  # a sound header, half of the pixels
        path.write_bytes(path.read_bytes()[:2000])

    names = [held_out, *(f"train/{i}.png" for i in range(6))] if held_out else [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        picture(tmp_path / name)
        Image.fromarray(pixels).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {i}")
    held_out = held_out or data.make_source(spec_of(tmp_path), "eval").key(0)
    cut(tmp_path / held_out)
    source = data.make_source(spec_of(tmp_path), "eval")
    assert [source.key(i) for i in range(len(source))] == [held_out]
    example = source[0]
    assert example["text"] in set(data.make_source(spec_of(tmp_path), "train").captions())
    assert set(source.broken) == {held_out}
    np.testing.assert_array_equal(data.make_source(spec_of(tmp_path), "eval")[0]["image"], example["image"])

    for name in names:
        cut(tmp_path / name)
    with pytest.raises(UnusableError, match="are broken; mend them"):
        data.make_source(spec_of(tmp_path), "eval")[0]


def test_a_file_that_vanishes_during_the_run_is_replaced(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.png").with_suffix(".txt").write_text(str(i))
    source = data.make_source(spec_of(tmp_path))
    os.remove(tmp_path / source.key(2))
    assert source[2]["text"] != source.key(2)[0]
    assert list(source.broken) == [source.key(2)]


def test_a_picture_that_storage_does_not_give_at_once_is_not_broken(tmp_path, monkeypatch):
    """Another picture in its place would be seen by this process alone."""
    for i in range(10):
        picture(tmp_path / f"{i}.png").with_suffix(".txt").write_text(str(i))
    source = data.make_source(spec_of(tmp_path))
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]

    def failing(path):
        if failures:
            raise failures.pop()
        return os.path.getsize(path)

    monkeypatch.setattr(transforms, "check_file_size", failing)
    assert source[2]["text"] == source.key(2)[0]
    assert not source.broken
    failures += [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(UnusableError, match="could not be read in 3 tries .*Input/output error.*storage's fault"):
        source[3]
    assert not source.broken


def test_a_header_that_storage_does_not_give_costs_no_picture(tmp_path, monkeypatch):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    failures = [OSError(errno.EIO, "Input/output error")]
    whole = Image.open

    def failing(*arguments, **named):
        if failures:
            raise failures.pop()
        return whole(*arguments, **named)

    monkeypatch.setattr(Image, "open", failing)
    assert folders.scan(str(tmp_path)).keys == ("a.png",)
    folders._scan.cache_clear()
    failures += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(OSError, match="Input/output error"):
        folders.scan(str(tmp_path))


def test_a_link_that_storage_does_not_follow_costs_no_picture(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "pictures").mkdir()
    picture(tmp_path / "there/a.png").with_suffix(".txt").write_text("a")
    (tmp_path / "pictures/link").symlink_to(tmp_path / "there")
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    failures, whole = [], folders._is_folder

    class Entry:
        def __init__(self, entry):
            self.name, self.stat, self.is_symlink, self._entry = entry.name, entry.stat, entry.is_symlink, entry

        def is_dir(self):
            if failures:
                raise failures.pop()
            return self._entry.is_dir()

    monkeypatch.setattr(folders, "_is_folder", lambda entry: whole(Entry(entry)))
    failures += [OSError(errno.EIO, "Input/output error")]
    assert folders.scan(str(tmp_path / "pictures")).keys == ("link/a.png",)
    failures += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(OSError, match="Input/output error"):
        folders.scan(str(tmp_path / "pictures"))


def test_a_folder_that_storage_does_not_list_costs_no_picture(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "sub/a.png").with_suffix(".txt").write_text("a")
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    failures, whole = [], os.scandir

    def failing(folder):
        if failures and folder.endswith("sub"):
            raise failures.pop()
        return whole(folder)

    monkeypatch.setattr(os, "scandir", failing)
    failures += [OSError(errno.EIO, "Input/output error")]
    assert folders.scan(str(tmp_path)).keys == ("sub/a.png",)
    failures += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(OSError, match="Input/output error"):
        folders.scan(str(tmp_path))
    failures[:] = [OSError(errno.EACCES, "Permission denied")]
    with pytest.raises(ValueError, match="Skipped 1, folder cannot be opened: sub/"):
        folders.scan(str(tmp_path))


def test_nothing_usable_says_why_for_each_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        folders.scan(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no picture files in it at all.*|name.txt beside"):
        folders.scan(str(tmp_path))
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"junk")
    (tmp_path / "d.tiff").write_bytes(b"II*")
    with pytest.raises(ValueError, match="Nothing is usable") as caught:
        data.make_source(spec_of(tmp_path))
    for part in (
        "Skipped 2, no caption: a.png, b.png",
        "Skipped 1, not a readable picture: c.png",
        "Convert",
        "metadata.jsonl",
    ):
        assert part in str(caught.value)


def test_metadata_faults_are_reported(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        '{"file_name": "a.png", "text": "fine"}',
        "{broken",
        '{"file_name": "b.png", "text": "gone"}',
        '{"name": 3}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert captions_of(tmp_path) == {"a.png": "fine"}
    summary = folders.scan(str(tmp_path)).summary()
    assert "2 rows without file_name and text as strings (columns: file_name, name, text)" in summary
    assert "1 rows name files that are not there (b.png, ...)" in summary
    picture(tmp_path / "sub/c.png").with_suffix(".txt").write_text("c")
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "../a.png", "text": "from below"}')
    assert captions_of(tmp_path) == {"a.png": "fine", "sub/c.png": "c"}
    summary = folders.scan(str(tmp_path)).summary()
    assert "sub/metadata.jsonl: 1 rows name files outside its folder (../a.png, ...)" in summary


def test_a_tokenizer_needs_no_captions(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    source = data.make_source(spec_of(tmp_path, text_length=0))
    assert len(source.scan.keys) == 2
    assert "text" not in source[0]
    (tmp_path / "a.txt").write_text("a caption")
    assert data.make_source(spec_of(tmp_path, text_length=0)).scan.keys == ("a.png", "b.png")
    assert data.make_source(spec_of(tmp_path)).scan.skipped == {"no caption": ("b.png",)}


def test_splits_are_apart_and_keep_when_files_are_added(tmp_path):
    def keys(split: str) -> set[str]:
        source = data.make_source(spec_of(tmp_path), split)
        return {source.key(i) for i in range(len(source))}

    for i in range(2):
        picture(tmp_path / f"{i:03}.png").with_suffix(".txt").write_text("x")
    assert len(keys("train")) == len(keys("eval")) == 1
    for i in range(2, 300):
        picture(tmp_path / f"{i:03}.png").with_suffix(".txt").write_text("x")
    train, held = keys("train"), keys("eval")
    assert not train & held
    assert len(train | held) == 300
    assert 3 <= len(held) <= 30  # 5%
    for i in range(300, 320):
        picture(tmp_path / f"{i:03}.png").with_suffix(".txt").write_text("x")
    assert held <= keys("eval")
    assert train <= keys("train")


def test_a_caption_that_is_a_pipe_holds_nobody_up(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a picture")
    os.mkfifo(tmp_path / "b.txt")
    found = folders.scan(str(tmp_path))
    assert found.keys == ("a.png",)
    assert any("b.txt cannot be read (not a regular file)" in note for note in found.notes)


def test_one_picture_is_enough(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    assert len(data.make_source(spec_of(tmp_path), "train")) == len(data.make_source(spec_of(tmp_path), "eval")) == 1


def test_folders_named_like_the_splits_are_the_splits(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        for i in range(count):
            picture(tmp_path / split / f"{i}.png").with_suffix(".txt").write_text(split)
    for split, name, count in (("train", "train", 5), ("eval", "test", 3)):
        source = data.make_source(spec_of(tmp_path), split)
        assert {source[i]["text"] for i in range(len(source))} == {name}
        assert len(source) == count


@pytest.mark.parametrize(
    ("folder", "link", "target"),
    [
        ("test", "validation", "test"),
        ("test", "train/more", "../test"),
        ("val", "test", "val"),
        ("train/held_out", "test", "train/held_out"),
    ],
)
def test_a_link_to_a_splits_folder_makes_no_test_picture_a_training_one(tmp_path, folder, link, target):
    for i in range(6):
        picture(tmp_path / f"train/{i}.png").with_suffix(".txt").write_text("to train on")
        picture(tmp_path / folder / f"{i}.png").with_suffix(".txt").write_text("to test on")
    os.symlink(target, tmp_path / link)
    for split, caption in (("train", "to train on"), ("eval", "to test on")):
        assert list(data.make_source(spec_of(tmp_path), split).captions()) == [caption] * 6


def test_a_link_may_be_the_folder_to_train_on(tmp_path):
    for i in range(6):
        picture(tmp_path / f"images/{i}.png").with_suffix(".txt").write_text("to train on")
        picture(tmp_path / f"val/{i}.png").with_suffix(".txt").write_text("to test on")
    os.symlink("images", tmp_path / "mine")
    source = data.make_source(spec_of(tmp_path, split="mine", eval_split="val"))
    assert list(source.captions()) == ["to train on"] * 6


def test_the_order_does_not_depend_on_the_disk(tmp_path):
    for name in ("b", "a", "C", "z/a", "ü"):
        picture(tmp_path / f"{name}.png").with_suffix(".txt").write_text(name)
    assert folders.scan(str(tmp_path)).keys == ("C.png", "a.png", "b.png", "z/a.png", "ü.png")


def test_the_fingerprint_changes_with_the_data(tmp_path):
    for i in range(6):
        picture(tmp_path / f"{i}.png").with_suffix(".txt").write_text("x")
    spec = spec_of(tmp_path)
    before = data.fingerprint(spec)
    assert data.fingerprint(spec) == before
    source = data.make_source(spec)
    name = source.key(0)
    (tmp_path / name).with_suffix(".txt").write_text("y")
    captioned = data.fingerprint(spec)
    picture(tmp_path / name, size=(80, 81))
    resized = data.fingerprint(spec)
    content = bytearray((tmp_path / name).read_bytes())
    content[-20] ^= 1  # of the same size
    (tmp_path / name).write_bytes(bytes(content))
    changed = data.fingerprint(spec)
    os.rename(tmp_path / name, tmp_path / "other.png")
    os.rename((tmp_path / name).with_suffix(".txt"), tmp_path / "other.txt")
    assert len({before, captioned, resized, changed, data.fingerprint(spec)}) == 5


def test_a_name_that_is_no_utf8_can_be_reported(tmp_path):
    picture(tmp_path / "good.png").with_suffix(".txt").write_text("x")
    with open(os.fsencode(str(tmp_path)) + b"/b\xffd.png", "wb") as file:
        file.write(b"junk")
    summary = folders.scan(str(tmp_path)).summary()
    summary.encode("utf-8")
    assert "b\\udcffd.png" in summary


def test_random_damage_never_stops_a_run(tmp_path):
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (24, 24, 3), np.uint8)
    for i in range(240):
        kind = ("png", "jpg", "webp", "gif", "bmp")[i % 5]
        path = tmp_path / f"{i:03}.{kind}"
        Image.fromarray(noise).save(path)
        path.with_suffix(".txt").write_text("x")
        content = bytearray(path.read_bytes())
        if i % 3 == 0:
            content = content[: draw.integers(len(content))]
        elif i % 3 == 1:
            for position in draw.integers(0, len(content), 8):
                content[position] ^= 1 << int(draw.integers(8))
        path.write_bytes(bytes(content))
    source = data.make_source(spec_of(tmp_path))
    assert all(source[i]["image"].shape == (8, 8, 3) for i in range(len(source)))
    assert 10 < len(source.broken) + sum(map(len, source.scan.skipped.values())) < 160
