"""Tars, folders and Parquet files as ArrayRecord shards: what is kept, what is skipped and why, and reading it back."""

import dataclasses
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from muse_jax import data
from muse_jax.data import array_records, conversion, inputs
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
    array_records.begin(folder, job.plan(pieces))
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
        "no picture": (2, ["000000006", "000000008"]),
        "not a regular file": (1, ["000000008.jpg"]),
        "several pictures of one key": (1, ["000000009"]),
        "aspect ratio above 3": (1, ["000000010"]),
        "shorter side below 10 pixels": (1, ["000000011"]),
    }
    kept = {"picture 0", "picture 6", "picture 7", "\ufffd kept, but nowhere written"}
    source = [
        data.make_source(spec_of(tmp_path / "out"), split).captions() for split in found["splits"] if split == "train"
    ]
    assert set(itertools.chain.from_iterable(source)) <= kept
    assert sum(split["records"] for split in found["splits"].values()) == len(kept)
    assert not list(tmp_path.parent.glob("escaped*"))


@pytest.mark.parametrize("cut", [512, 1024, 1536, 2048, 2600, 3072, 4000])
def test_a_truncated_tar_ends_where_it_is_cut_and_says_so(tmp_path, cut):
    write_tar(tmp_path / "whole.tar", [*members_of(0), *members_of(1), *members_of(2)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:cut])
    found = list(inputs.WebDataset("").samples({"path": str(tmp_path / "cut.tar")}))
    lost = [one for one in found if isinstance(one, inputs.Skipped) and "lost" in one.reason]
    assert lost
    assert all(one.key == "cut.tar" for one in lost)
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
    damaged = bytearray((tmp_path / "a-00000.parquet").read_bytes())
    damaged[30:400] = bytes(370)
    (tmp_path / "a-00000.parquet").write_bytes(damaged)
    samples = list(inputs.Parquet("").samples({"path": str(tmp_path / "a-00000.parquet")}))
    assert isinstance(samples[-1], inputs.Skipped)
    assert len(samples) < 6


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


def test_wrong_inputs_are_named(tmp_path):
    with pytest.raises(inputs.InputError, match=r"names no tars; expected a folder of \*\.tar"):
        inputs.WebDataset(str(tmp_path)).pieces()
    with pytest.raises(inputs.InputError, match="--path is .*no folder"):
        inputs.Folder(str(tmp_path / "x")).pieces()
    with pytest.raises(ValueError, match=r"no manifest\.json: it was not written by muse_jax\.convert"):
        data.make_source(spec_of(tmp_path))
