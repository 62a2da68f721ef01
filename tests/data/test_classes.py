"""Labels and the names of classes, from every kind of data."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from PIL import Image

from muse_jax import data
from muse_jax.data import array_records, scenes
from muse_jax.evaluation import prompts
from muse_jax.specs import DataSpec, SpecError

SCENES = DataSpec(name="scenes", image_size=32, vocabulary="classes")


def test_single_objects_are_what_their_label_says():
    source = data.make_source(SCENES)
    names = source.class_names()
    assert len(names) == len(set(names)) == 24
    made = source.batch(range(200))
    for image, label, caption in zip(made["image"], made["label"], made["text"], strict=True):
        assert all(prompts.score(image, f"a {names[label]}").values())
        assert names[label] in caption
    assert set(made["label"]) == set(range(24)), "combinations that captions hold out are classes too"


def test_single_objects_are_other_data_than_scenes():
    plain = DataSpec(name="scenes", image_size=32)
    assert data.fingerprint(SCENES) != data.fingerprint(plain)
    assert "label" not in data.make_source(plain)[0]
    assert scenes.single_objects([5]) == scenes.single_objects([3, 5])[1:]


def test_a_loader_gives_labels():
    loader = data.make_loader(SCENES, batch_size=4, seed=0)
    batch = next(loader)
    loader.close()
    assert batch["label"].dtype == np.int32
    assert batch["label"].shape == (4,)


def _pictures(root, keys):
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / key)


def test_a_folder_has_one_sub_folder_a_class(tmp_path):
    _pictures(tmp_path, [f"{name}/{i}.png" for name in ("dog", "wild cat") for i in range(20)])
    spec = DataSpec(name="folder", path=str(tmp_path), image_size=8, vocabulary="classes")
    for split in ("train", "eval"):
        source = data.make_source(spec, split)
        assert source.class_names() == ["dog", "wild cat"]
        for i in range(len(source)):
            assert source.key(i).startswith(source.class_names()[source[i]["label"]] + "/")
    assert data.make_vocabulary(spec).names == ("dog", "wild cat")


def test_a_caption_in_a_folder_of_classes_costs_no_other_picture(tmp_path):
    _pictures(tmp_path, [f"{split}/{name}/0.png" for split in ("train", "test") for name in ("cat", "dog")])
    (tmp_path / "train/cat/0.txt").write_text("a caption")
    source = data.make_source(DataSpec(name="folder", path=str(tmp_path), image_size=8, vocabulary="classes"))
    assert [source.class_names()[source[i]["label"]] for i in range(len(source))] == ["cat", "dog"]


def test_a_folder_with_splits_has_the_classes_within_them(tmp_path):
    _pictures(tmp_path, [f"{split}/{name}/0.png" for split in ("train", "test") for name in ("cat", "dog")])
    spec = DataSpec(name="folder", path=str(tmp_path), image_size=8, vocabulary="classes")
    source = data.make_source(spec, "eval")
    assert source.class_names() == ["cat", "dog"]
    assert [source[i]["label"] for i in range(2)] == [0, 1]


def test_a_folder_without_classes_is_refused(tmp_path):
    _pictures(tmp_path, ["0.png", "1.png", "dog/1.png"])
    spec = DataSpec(name="folder", path=str(tmp_path), image_size=8, vocabulary="classes")
    with pytest.raises(ValueError, match="no folder of pictures for each class .* CLASS/NAME.jpg"):
        data.make_source(spec)
    assert data.make_source(DataSpec(name="folder", path=str(tmp_path), image_size=8))[0].keys() == {"image"}


def test_names_of_random_pictures():
    spec = DataSpec(name="synthetic", image_size=8, vocabulary="classes")
    assert len(data.make_vocabulary(spec).names) == 1000


def test_data_without_classes_are_refused(tmp_path):
    folder = epath.Path(tmp_path)
    with array_records.ShardWriter(folder, "train.array_record") as writer:
        writer.write(array_records.pack({"image": b"", "text": "a"}))
        shard = dataclasses.asdict(writer.finish())
    array_records.write_manifest(folder, "pictures", [{"shards": {"train": shard}}])
    records = DataSpec(name="array_record", path=str(tmp_path), image_size=8, vocabulary="classes")
    sources = {"drawn": {"name": "scenes", "weight": 1}}
    for spec in (records, DataSpec(name="mixture", sources=sources, image_size=8, vocabulary="classes")):
        with pytest.raises(SpecError, match=f"{spec.name!r} has no classes; use 'folder' or 'tfds'"):
            data.make_vocabulary(spec)
