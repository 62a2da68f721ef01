"""TFDS data sets: the scenes built by its command and read back, and another with labels and many captions."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from muse_jax import data
from muse_jax.data import scenes
from muse_jax.specs import DataSpec

COUNT = 24

PETS = '''
import numpy as np
import tensorflow_datasets as tfds


class Pets(tfds.core.GeneratorBasedBuilder):
    """Grey pictures with a label and several captions; those to test on have no label."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "photo": tfds.features.Image(shape=(None, None, 1)),
            "species": tfds.features.ClassLabel(names=["house_cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "depth": tfds.features.Image(shape=(4, 6, 1), dtype=np.float32),
            "view": {"photo": tfds.features.Image(shape=(4, 6, 3))},
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(4, 6, 3))),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2, labelled=False)}

    def _generate_examples(self, count, labelled=True):
        for i in range(count):
            yield i, {
                "photo": np.full((10, 20, 1), 40 * i, np.uint8),
                "species": i % 2 if labelled else -1,
                "captions": [{"text": f"picture {i}, seen by {k}"} for k in ("ann", "bob", "eve")],
                "depth": np.full((4, 6, 1), i / 10, np.float32),
                "view": {"photo": np.full((4, 6, 3), 30 * i, np.uint8)},
                "frames": [np.zeros((4, 6, 3), np.uint8)] * 2,
            }


if __name__ == "__main__":
    import sys

    from muse_jax.data import scenes_builder

    folder = sys.argv[1]
    Pets(data_dir=folder, file_format="array_record").download_and_prepare()
    Pets(data_dir=folder + "/old", file_format="tfrecord").download_and_prepare()
    scenes_builder.main([f"--data_dir={folder}", "--config=32", "--max_examples_per_split=24"])
'''


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> str:
    """A TFDS data directory with pets and scenes; another process makes it, with TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "pets.py"
    script.write_text(PETS)
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(folder)


@pytest.fixture
def spec(built) -> DataSpec:
    return DataSpec(
        name="tfds", dataset="scenes/32", path=built, image_size=32, text_key="caption", text_length=20,
        vocabulary="captions",
    )  # fmt: skip


@pytest.fixture
def pets(built) -> DataSpec:
    return DataSpec(name="tfds", dataset="pets", path=built, image_size=8, image_key="photo")


def test_scenes_come_back_as_they_were_made(spec):
    made = {scene.caption: scene for scene in scenes.scenes(range(COUNT), split="test")}
    source = data.make_source(spec, "eval")
    assert len(source) == COUNT
    for i in range(COUNT):
        example = source[i]
        np.testing.assert_array_equal(example["image"], scenes.render(made[example["text"]], 32))


def test_batches_of_a_tfds_data_set(spec):
    vocabulary = data.make_vocabulary(spec)
    assert set(vocabulary.words) <= set(scenes.WORDS)
    loader = data.make_loader(spec, batch_size=6, seed=0, vocabulary=vocabulary, start_step=3)
    batch = next(loader)
    loader.close()
    assert sorted(k for k in batch) == ["example_id", "image", "label", "text_ids", "text_mask"]
    assert batch["text_mask"].sum(1).min() >= 8
    example = data.make_source(spec)[int(batch["example_id"][0]) % COUNT]
    np.testing.assert_array_equal(batch["image"][0], example["image"])


def test_labels_become_text_and_numbers(pets):
    source = data.make_source(dataclasses.replace(pets, text_key="species", text_length=4))
    examples = [source[i] for i in range(len(source))]
    assert {(e["text"], e["label"]) for e in examples} == {("house cat", 0), ("dog", 1)}
    assert sorted(int(e["image"].mean()) for e in examples) == [0, 40, 80, 120, 160, 200]  # grey to RGB
    assert all(e["image"].shape == (8, 8, 3) for e in examples)
    vocabulary = data.make_vocabulary(dataclasses.replace(pets, text_key="species", text_length=4))
    assert sorted(vocabulary.words) == ["cat", "dog", "house"]
    plain = data.make_source(pets)[0]  # the only label feature goes along, for class-conditional models
    assert sorted(plain) == ["image", "label"]


def test_what_has_no_label_has_no_text(pets):
    source = data.make_source(dataclasses.replace(pets, text_key="species", text_length=4), "eval")
    assert [(source[i]["text"], source[i]["label"]) for i in range(2)] == [("", -1)] * 2


def test_labels_are_classes(pets):
    spec = dataclasses.replace(pets, vocabulary="classes")
    assert data.make_vocabulary(spec).names == ("house cat", "dog")
    assert sorted(data.make_source(spec)[0]) == ["image", "label"]


def test_one_of_many_captions_is_drawn_by_the_seed(pets):
    source = data.make_source(dataclasses.replace(pets, text_key="captions/text", text_length=8))
    number = source[0]["text"].split(",")[0]
    seen = {source.example(0, (seed,))["text"] for seed in range(30)}
    assert seen == {f"{number}, seen by {name}" for name in ("ann", "bob", "eve")}
    assert source.example(0, (5,))["text"] == source.example(0, (5,))["text"]
    assert len(list(source.captions())) == 18


def test_pictures_of_floats_are_scaled(pets):
    source = data.make_source(dataclasses.replace(pets, image_key="depth", image_size=4))
    values = sorted(float(source[i]["image"].mean()) for i in range(len(source)))
    np.testing.assert_allclose(values, [0, 25.5, 51, 76.5, 102, 127.5], atol=1)


def test_splits_and_slices(pets):
    assert len(data.make_source(pets, "eval")) == 2
    assert len(data.make_source(dataclasses.replace(pets, split="train[:50%]"))) == 3


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"text_key": "captoin"}, ("data.text_key is 'captoin'", "captions/text (Text)", "species (ClassLabel)")),
        ({"text_key": "photo"}, ("of type Image; expected Text or ClassLabel", "photo (Image)")),
        ({"image_key": "image"}, ("data.image_key is 'image'", "photo (Image)")),
        ({"image_key": "frames"}, ("data.image_key is 'frames', a sequence; expected one picture", "photo (Image)")),
        ({"text_length": 5}, ("data.text_key is empty", "captions/text (Text)")),
        ({"split": "trian"}, ("'trian'", "'train'")),
        ({"dataset": "petz"}, ("'petz'",)),
        ({"dataset": ""}, ("data.dataset is empty",)),
    ],
)
def test_what_is_wrong_is_named_with_what_there_is(pets, changes, parts):
    with pytest.raises(ValueError) as caught:
        data.make_source(dataclasses.replace(pets, **changes))
    for part in parts:
        assert part in str(caught.value)


def test_a_format_without_random_access_says_what_to_do(pets):
    with pytest.raises(ValueError, match="file_format=array_record"):
        data.make_source(dataclasses.replace(pets, path=f"{pets.path}/old"))


def test_fingerprints_have_name_version_count_and_keys(pets, spec):
    assert data.fingerprint(pets) == "tfds:pets/2.0.0/train:6:image_key=photo"
    assert data.fingerprint(spec) == f"tfds:scenes/32/{scenes.VERSION}.0.0/train:{COUNT}:text_key=caption"
    assert data.fingerprint(dataclasses.replace(spec, text_key="", text_length=0)).endswith(f"/train:{COUNT}")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "old"], ids=["array_record", "tfrecord"])
def test_conversion_to_array_record_shards(built, tmp_path, folder):
    """Of data sets in any format, with all captions of a picture; in another process, as it needs TensorFlow."""
    code = (
        "import json\n"
        "from etils import epath\n"
        "from muse_jax.data import array_records, conversion, inputs\n"
        "for key in ('photo', 'depth', 'view/photo'):\n"
        f"    keys = dict(path={f'{built}/{folder}'!r}, image_key=key, text_key='captions/text')\n"
        "    source = inputs.TFDS('pets', per_shard=4, **keys)\n"
        f"    job = conversion.Conversion(source, {str(tmp_path)!r} + '/' + key, 0.0, True, 0, 0.0)\n"
        "    pieces = source.pieces()\n"
        "    array_records.begin(epath.Path(job.out), job.plan(pieces))\n"
        "    job.write_manifest([job.convert(i, len(pieces), piece) for i, piece in enumerate(pieces)])\n"
        "wrong = ({'image_key': 'fhoto'}, {'image_key': 'frames'}, {'text_key': 'depth'}, {'split': 'val'})\n"
        "for wrong in (*wrong, {'dataset': 'cats'}):\n"
        "    try:\n"
        f"        inputs.TFDS(**{{'dataset': 'pets', 'path': {built!r}, 'image_key': 'photo', **wrong}}).pieces()\n"
        "    except inputs.InputError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in (
        "--image_key is 'fhoto'",
        "'frames', a sequence; expected one picture",
        "--text_key is 'depth', of type Image",
        "no split 'val'",
        "'cats'",
    ):
        assert words in done.stdout
    for key, step in {"photo": 40, "depth": 25.5, "view/photo": 30}.items():
        source = data.make_source(DataSpec(name="array_record", image_size=4, path=str(tmp_path / key)))
        assert len(source) == 6
        for index in range(6):
            example = source.example(index, (0, index))
            number = int(example["text"].removeprefix("picture ").split(",")[0])
            assert example["image"].mean() == pytest.approx(step * number, abs=0.5), key
        assert len(list(source.captions())) == 18


def test_reading_does_not_import_tensorflow(spec):
    code = (
        "import sys; from muse_jax import data; from muse_jax.specs import DataSpec\n"
        f"spec = {spec!r}\n"
        "next(data.make_loader(spec, batch_size=2, seed=0, vocabulary=data.make_vocabulary(spec)))\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tfds_builds_the_scenes_as_the_builders_documentation_says(tmp_path, root):
    from muse_jax.data import scenes_builder

    command = next(line for line in scenes_builder.__doc__.splitlines() if line.startswith("  tfds build "))
    words = command.replace("=DIR", f"={tmp_path}").split()
    words = [sys.executable, "-m", "tensorflow_datasets.scripts.cli.main", *words[1:], "--max_examples_per_split=3"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = DataSpec(name="tfds", image_size=64, dataset="scenes/64", path=str(tmp_path), text_key="caption")
    source = data.make_source(spec)
    assert {source[i]["text"] for i in range(3)} == {scenes_builder.scenes.scene(i).caption for i in range(3)}
