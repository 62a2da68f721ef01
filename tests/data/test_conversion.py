"""Tars, folders and Parquet files as ArrayRecord shards: what is kept, what is skipped and why, and reading it back."""

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import tarfile
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from muse_jax import data
from muse_jax.data import array_record_source, array_records, conversion, inputs, transforms
from muse_jax.specs import DataSpec


def picture(index, size=(40, 30), kind="PNG"):
    """A file's bytes, of a colour that says which picture it is."""
    file = io.BytesIO()
    Image.new("RGB", size, (index * 5 % 256, index * 11 % 256, 7)).save(file, kind)
    return file.getvalue()


def colour(index):
    return (index * 5 % 256, index * 11 % 256, 7)


def write_tar(path, members):
    """A tar of (name, bytes) pairs; a TarInfo in the place of a pair is added as it is."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))


def members_of(index, caption=None, **options):
    """A sample as img2dataset writes it."""
    caption = f"picture {index}" if caption is None else caption
    meta = {"caption": caption, "status": "success"}
    key = f"{index:09d}"
    return [(f"{key}.png", picture(index, **options)), (f"{key}.txt", caption.encode()), (f"{key}.json", dumps(meta))]


def dumps(value):
    return json.dumps(value).encode()


def job(source, out, **changes):
    settings = dict(eval_share=0.2, needs_text=True, min_side=0, max_aspect=0.0)
    return conversion.Conversion(source, str(out), **{**settings, **changes})


def run(job):
    """The work without Beam: pieces one after the other."""
    folder, pieces = epath.Path(job.out), job.source.pieces()
    if not array_records.begin(folder, job.plan(pieces)):
        job.write_manifest([job.convert(number, len(pieces), piece) for number, piece in enumerate(pieces)])
    return json.loads((folder / array_records.MANIFEST).read_text())


def spec_of(out, **changes):
    return DataSpec(name="array_record", image_size=16, path=str(out), text_length=8, **changes)


def everything(out, **changes):
    """{caption: the middle pixel} over both splits."""
    found = {}
    for split in ("train", "eval"):
        source = data.make_source(spec_of(out, **changes), split)
        for index in range(len(source)):
            example = source[index]
            found[example["text"]] = tuple(int(c) for c in example["image"][8, 8])
    return found


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        indices = range(number * 8, number * 8 + 8)
        write_tar(folder / f"{number:05d}.tar", itertools.chain.from_iterable(members_of(i) for i in indices))
    return folder


def test_tars_come_back_whole(tars, tmp_path):
    manifest = run(job(inputs.WebDataset(str(tars)), tmp_path / "out"))
    assert manifest["samples"] == 24
    assert manifest["skipped"] == {}
    assert sum(split["records"] for split in manifest["splits"].values()) == 24
    assert everything(tmp_path / "out") == {f"picture {i}": colour(i) for i in range(24)}


def test_the_loader_shuffles_all_shards_and_splits_them_by_process(tars, tmp_path):
    run(job(inputs.WebDataset(str(tars)), tmp_path / "out", eval_share=0.0))
    spec = spec_of(tmp_path / "out", crop="random", flip=True)
    vocabulary = data.make_vocabulary(spec)
    options = dict(batch_size=8, seed=3, vocabulary=vocabulary)

    def batches(**more):
        loader = data.make_loader(spec, **options, **more)
        found = list(itertools.islice(loader, 3))
        loader.close()
        return found

    whole = batches()
    ids = np.concatenate([batch["example_id"] for batch in whole])
    assert sorted(ids) == list(range(24))
    assert all(len({i // 8 for i in batch["example_id"]}) > 1 for batch in whole), "each batch has several shards'"
    halves = [batches(process_index=index, process_count=2) for index in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), batch[key])


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    link = tarfile.TarInfo("000000008.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(
        tmp_path / "odd.tar",
        [
            *members_of(0),
            ("000000001.json", dumps({"status": "failed_to_download"})),
            ("000000002.png", picture(2)),  # no caption
            *members_of(3, caption="  "),
            ("000000004.jpg", b"no picture"),
            ("000000004.txt", b"broken"),
            ("000000005.png", picture(5)[:-40]),
            ("000000005.txt", b"cut off"),
            *members_of(6),
            *members_of(7),
            ("000000006.txt", b"again"),  # not beside its picture
            link,
            ("000000008.txt", b"a link"),
            ("000000009.png", picture(9)),
            ("000000009.jpg", picture(9, kind="JPEG")),
            ("000000009.txt", b"two"),
            *members_of(10, size=(20, 90)),
            *members_of(11, size=(9, 9)),
            ("../../escaped.png", picture(12)),
            ("../../escaped.txt", b"\xff kept, but nowhere written"),
        ],
    )
    found = run(job(inputs.WebDataset(str(tmp_path / "odd.tar")), tmp_path / "out", min_side=10, max_aspect=3.0))
    skipped = {reason: (entry["count"], entry["first"]) for reason, entry in found["skipped"].items()}
    assert skipped == {
        "no picture (failed_to_download)": (1, ["000000001"]),
        "no caption": (2, ["000000002", "000000003"]),
        "not a readable picture": (1, ["000000004"]),
        "broken pixel data": (1, ["000000005"]),
        "key a second time in its tar": (1, ["000000006"]),
        "no picture": (1, ["000000008"]),
        "several pictures of one key": (1, ["000000009"]),
        "aspect ratio above 3": (1, ["000000010"]),
        "shorter side below 10 pixels": (1, ["000000011"]),
    }
    assert found["notes"] == {"not a regular file": {"count": 1, "first": ["000000008.jpg"]}}
    assert found["samples"] == 14
    kept = {"picture 0", "picture 6", "picture 7", "\ufffd kept, but nowhere written"}
    roles = {"train": "train", "test": "eval"}
    captions = [data.make_source(spec_of(tmp_path / "out"), roles[split]).captions() for split in found["splits"]]
    assert set(itertools.chain.from_iterable(captions)) == kept
    assert sum(split["records"] for split in found["splits"].values()) == len(kept)
    assert found["samples"] == len(kept) + sum(entry["count"] for entry in found["skipped"].values())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([f"a.{i:03d}.{ending}" for i in range(3) for ending in ("jpg", "txt")], "dots in its name: files are grouped"),
        (["a.v2.jpg", "a.v2.txt"], "dots in its name: files are grouped up to the first dot"),
        (["a.tif", "a.txt"], "format not read (.tif)"),
        (["a.v2.AVIF", "a.v2.txt"], "format not read (.avif)"),
        (["a.txt", "a.cls"], "no picture"),
    ],
)
def test_what_of_a_tar_is_no_picture_by_its_name_is_told_apart(tmp_path, names, reason):
    write_tar(tmp_path / "a.tar", [(name, b"1") for name in names])
    (skipped,) = inputs.WebDataset("").samples({"path": str(tmp_path / "a.tar")})
    assert skipped.key == "a"
    assert skipped.reason.startswith(reason)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_caption_beside_a_picture_is_read_in_its_coding(tmp_path, coding):
    mark = "\ufeff" if coding == "utf-16-be" else ""
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.txt", (mark + "übung").encode(coding))])
    (sample,) = inputs.WebDataset("").samples({"path": str(tmp_path / "a.tar")})
    assert sample.text == "übung"


def test_of_samples_with_one_key_the_first_is_kept_and_the_second_counted_as_skipped(tmp_path):
    def named(key, *files):
        return [(f"{key}.{ending}", content) for ending, content in files]

    first, second = ("png", picture(0)), ("png", picture(50))
    one, other = ("txt", b"first"), ("txt", b"second")
    write_tar(
        tmp_path / "twice.tar",
        [
            *named("0", first, one, second, other),  # one after the other
            *named("1", first, second, one, other),  # by extension
            *named("2", first, one),
            *named("3", first, one),
            *named("2", second, other),
        ],
    )
    found = run(job(inputs.WebDataset(str(tmp_path / "twice.tar")), tmp_path / "out", eval_share=0.0))
    assert found["samples"] == 7
    assert found["splits"]["train"]["records"] == 4
    assert found["skipped"] == {"key a second time in its tar": {"count": 3, "first": ["0", "1", "2"]}}
    source = data.make_source(spec_of(tmp_path / "out"))
    assert list(source.captions()) == ["first"] * 4
    assert all(tuple(source[index]["image"][8, 8]) == colour(0) for index in range(4))


def damaged_in_the_middle(whole, how):
    """A tar's bytes with damage at the header of its second sample's picture, or followed by itself."""
    at = whole.index(b"000000001.png")
    end = {"overwritten": b"\x7f", "zeroed": b"\0"}
    return whole + whole if how == "doubled" else whole[:at] + 512 * end[how] + whole[at + 512 :]


@pytest.mark.parametrize(("how", "kept"), [("overwritten", 1), ("zeroed", 1), ("doubled", 3)])
def test_a_tar_that_seems_to_end_too_early_is_named(tmp_path, how, kept):
    write_tar(tmp_path / "a.tar", [*members_of(0), *members_of(1), *members_of(2)])
    (tmp_path / "a.tar").write_bytes(damaged_in_the_middle((tmp_path / "a.tar").read_bytes(), how))
    found = run(job(inputs.WebDataset(str(tmp_path)), tmp_path / "out", eval_share=0.0))
    assert found["splits"]["train"]["records"] == found["samples"] == kept
    assert found["notes"] == {"damaged tar: what followed is lost": {"count": 1, "first": ["a.tar"]}}


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_a_file_that_is_no_tar_is_noted_once_and_is_no_sample(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    found = run(job(inputs.WebDataset(str(tmp_path)), tmp_path / "out"))
    assert found["samples"] == 0
    assert found["skipped"] == {}
    assert found["notes"] == {"damaged tar (ReadError): what followed is lost": {"count": 1, "first": ["a.tar"]}}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_said_to_be_one(tmp_path, pack):
    write_tar(tmp_path / "a.tar", members_of(0))
    (tmp_path / "b.tar").write_bytes(pack((tmp_path / "a.tar").read_bytes()))
    found = run(job(inputs.WebDataset(str(tmp_path)), tmp_path / "out"))
    assert found["samples"] == 1
    assert found["notes"] == {"compressed tar: unpack it first": {"count": 1, "first": ["b.tar"]}}


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz"])
def test_a_compressed_tar_is_refused_by_its_name(tmp_path, name):
    for tar in ("a.tar", name):
        write_tar(tmp_path / tar, members_of(0))
    for path in ("", "*", name):
        with pytest.raises(inputs.InputError, match=rf"{name} is compressed .*; unpack it first"):
            inputs.WebDataset(str(tmp_path / path)).pieces()
    assert len(inputs.WebDataset(str(tmp_path / "*.tar")).pieces()) == 1


@pytest.mark.parametrize("cut", [512, 1024, 1536, 2048, 2600, 3072, 4000])
def test_a_truncated_tar_ends_where_it_is_cut_and_says_so(tmp_path, cut):
    write_tar(tmp_path / "whole.tar", [*members_of(0), *members_of(1), *members_of(2)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:cut])
    found = list(inputs.WebDataset("").samples({"path": str(tmp_path / "cut.tar")}))
    lost = [one for one in found if isinstance(one, inputs.Skipped) and "lost" in one.reason]
    assert [one.key for one in lost] == ["cut.tar"]
    whole = list(inputs.WebDataset("").samples({"path": str(tmp_path / "whole.tar")}))
    assert len(whole) == 3
    assert not any(isinstance(one, inputs.Skipped) for one in whole)


def test_a_folder_gives_the_examples_and_splits_that_it_gives_itself(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(30):
        (pictures / f"{index}.png").write_bytes(picture(index))
        (pictures / f"{index}.txt").write_text(f"picture {index}")
    (pictures / "old.tiff").write_bytes(b"II*")
    (pictures / "lonely.png").write_bytes(picture(99))
    source = inputs.Folder(str(pictures), per_shard=7)
    found = run(job(source, tmp_path / "out", eval_share=0.05))
    assert {reason: entry["first"] for reason, entry in found["skipped"].items()} == {
        "format not read (.tiff)": ["old.tiff"],
        "no caption": ["lonely.png"],
    }
    for split in ("train", "eval"):
        direct = data.make_source(DataSpec(name="folder", image_size=16, path=str(pictures), text_length=8), split)
        assert sorted(direct.captions()) == sorted(data.make_source(spec_of(tmp_path / "out"), split).captions())
    assert everything(tmp_path / "out") == {f"picture {i}": colour(i) for i in range(30)}


def test_a_folders_pictures_without_captions_are_kept_for_tokenizers(tmp_path):
    pictures = tmp_path / "pictures"
    captioned(pictures, 3)
    (pictures / "0.txt").unlink()
    found = run(job(inputs.Folder(str(pictures), needs_text=False), tmp_path / "out", eval_share=0.0, needs_text=False))
    assert found["skipped"] == {}
    assert list(data.make_source(spec_of(tmp_path / "out")).captions()) == ["", "picture 1", "picture 2"]


def captioned(folder, count, caption="picture {}"):
    """Pictures with captions beside them, as a folder."""
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index}.png").write_bytes(picture(index))
        (folder / f"{index}.txt").write_text(caption.format(index))


def test_a_folders_own_splits_are_kept(tmp_path):
    for name, count in (("train", 12), ("test", 5), ("val", 2)):
        captioned(tmp_path / "pictures" / name, count, caption=name + " {}")
    found = run(job(inputs.Folder(str(tmp_path / "pictures"), per_shard=4), tmp_path / "out", eval_share=0.5))
    assert {split: entry["records"] for split, entry in found["splits"].items()} == {"train": 12, "test": 5}
    assert found["skipped"] == {
        "in none of the splits' folders (train, test)": {"count": 2, "first": ["val/0.png", "val/1.png"]}
    }
    assert found["samples"] == 19
    for split, name in (("train", "train"), ("eval", "test")):
        captions = data.make_source(spec_of(tmp_path / "out"), split).captions()
        assert {caption.split()[0] for caption in captions} == {name}


def test_rows_of_metadata_that_name_nothing_are_noted(tmp_path):
    captioned(tmp_path / "pictures", 3)
    rows = [dumps({"file_name": "gone.png", "text": "not there"}), b"not json"]
    (tmp_path / "pictures/metadata.jsonl").write_bytes(b"\n".join(rows))
    found = run(job(inputs.Folder(str(tmp_path / "pictures")), tmp_path / "out"))
    assert found["samples"] == 3
    assert found["skipped"] == {}
    notes = " ".join(found["notes"])
    assert "metadata.jsonl: 1 rows name files that are not there (gone.png" in notes
    assert "metadata.jsonl: 1 rows without file_name and text" in notes


def test_a_source_that_changed_is_refused_when_the_command_is_started_again(tars, tmp_path):
    pictures = tmp_path / "pictures"
    captioned(pictures, 3)
    from_tars = job(inputs.WebDataset(str(tars)), tmp_path / "from_tars")
    from_folder = job(inputs.Folder(str(pictures)), tmp_path / "from_folder")
    for work in (from_tars, from_folder):
        run(work)
    before = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(before.replace(b"picture 8", b"picture X"))
    os.utime(tars / "00001.tar", ns=(1, 1))
    with pytest.raises(ValueError, match=r"what is converted has changed: pieces\[1\] was .*00001\.tar.* --out"):
        run(from_tars)
    (pictures / "2.txt").write_text("corrected")
    with pytest.raises(ValueError, match="what is converted has changed: .*digest.* --out"):
        run(from_folder)
    (pictures / "2.txt").write_text("picture 2")
    run(from_folder)
    (pictures / "2.png").rename(pictures / "3.png")
    (pictures / "2.txt").rename(pictures / "3.txt")
    with pytest.raises(ValueError, match="what is converted has changed"):
        run(from_folder)


def test_parquet_shards(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": picture(i), "path": None}, "text": [f"picture {i}", f"again {i}"]} for i in range(5)]
    rows.append({"image": {"bytes": None, "path": "x.png"}, "text": ["no bytes"]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a-00000.parquet", row_group_size=2)
    found = run(job(inputs.Parquet(str(tmp_path)), tmp_path / "out", eval_share=0.0))
    assert found["splits"]["train"]["records"] == 5
    assert found["skipped"] == {"no picture": {"count": 1, "first": ["a-00000.parquet:5"]}}
    source = data.make_source(spec_of(tmp_path / "out"))
    assert {source.example(2, (0, seed))["text"] for seed in range(20)} == {"picture 2", "again 2"}
    assert len(list(source.captions())) == 10
    for wrong in ({"image_key": "photo"}, {"text_key": "image"}, {"image_key": "text"}):
        with pytest.raises(inputs.InputError, match=r"image \(struct"):
            inputs.Parquet(str(tmp_path), **wrong).pieces()
    pq.write_table(pa.Table.from_pylist([{"image": picture(0), "words": "one"}]), tmp_path / "b-00000.parquet")
    other = list(inputs.Parquet("").samples({"path": str(tmp_path / "b-00000.parquet")}))
    assert other == [
        inputs.Skipped(
            "b-00000.parquet",
            "file not read: no column 'text'; set --text_key. It has image (binary), words (string).",
            sample=False,
        )
    ]
    damaged = bytearray((tmp_path / "a-00000.parquet").read_bytes())
    damaged[30:400] = bytes(370)
    (tmp_path / "a-00000.parquet").write_bytes(damaged)
    samples = list(inputs.Parquet("").samples({"path": str(tmp_path / "a-00000.parquet")}))
    assert isinstance(samples[-1], inputs.Skipped)
    assert len(samples) < 6


def test_parquet_categoricals_are_texts(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array(["red", "green", "red"]).dictionary_encode()
    pq.write_table(pa.table({"image": [picture(i) for i in range(3)], "text": texts}), tmp_path / "a.parquet")
    run(job(inputs.Parquet(str(tmp_path)), tmp_path / "out", eval_share=0.0))
    assert list(data.make_source(spec_of(tmp_path / "out")).captions()) == ["red", "green", "red"]


@pytest.mark.parametrize("kind", ["view", "list of views", "large", "categorical in a struct"])
def test_parquet_columns_of_other_types_are_read(tmp_path, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    view = "view" in kind
    images = pa.array([picture(0), picture(1)], pa.binary_view() if view else pa.large_binary())
    texts = pa.array(["red", "green"], pa.string_view() if view else pa.large_string())
    if kind == "list of views":
        texts = pa.array([["red"], ["green"]], pa.list_(pa.string_view()))
    if kind == "categorical in a struct":
        images = pa.array([picture(0), picture(1)]).dictionary_encode()
        images = pa.StructArray.from_arrays([images, pa.array(["a", "b"])], ["bytes", "path"])
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    run(job(inputs.Parquet(str(tmp_path)), tmp_path / "out", eval_share=0.0))
    source = data.make_source(spec_of(tmp_path / "out"))
    found = [(source[i]["text"], tuple(source[i]["image"][8, 8])) for i in range(2)]
    assert found == [("red", colour(0)), ("green", colour(1))]


def test_parquet_columns_of_one_name_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [pa.array([picture(0)]), pa.array(["one"]), pa.array(["two"])]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(inputs.InputError, match=r"a\.parquet cannot be read: several columns 'text'; .*--text_key"):
        inputs.Parquet(str(tmp_path)).pieces()


@pytest.mark.parametrize("kind", ["text", "categorical", "list"])
def test_a_parquet_caption_that_is_no_utf8_costs_its_odd_bytes_alone(tmp_path, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = pa.array([b"one", b"caf\xe9", None, b"four"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, written.buffers())
    if kind == "categorical":
        texts = texts.dictionary_encode()
    if kind == "list":
        texts = pa.ListArray.from_arrays([0, 1, 2, 3, 4], texts)
    paths = pa.Array.from_buffers(pa.string(), 4, written.buffers())
    images = pa.StructArray.from_arrays([pa.array([picture(i) for i in range(4)]), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    found = run(job(inputs.Parquet(str(tmp_path)), tmp_path / "out", eval_share=0.0))
    assert found["skipped"] == {"no caption": {"count": 1, "first": ["a.parquet:2"]}}
    assert found["notes"] == {}
    assert list(data.make_source(spec_of(tmp_path / "out")).captions()) == ["one", "caf\ufffd", "four"]


def test_filters_at_reading(tmp_path):
    write_tar(
        tmp_path / "sizes.tar",
        [*members_of(0, size=(64, 64)), *members_of(1, size=(64, 20)), *members_of(2, size=(30, 30))],
    )
    run(job(inputs.WebDataset(str(tmp_path / "sizes.tar")), tmp_path / "out", eval_share=0.0))

    def captions(**filters):
        return set(data.make_source(spec_of(tmp_path / "out", **filters)).captions())

    assert captions() == {"picture 0", "picture 1", "picture 2"}
    assert captions(max_aspect=2.0) == {"picture 0", "picture 2"}
    assert captions(min_side=25) == {"picture 0", "picture 2"}
    assert captions(min_side=40) == {"picture 0"}
    with pytest.raises(ValueError, match=r"data\.min_side 65"):
        captions(min_side=65)
    prints = [data.fingerprint(spec_of(tmp_path / "out", min_side=side)) for side in (0, 25)]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(("min_side", "max_aspect"), [(0, 1.0), (7, 0.0), (7, 3.0), (0, 1.1), (2**31, 2.0)])
def test_filters_at_reading_are_those_of_the_conversion(min_side, max_aspect):
    sides = [0, 1, 6, 7, 8, 10, 11, 21, 22, 23, 30, 33, 2**31, 2**32 - 1]
    sizes = np.array(list(itertools.product(sides, sides)), np.uint32)
    expected = [not transforms.size_fault(*size, min_side, max_aspect) for size in sizes.tolist()]
    assert array_record_source._passing(sizes, min_side, max_aspect).tolist() == expected


def test_the_manifest_counts_what_its_parts_name(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", itertools.chain.from_iterable(members_of(i) for i in range(7 + number)))
    work = job(inputs.WebDataset(str(tmp_path)), tmp_path / "out", min_side=99)
    keys, reason = [f"{i:09d}" for i in range(8)], "shorter side below 99 pixels"
    assert run(work)["skipped"] == {reason: {"count": 15, "first": [*keys[:7], *keys[:3]]}}
    assert json.loads((tmp_path / "out/parts/00001.json").read_text())["skipped"] == {reason: keys}


@pytest.mark.parametrize("again", [False, True])
def test_a_part_names_only_a_few_of_what_it_skipped_to_the_process_that_gathers_all(tmp_path, again):
    write_tar(tmp_path / "a.tar", itertools.chain.from_iterable(members_of(i, size=(9, 9)) for i in range(30)))
    work = job(inputs.WebDataset(str(tmp_path)), tmp_path / "out", min_side=10)
    if again:
        run(work)
    array_records.begin(epath.Path(work.out), work.plan(work.source.pieces()))
    part = work.convert(0, 1, work.source.pieces()[0])
    first = [f"{i:09d}" for i in range(10)]
    assert part["skipped"] == {"shorter side below 10 pixels": {"count": 30, "first": first}}


def test_what_was_done_is_not_done_again(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"
    work = job(inputs.WebDataset(str(tars)), out)
    samples, read = inputs.WebDataset.samples, []

    def dying(source, piece):
        read.append(piece["path"])
        if len(read) == 2:
            yield from itertools.islice(samples(source, piece), 3)
            raise MemoryError
        yield from samples(source, piece)

    monkeypatch.setattr(inputs.WebDataset, "samples", dying)
    with pytest.raises(MemoryError):
        run(work)
    with pytest.raises(ValueError, match="not finished"):
        data.make_source(spec_of(out))
    run(work)
    assert [path[-9:] for path in read] == ["00000.tar", "00001.tar", "00001.tar", "00002.tar"]
    assert everything(out) == {f"picture {i}": colour(i) for i in range(24)}
    with pytest.raises(ValueError, match="begun with something else: min_side was 0 and is now 9"):
        run(dataclasses.replace(work, min_side=9))


@pytest.mark.parametrize("also", [[], ["manifest.json"]])
@pytest.mark.parametrize("name", ["train-00001-of-00003.array_record", "train-00001-of-00003.array_record.sizes.npy"])
def test_a_shard_that_is_gone_is_made_again_and_no_other(tars, tmp_path, name, also):
    out = tmp_path / "out"
    work = job(inputs.WebDataset(str(tars)), out, eval_share=0.0)
    whole = run(work)
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    for gone in (name, *also):
        (out / gone).unlink()
    assert run(work) == whole
    assert everything_trained_on(out) == {f"picture {i}" for i in range(24)}
    again = [path.name for path, then in written.items() if path.stat().st_mtime_ns != then]
    assert again == ["train-00001-of-00003.array_record"]


def everything_trained_on(out):
    source = data.make_source(spec_of(out, min_side=5))
    return {source[index]["text"] for index in range(len(source))}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train-00000-of-00002.array_record", "train-00000-of-00002.array_record"),
        ("test-00000-of-00002.array_record.sizes.npy", "test-00000"),
        (".draft-novel/ch1.txt", ".draft-novel"),
        ("parts/second.txt", "parts"),
        ("manifest.json", "manifest.json"),
    ],
)
def test_a_folder_that_something_else_made_is_left_as_it_is(tars, tmp_path, name, found):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(ValueError, match=rf"out has {found}.* but no plan\.json.*choose another --out"):
        run(job(inputs.WebDataset(str(tars)), tmp_path / "out"))
    assert sorted((tmp_path / "out").rglob("*")) == before
    assert mine.read_text() == "mine"


def test_a_folder_with_other_files_is_begun_beside_them(tars, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    run(job(inputs.WebDataset(str(tars)), tmp_path / "out"))
    assert (tmp_path / "out/README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["plan.json", "parts/00001.json"])
@pytest.mark.parametrize("content", ["my plan", "[1, 2]", "{}", '{"version": 1, "shards": {"train": {"a": 1}}}'])
def test_a_damaged_plan_or_part_is_named(tars, tmp_path, name, content):
    out = tmp_path / "out"
    work = job(inputs.WebDataset(str(tars)), out)
    run(work)
    (out / "manifest.json").unlink()
    (out / name).write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json|parts/00001\.json|begun with something else") as error:
        run(work)
    assert "another --out" in str(error.value)


def damaged(path, *places):
    """Overwrites bytes of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] = bytes(byte ^ 255 for byte in content[place])
    path.write_bytes(content)


@pytest.mark.parametrize("content", ["whole", None, "", "[]", "{}"])
@pytest.mark.parametrize("filters", [{}, {"min_side": 12}])
def test_captions_are_read_without_the_pictures_where_they_are_beside_them(tmp_path, monkeypatch, content, filters):
    texts, out = ["one", "half \ud83d", "three", "four"], tmp_path / "out"
    for number in range(2):
        indices = range(2 * number, 2 * number + 2)
        pictures = [(f"{i}.png", picture(i, size=(10 + i, 20))) for i in indices]
        captions = [(f"{i}.json", dumps({"caption": texts[i]})) for i in indices]
        write_tar(tmp_path / f"{number}.tar", itertools.chain.from_iterable(zip(pictures, captions, strict=True)))
    run(job(inputs.WebDataset(str(tmp_path)), out, eval_share=0.0))
    if content == "whole":
        monkeypatch.setattr(array_records, "read", None)
    else:
        file = out / "train-00001-of-00002.array_record.captions.json"
        file.unlink() if content is None else file.write_text(content)
    assert list(data.make_source(spec_of(out, **filters)).captions()) == texts[2 if filters else 0 :]


def without_captions(out):
    """Removes the captions beside the shards, as folders have none that were made before there were such files."""
    for file in out.glob("*.captions.json"):
        file.unlink()


def test_a_shard_without_a_readable_index_is_an_error_that_names_it(tars, tmp_path):
    out = tmp_path / "out"
    run(job(inputs.WebDataset(str(tars)), out, eval_share=0.0))
    without_captions(out)
    damaged(out / "train-00001-of-00003.array_record", slice(0, None))
    source = data.make_source(spec_of(out))
    assert source[0]["text"] == "picture 0"
    for read in (lambda: source[8], lambda: list(source.captions())):
        with pytest.raises(ValueError, match=r"train-00001-of-00003\.array_record is damaged.*remove it, and start"):
            read()


def test_a_damaged_record_is_said_to_be_of_its_shard(tars, tmp_path, caplog):
    out = tmp_path / "out"
    run(job(inputs.WebDataset(str(tars)), out, eval_share=0.0))
    without_captions(out)
    damaged(out / "train-00001-of-00003.array_record", slice(200, 210))  # within its first record
    source = data.make_source(spec_of(out))
    assert source[8]["text"] != "picture 8"
    assert source[9]["text"] == "picture 9"
    assert "train-00001-of-00003.array_record" in caplog.text
    caplog.clear()
    assert list(source.captions()) == [f"picture {i}" for i in range(24) if i != 8]
    (said,) = caplog.messages
    assert said.startswith(f"No captions of 1 records of {out}; the first: damaged record: ")
    assert "train-00001-of-00003.array_record" in said


@pytest.mark.parametrize("content", [None, b"", b"no array"])
def test_sizes_that_are_gone_or_damaged_are_named_where_they_are_needed(tars, tmp_path, content):
    out = tmp_path / "out"
    run(job(inputs.WebDataset(str(tars)), out, eval_share=0.0))
    sizes = out / "train-00001-of-00003.array_record.sizes.npy"
    sizes.unlink() if content is None else sizes.write_bytes(content)
    assert len(data.make_source(spec_of(out))) == 24
    with pytest.raises(ValueError, match=r"train-00001.*\.sizes\.npy has .* start muse_jax\.convert"):
        data.make_source(spec_of(out, min_side=8))


@pytest.mark.slow
def test_loading_processes_read_the_same(tars, tmp_path):
    run(job(inputs.WebDataset(str(tars)), tmp_path / "out", eval_share=0.0))
    found = []
    for workers in (0, 2):
        spec = spec_of(tmp_path / "out", workers=workers, vocabulary="bytes")
        loader = data.make_loader(spec, batch_size=8, seed=0, vocabulary=data.make_vocabulary(spec))
        found.append(list(itertools.islice(loader, 5)))
        loader.close()
    for one, other in zip(*found, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("pattern", ["*.tar", "*/*.tar", "**/*.tar", "b/[0-1].tar"])
def test_patterns_of_local_paths(tmp_path, pattern):
    (tmp_path / "b").mkdir()
    for name in ("a.tar", "b/0.tar"):
        write_tar(tmp_path / name, members_of(0))
    (tmp_path / "folder.tar").mkdir()
    found = {piece["path"] for piece in inputs.WebDataset(str(tmp_path / pattern)).pieces()}
    expected = {"*.tar": ["a.tar"], "**/*.tar": ["a.tar", "b/0.tar"]}.get(pattern, ["b/0.tar"])
    assert found == {str(tmp_path / name) for name in expected}
    with pytest.raises(inputs.InputError, match=r"Braces are not read"):
        inputs.WebDataset(str(tmp_path / "{00000..00001}.tar")).pieces()


def test_a_tfds_data_set_that_is_not_prepared_is_named(tmp_path, monkeypatch):
    builder = types.SimpleNamespace(info=types.SimpleNamespace(splits={}), data_dir=tmp_path / "pets/1.0.0")
    monkeypatch.setattr(inputs.TFDS, "_builder", lambda source: builder)
    with pytest.raises(inputs.InputError, match=r"pets is not prepared in .*1\.0\.0; .*tfds build pets --data_dir"):
        inputs.TFDS("pets", path=str(tmp_path)).pieces()


def test_wrong_inputs_are_named(tmp_path):
    with pytest.raises(inputs.InputError, match=r"names no tars; expected a folder of \*\.tar"):
        inputs.WebDataset(str(tmp_path)).pieces()
    with pytest.raises(inputs.InputError, match="--path is .*no folder"):
        inputs.Folder(str(tmp_path / "x")).pieces()
    with pytest.raises(ValueError, match=r"no manifest\.json: it was not written by muse_jax\.convert"):
        data.make_source(spec_of(tmp_path))
