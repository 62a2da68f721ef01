"""Tokens computed ahead are those that a run computes itself, and no other run's."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import portpicker
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from muse_jax import data, precompute, precomputed, specs, stages
from muse_jax.data import array_records, precomputed_source, scenes
from muse_jax.interop import folder as weights
from muse_jax.models import t5, vqgan
from muse_jax.training import checkpoint, sharding, stage, trees

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs/pictures"
PICTURES = 20
BATCH = 8
STEPS = 6  # more than two epochs


def tiny(name, **changes):
    found = importlib.util.spec_from_file_location("config", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config = module.get_config("tiny")
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        with config.unlocked():
            functools.reduce(lambda node, part: node[part], section.split("__"), config)[field] = value
    return specs.from_config(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures/, the stages low/ and high/ of random tokenizers, and the text encoder t5/."""
    here = tmp_path_factory.mktemp("made")
    (here / "pictures").mkdir()
    for index in range(PICTURES):
        scene = scenes.scene(index)
        picture = Image.fromarray(scenes.render(scene, 80)).crop((0, 0, 80, 60 + index))
        picture.save(here / f"pictures/{index}.png")
        (here / f"pictures/{index}.txt").write_text(scene.caption, encoding="utf-8")
    for seed, name in enumerate(("low", "high", "other")):
        spec = tiny("tokenizer_high" if name == "high" else "tokenizer_low")
        side = spec.data.image_size
        params = jax.jit(vqgan.VQGAN(spec.model).init)(jax.random.key(seed), jnp.zeros((1, side, side, 3)))["params"]
        stage.save_stage(here / name, spec, nn.unbox(params))
    (here / "t5").mkdir()
    ids = jnp.zeros((1, 1), jnp.int32)
    encoder = t5.from_spec(base(here).model.text)
    params = nn.unbox(jax.jit(encoder.init)(jax.random.key(0), ids, ids > 0)["params"])
    save_file({k: np.asarray(v) for k, v in trees.named_leaves(params).items()}, here / "t5" / weights.PARAMS)
    return here


def base(here, **changes):
    """The base model with a frozen text encoder."""
    given = dict(
        task__tokenizer=str(here / "low"),
        model__text__trainable=False,
        model__text__weights=str(here / "t5"),
        model__text__dropout=0.0,
        model__dropout=0.0,
        data__path=str(here / "pictures"),
    )
    return tiny("base", **{**given, **changes})


def superres(here, **changes):
    """The super-resolution model, which trains its text encoder, on random crops and flips."""
    given = dict(
        task__tokenizer=str(here / "high"),
        task__low_tokenizer=str(here / "low"),
        model__dropout=0.0,
        model__text__dropout=0.0,
        data__path=str(here / "pictures"),
        data__crop="random",
        data__flip=True,
    )
    return tiny("superres", **{**given, **changes})


def reading(spec, out, **changes):
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, name="precomputed", path=str(out), **changes))


@pytest.fixture(scope="module")
def high_tokens(made):
    """Two epochs of super-resolution's tokens, and what the command said of them."""
    manifest = precompute.precompute(superres(made), str(made / "tokens"), epochs=2, per_shard=9)
    return made / "tokens", manifest


@pytest.fixture(scope="module")
def embeddings(made):
    """The base model's tokens with text embeddings."""
    precompute.precompute(base(made), str(made / "embeddings"), text_embeddings=True)
    return made / "embeddings"


class Run:
    """The losses of a run's first steps, from the parameters of step 0."""

    def __init__(self, spec):
        self.spec = spec
        task = stages.build_task(spec, checkpoint.load_stage)
        self.params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
        self.frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf[...]), sharding.unbox(task.frozen()))
        self.loss = jax.jit(lambda *args: task._loss(*args)[0])

    def losses(self, split="train", steps=STEPS):
        loss = functools.partial(self.loss, self.params, self.frozen)
        given = batches(self.spec, split, steps)
        return [float(loss(batch, jax.random.key(step))) for step, batch in enumerate(given)]


def batches(spec, split="train", steps=STEPS):
    vocabulary = data.make_vocabulary(spec.data)
    loader = data.make_loader(spec.data, batch_size=BATCH, seed=spec.seed, vocabulary=vocabulary, split=split)
    given = list(itertools.islice(loader, steps))
    loader.close()
    return given


def same(one, other, names):
    for first, second in zip(one, other, strict=True):
        for name in names:
            np.testing.assert_array_equal(first[name], second[name])


def test_tokens_are_those_of_the_runs_own_crops(made, high_tokens):
    folder, manifest = high_tokens
    online, ready = superres(made), reading(superres(made), folder)
    length = len(data.make_source(online.data))
    assert manifest["splits"]["train"]["records"] == 2 * length
    pictures, tokens = batches(online), batches(ready)
    assert "image" not in tokens[0]
    same(pictures, tokens, ("example_id", "text_ids", "text_mask"))
    task = stages.build_task(online, checkpoint.load_stage)
    frozen = sharding.unbox(task.frozen())
    compute = jax.jit(lambda frozen, image: task.tokens(frozen, {"image": image}))
    for picture, token in zip(pictures, tokens, strict=True):
        high, low = compute(frozen, picture["image"])
        # Of two epochs the crops are the run's own; a third one sees the first one's again.
        own = picture["example_id"] < 2 * length
        np.testing.assert_array_equal(token["high_tokens"][own], high[own])
        np.testing.assert_array_equal(token["low_tokens"][own], low[own])
        assert own.all() or (token["high_tokens"] != high)[~own].any()
    assert not own.any()


@pytest.mark.slow
def test_tokens_give_the_losses_of_the_same_crops(made, high_tokens):
    online, ready = superres(made), reading(superres(made), high_tokens[0])
    own = 2 * len(data.make_source(online.data)) // BATCH
    assert own >= 4
    expected, found = Run(online).losses(), Run(ready).losses()
    np.testing.assert_allclose(found[:own], expected[:own], rtol=1e-6)
    assert found[own + 1] != pytest.approx(expected[own + 1], rel=1e-6)


def test_embeddings_give_the_losses_of_the_same_texts(made, embeddings):
    online, ready = Run(base(made)), Run(reading(base(made), embeddings, text_embeddings=True))
    first = batches(ready.spec, steps=1)[0]
    assert "text_ids" not in first
    assert first["text_embeddings"].shape == (BATCH, ready.spec.data.text_length, ready.spec.model.text.width)
    np.testing.assert_allclose(ready.losses(), online.losses(), rtol=1e-5)
    np.testing.assert_allclose(ready.losses("eval", 1), online.losses("eval", 1), rtol=1e-5)
    # The captions are there too, for a run that computes their embeddings itself.
    captions = batches(reading(base(made), embeddings))
    same(batches(online.spec), captions, ("example_id", "text_ids", "text_mask"))
    same(batches(ready.spec), captions, ("low_tokens",))


def test_embeddings_have_the_models_dtype(made, tmp_path):
    spec = base(made, model__dtype="float16")
    precompute.precompute(spec, str(tmp_path), text_embeddings=True)
    assert batches(reading(spec, tmp_path, text_embeddings=True), steps=1)[0]["text_embeddings"].dtype == np.float16


def test_one_device_and_a_stop_make_the_same_records(made, high_tokens, monkeypatch):
    _, whole = high_tokens
    spec = dataclasses.replace(superres(made), mesh=specs.MeshSpec(data=1))
    written = []
    finish = array_records.ShardWriter.finish

    def stop_at_the_third(writer):
        written.append(writer._target.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return finish(writer)

    monkeypatch.setattr(array_records.ShardWriter, "finish", stop_at_the_third)
    out = str(made / "stopped")
    with pytest.raises(KeyboardInterrupt):
        precompute.precompute(spec, out, epochs=2, per_shard=9)
    with pytest.raises(ValueError, match="not finished"):
        data.make_source(reading(spec, out).data)
    again = precompute.precompute(spec, out, epochs=2, per_shard=9)
    assert len(set(written)) == len(written) - 1, "only the shard that was cut off is written twice"
    assert again["splits"] == whole["splits"]
    assert not list((made / "stopped").glob(".draft-*"))
    count = len(written)
    assert precompute.precompute(spec, out, epochs=2, per_shard=9) == again
    assert len(written) == count, "nothing is left to do"


def test_the_words_are_those_of_the_data_and_not_of_what_was_drawn(made, tmp_path):
    """A broken picture's caption is in the data's vocabulary, which the stages have, and in no record."""
    shutil.copytree(made / "pictures", tmp_path / "pictures")
    source = data.make_source(base(made).data)
    broken = tmp_path / "pictures" / source.key(0)
    broken.write_bytes(broken.read_bytes()[:-60])
    broken.with_suffix(".txt").write_text("a zyzzyva")
    spec, out = base(made, data__path=str(tmp_path / "pictures")), tmp_path / "out"
    precompute.precompute(spec, str(out))
    expected, ready = data.make_vocabulary(spec.data), reading(spec, out).data
    assert "zyzzyva" in expected.words
    assert data.make_vocabulary(ready) == expected
    manifest = json.loads((out / array_records.MANIFEST).read_text())
    del manifest["vocabulary"]  # as it was written before
    (out / array_records.MANIFEST).write_text(json.dumps(manifest))
    assert set(data.make_vocabulary(ready).words) == set(expected.words) - {"zyzzyva"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task__low_tokenizer": "other"}, ["task.low_tokenizer is another tokenizer"]),
        ({"data__crop": "center"}, ["data.crop is 'center' and was 'random'"]),
        ({"data__flip": False}, ["data.flip is False and was True"]),
        ({"model__low_grid": (4, 4)}, ["model.low_grid is 4 x 4, and it has 64 low-resolution tokens"]),
    ],
)
def test_another_runs_tokens_are_refused(made, high_tokens, changes, words):
    changes = {key: str(made / value) if "tokenizer" in key else value for key, value in changes.items()}
    with pytest.raises(specs.SpecError) as error:
        check(reading(superres(made, **changes), high_tokens[0]))
    for word in words:
        assert word in str(error.value)
    check(reading(superres(made), high_tokens[0]))


def check(spec):
    task = stages.build_task(spec, checkpoint.load_stage)
    precomputed.check(spec, task, data.make_source(spec.data), data.make_vocabulary(spec.data))


def test_a_fine_tuned_decoder_leaves_the_tokens_what_they_are(made, embeddings):
    low = checkpoint.load_stage(made / "low")
    params = {**low.params, "decoder": jax.tree.map(lambda leaf: leaf + 1, low.params["decoder"])}
    stage.save_stage(made / "tuned", low.spec, params)
    check(reading(base(made, task__tokenizer=str(made / "tuned")), embeddings))


def test_embeddings_of_other_texts_are_refused(made, embeddings, high_tokens):
    with pytest.raises(specs.SpecError, match=r"data\.text_length.*data\.text_embeddings=False"):
        check(reading(base(made, data__text_length=9), embeddings, text_embeddings=True))
    check(reading(base(made, data__text_length=9), embeddings))
    with pytest.raises(specs.SpecError, match=r"no tokens of task\.tokenizer|image_size is"):
        check(reading(base(made), high_tokens[0]))
    with pytest.raises(ValueError, match="--text_embeddings"):
        data.make_source(reading(base(made), high_tokens[0], text_embeddings=True).data)


@pytest.mark.slow
def test_two_processes_make_the_same_records(made, high_tokens, tmp_path):
    """Each loads and writes its own shards, of which there is an odd number."""
    out = tmp_path / "out"
    codes, said = of_two_processes(made, tmp_path, out)
    assert codes == [0, 0], said
    assert "records in" in said[0]
    assert "records in" not in said[1], "one says it for both"
    manifest = json.loads((out / array_records.MANIFEST).read_text())
    assert manifest["splits"] == high_tokens[1]["splits"]


def of_two_processes(made, tmp_path, out, *flags, limits=(None, None)):
    """Exit codes and outputs of the command in two processes; none may write larger files than its limit, in bytes."""
    config = tmp_path / "config.py"
    values = specs.to_config(superres(made))
    config.write_text(f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({values})\n")
    command = [sys.executable, "-m", "muse_jax.precompute", f"--config={config}", f"--out={out}", "--epochs=2"]
    command += ["--per_shard=9", f"--coordinator=localhost:{portpicker.pick_unused_port()}", "--num_processes=2"]
    ranks = [
        subprocess.Popen(
            [*(["prlimit", f"--fsize={limit}"] if limit else []), *command, f"--process_id={index}", *flags],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, limit in enumerate(limits)
    ]
    said = [rank.communicate(timeout=500)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], said


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_and_both_say_it(made, high_tokens, tmp_path):
    codes, said = of_two_processes(made, tmp_path, tmp_path / "full", limits=(None, 4096))
    assert codes == [1, 1], said
    assert "File too large" in said[0]
    assert "process 1" in said[0]
    assert "File too large" in said[1]
    codes, said = of_two_processes(made, tmp_path, high_tokens[0], "--config.seed=3")
    assert codes == [1, 1], said
    for one in said:
        assert "begun with something else: seed was 0 and is now 3" in one
        assert "Traceback" not in one


def test_a_home_folder_is_found(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    manifest = precompute.precompute(base(made, train__eval_batches=0), "~/tokens")
    assert json.loads((tmp_path / "tokens" / array_records.MANIFEST).read_text()) == manifest
    assert list(manifest["splits"]) == ["train"], "no run reads the other"


def test_held_out_pictures_have_as_many_crops_as_the_run_evaluates(made, tmp_path):
    spec = superres(made, train__eval_batches=2)
    manifest = precompute.precompute(spec, str(tmp_path / "tokens"))
    held_out = len(data.make_source(spec.data, "eval"))
    assert manifest["epochs"] == {"train": 1, "eval": -(-2 * spec.train.batch_size // held_out)}
    assert manifest["epochs"]["eval"] > 1
    runs = [data.make_loader(one.data, batch_size=8, seed=0, vocabulary=data.make_vocabulary(one.data), split="eval")
            for one in (spec, reading(spec, tmp_path / "tokens"))]  # fmt: skip
    task = stages.build_task(spec, checkpoint.load_stage)
    frozen = jax.tree.map(jnp.asarray, sharding.unbox(task.frozen()))
    for _ in range(2):
        online, read = (next(run) for run in runs)
        for name, tokens in task.precomputable(frozen, {"image": jnp.asarray(online["image"])}, False).items():
            assert np.array_equal(read[name], tokens)
    for run in runs:
        run.close()


def test_crops_of_another_seed_are_said(made, high_tokens, caplog):
    spec = reading(superres(made), high_tokens[0])
    task = stages.build_task(spec, checkpoint.load_stage)
    vocabulary, source = data.make_vocabulary(spec.data), data.make_source(spec.data, "train")
    precomputed.check(spec, task, source, vocabulary)
    assert caplog.messages == []
    precomputed.check(dataclasses.replace(spec, seed=5), task, source, vocabulary)
    assert "was precomputed with seed 0, and this run's is 5" in caplog.messages[0]


def test_the_readmes_bytes_are_those_of_records(tmp_path):
    """The table on what 460M pairs take, from records of the paper's sizes."""
    readme = (CONFIGS.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| 256 .* \| ([\d,]+) \| ([\d.]+) TB \|$", readme, flags=re.MULTILINE)
    low, high = ({"dtype": "uint16", "shape": [count]} for count in (256, 4096))
    embeddings = {"dtype": "bfloat16", "shape": [128, 4096]}
    kinds = [{"low_tokens": low}, {"low_tokens": low, "high_tokens": high}]
    kinds.append({"low_tokens": low, "text_embeddings": embeddings})
    rng = np.random.default_rng(0)
    for features, (size, terabytes) in zip(kinds, rows, strict=True):
        example = {name: rng.integers(0, 8192, feature["shape"]) for name, feature in features.items()}
        if "text_embeddings" in features:
            example["text_embeddings"] = rng.normal(0, 0.2, (128, 4096)).astype(np.float32)
            example["text_mask"] = np.arange(128) < 25
        with array_records.ShardWriter(epath.Path(tmp_path), "shard") as writer:
            for _ in range(200 if "text_embeddings" in features else 3000):  # files are whole blocks of 64 KiB
                text = rng.choice(list("etaoin shrdlu"), 60)
                writer.write(precomputed_source.pack(example, "".join(text), features))
            shard = writer.finish()
        assert shard.bytes / shard.records == pytest.approx(int(size.replace(",", "")), rel=0.05)
        assert 460e6 * int(size.replace(",", "")) == pytest.approx(float(terabytes) * 1e12, rel=0.02)


def test_a_folder_that_was_begun_with_something_else_is_refused(made, embeddings):
    with pytest.raises(ValueError, match="begun with something else: .*seed was 0 and is now 1"):
        precompute.precompute(dataclasses.replace(base(made), seed=1), str(embeddings))


def test_what_changed_is_named_by_its_own_key(made, embeddings):
    spec = base(made, task__tokenizer=str(made / "other"))
    with pytest.raises(ValueError, match=r"key\.tokenizers\.tokenizer was '\w{16}' and is now '\w{16}'"):
        precompute.precompute(spec, str(embeddings), text_embeddings=True)


def test_a_folder_that_something_else_made_is_left_as_it_is(made, tmp_path):
    mine = tmp_path / "train-00000-of-00002.array_record"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"train-00000.* but no plan\.json"):
        precompute.precompute(base(made), str(tmp_path))
    assert list(tmp_path.iterdir()) == [mine]
    with pytest.raises(specs.SpecError, match="--out is empty"):
        precompute.precompute(base(made), "")


def test_a_shard_that_is_gone_is_made_again_and_no_other(made, high_tokens, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(high_tokens[0], out)
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    gone = min(written)
    gone.unlink()
    assert precompute.precompute(superres(made), str(out), epochs=2, per_shard=9) == high_tokens[1]
    assert [path for path, then in written.items() if path.stat().st_mtime_ns != then] == [gone]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"epochs": 2}, "all are alike"),
        ({}, {"per_shard": 0}, "--per_shard is 0; expected at least 1"),
        ({}, {"per_shard": -3}, "--per_shard is -3; expected at least 1"),
        (
            {"model__text__trainable": True, "model__text__weights": ""},
            {"text_embeddings": True},
            "model.text is trained",
        ),
        ({"data__name": "precomputed"}, {}, "it is done"),
    ],
)
def test_what_cannot_be_precomputed_is_said(made, tmp_path, change, options, words):
    with pytest.raises(specs.SpecError, match=words):
        precompute.precompute(base(made, **change), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_missing_in_its_epoch_alone(made, high_tokens, tmp_path):
    """And so what a run reads doesn't depend on whether it went through that epoch itself."""
    folder = tmp_path / "copy"
    shutil.copytree(high_tokens[0], folder)
    shard = next(folder.glob("train-00000*"))
    content = bytearray(shard.read_bytes())
    content[200] ^= 1  # within the first epoch's first record
    shard.write_bytes(content)
    source, whole = (data.make_source(reading(superres(made), out).data) for out in (folder, high_tokens[0]))
    first, second = (0, 0), (0, len(source))  # seeds, which end with the example id
    assert (source.example(0, first)["low_tokens"] != whole.example(0, first)["low_tokens"]).any()
    np.testing.assert_array_equal(source.example(0, second)["low_tokens"], whole.example(0, second)["low_tokens"])


def test_a_model_of_classes_is_refused(tmp_path):
    with pytest.raises(specs.SpecError, match="trains a model of classes"):
        precompute.precompute(tiny("../scenes/maskgit"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_damage_is_seen(made, high_tokens, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(high_tokens[0], folder)
    source = data.make_source(reading(superres(made), folder).data)
    expected = data.make_source(reading(superres(made), high_tokens[0]).data)
    assert source.fingerprint() == expected.fingerprint()
    shard = next(folder.glob("train-00000*"))
    content = bytearray(shard.read_bytes())
    content[200] ^= 1  # within the first record
    shard.write_bytes(content)
    source = data.make_source(reading(superres(made), folder).data)
    first = source[0]
    np.testing.assert_array_equal(source[1]["low_tokens"], expected[1]["low_tokens"])
    others = (expected.example(i % len(expected), (0, i)) for i in range(1, 2 * len(expected)))  # of both epochs
    assert any(np.array_equal(first["low_tokens"], other["low_tokens"]) for other in others)
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"train-00000.*bytes"):
        data.make_source(reading(superres(made), folder).data)
    manifest = json.loads((folder / array_records.MANIFEST).read_text())
    (folder / array_records.MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        data.make_source(reading(superres(made), folder).data)
