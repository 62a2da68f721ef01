"""Ahead-of-time compilation: the report's arithmetic here; with libtpu, the big configs for TPU topologies."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from muse_jax import ahead, cascade, compile, flops, roofline, specs
from muse_jax.training import sharding
from muse_jax.training.step import compiler_options

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SECTIONS = {
    "chip": ("argument_bytes", "temporary_bytes", "total_bytes", "memory_bytes"),
    "flops": ("model", "program", "recomputed_share"),
    "estimate": ("compute_s", "memory_s", "interconnect_s", "step_s", "utilisation", "days_1m_steps"),
}
# What the estimates stay under: seconds a step, and the share of it that is waiting for other chips.
STEP_S = {"base_3b.py": 0.095, "base_3b.py:precomputed": 0.083}
WAITING = {"base_3b.py": 0.2, "base_3b.py:precomputed": 0.25}
without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install muse_jax[test], on Python 3.11",
)


def spec_of(config: str) -> specs.Spec:
    return specs.from_config(ahead.read_config(CONFIGS / config))


def test_recomputation_is_what_the_program_does_beyond_the_model():
    assert compile.work(3.0, 4.0) == {"model": 3.0, "program": 4.0, "recomputed_share": 0.25}
    assert compile.work(4.0, 3.9)["recomputed_share"] == 0.0


def test_a_report_of_utilisation_and_days():
    chip = roofline.CHIPS["v4"]
    times = roofline.Times(compute=0.05, memory=0.02, interconnect=0.03, step=0.0864, exposed=0.01)
    found = roofline.report(times, 0.0432 * 275e12 * 256, chip, 256)
    assert found["binds"] == "compute"
    assert found["utilisation"] == pytest.approx(0.5)
    assert found["days_1m_steps"] == pytest.approx(1.0)


def test_a_frozen_text_encoder_counts_one_forward_pass_and_a_precomputed_one_none():
    online, ready = spec_of("base_3b.py"), spec_of("base_3b.py:precomputed")
    tokenizers = ahead.tokenizers(online, CONFIGS)
    text = flops.text(online.model.text, 512, online.data.text_length)
    images = jax.ShapeDtypeStruct((512, 256, 256, 3), jnp.float32)
    encode = flops.encode(tokenizers[online.task.tokenizer], images)
    assert flops.train(online, tokenizers) == pytest.approx(flops.train(ready, {}) + text + encode)
    # 6 FLOPs a parameter and token are a third of what remains too little only: attention and the memory's text
    assert 6 * 2.8e9 * 512 * 256 < flops.train(ready, {}) < 6 * 3.7e9 * 512 * 256


@pytest.mark.parametrize("config", ["maskgit_imagenet256.py", "paella_f8_256.py", "superres_512.py", "vqgan_f8_512.py"])
def test_the_work_of_every_kind_of_model_is_known(config):
    """Of a frozen tokenizer it is a small part, and it grows with the batch."""
    spec = spec_of(config)
    tokenizers = ahead.tokenizers(spec, CONFIGS)
    work = flops.train(spec, tokenizers)
    doubled = dataclasses.replace(spec, train=dataclasses.replace(spec.train, batch_size=2 * spec.train.batch_size))
    assert flops.train(doubled, tokenizers) == pytest.approx(2 * work)
    size = spec.data.image_size
    images = jax.ShapeDtypeStruct((spec.train.batch_size, size, size, 3), jnp.float32)
    assert sum(flops.encode(model, images) for model in tokenizers.values()) < work


def test_stages_that_are_not_there_yet_are_those_of_the_configs_beside():
    found = ahead.tokenizers(spec_of("superres_512.py"), CONFIGS)
    assert [spec.factor for spec in found.values()] == [8, 16]
    assert ahead.stage_spec("gs://bucket/runs/vqgan_f16_256", CONFIGS).model.factor == 16, "no bucket is asked"
    assert ahead.stage_spec("pretrained:tokenizer_low", CONFIGS).model.factor == 4
    with pytest.raises(specs.SpecError, match="nowhere"):
        ahead.stage_spec("runs/nowhere", CONFIGS)
    with pytest.raises(specs.SpecError, match="the packaged pipeline has the stages base, "):
        ahead.stage_spec("pretrained:nowhere", CONFIGS)


def test_the_compilers_options_are_those_of_the_chip():
    options = spec_of("base_3b.py").train.tpu_options
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
    later = compiler_options(options, device)
    assert later == {name: value for name, value in options.items() if name != "TPU v4"}
    device.device_kind = "TPU v4"
    assert compiler_options(options, device) == {**later, **options["TPU v4"]}
    assert compiler_options({**options, "TPU v4": {next(iter(later)): False}}, device)[next(iter(later))] is False
    assert not compiler_options(options, jax.devices()[0])


def test_meshes_of_chips_that_need_not_exist():
    spec = spec_of("base_3b.py").mesh
    assert dict(ahead.abstract_mesh(spec, 256).shape) == {"data": 4, "fsdp": 64, "tensor": 1}
    with pytest.raises(specs.SpecError, match="102 chips"):
        ahead.abstract_mesh(spec, 102)


def test_frozen_networks_are_split_over_the_mesh():
    program = ahead.program(spec_of("base_3b.py"), ahead.abstract_mesh(spec_of("base_3b.py").mesh), CONFIGS)
    text = program.frozen["text_encoder"]["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert text.dtype == jnp.bfloat16
    assert text.sharding.shard_shape(text.shape) == (24, 4096, 10240 // 4)
    leaves = jax.tree.leaves(program.frozen)
    here = sum(jnp.dtype(x.dtype).itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape)))) for x in leaves)
    # T5's MLPs are split over the four chips of the short side; its attention, a third of it, and its table are not.
    assert here < 0.54 * sum(x.size * x.dtype.itemsize for x in leaves)
    assert program.mesh.axis_names == sharding.AXES


def test_decoding_loops_are_lowered_as_shapes():
    """What compiling for sampling hands to libtpu; that needs no TPU and no libtpu yet."""
    networks, programs = cascade.lower(spec_of("maskgit_imagenet256.py"), CONFIGS, 2, jax.devices()[0])
    assert set(programs) == {"base", "decoder"}
    assert set(networks) == {"base", "decoder"}, "no text encoder goes with classes"
    tokens = 2 * 8 * 257  # of 2 pictures in 8 steps, with the class's
    assert programs["base"].model_flops > 2 * 168e6 * tokens


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v3:4x4", "v5p"),
        ("v4", "expected 3 sides"),
        ("v4:4x8", "expected 3 sides of the torus, as in 4x8x8"),
        ("v5e:4x8x8", "expected 2 sides of the torus, as in 16x16"),
        ("v6e:16x32", "the largest slice of this chip has 256 chips"),
        ("v4:axb", "expected 3 sides"),
        ("v4:0x8x8", "expected 3 sides"),
    ],
)
def test_machines_that_are_not_built_are_refused(topology, said):
    with pytest.raises(specs.SpecError, match=said):
        compile.topology_devices(topology)


def test_a_report_that_could_not_be_written_is_refused_before_compiling(tmp_path):
    compile.check_files(str(tmp_path / "report.json"), None, "")
    with pytest.raises(specs.SpecError, match="nowhere"):
        compile.check_files(str(tmp_path / "nowhere" / "report.json"))
    with pytest.raises(specs.SpecError, match="can't write .*: it is a folder"):
        compile.check_files(str(tmp_path))
    with pytest.raises(specs.SpecError, match="can't write /proc/report.json: .* in /proc"):
        compile.check_files("/proc/report.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology=v4:4x8"], "topology is 'v4:4x8'; expected 3 sides of the torus"),
        (["--topology=v4:4x8", "--mode=sample", "--hlo=program.txt"], "--hlo=program.txt is for --mode=train"),
    ],
)
def test_the_command_says_so_in_one_line(words, said):
    command = [sys.executable, "-m", "muse_jax.compile", "--config=configs/base_632m.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"SpecError: {said}")


# ------------------------------------------------------------------------------------- with libtpu


def report(tmp_path: pathlib.Path, as_users: dict[str, str], *arguments: str) -> dict:
    """What the command writes."""
    file = tmp_path / "report.json"
    # The tests' other programs are compiled without optimizations; this one is looked at for them.
    command = [sys.executable, "-m", "muse_jax.compile", f"--json={file}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=as_users, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "estimate" in done.stdout
    assert "{" not in done.stdout, "for people, who have the file for the rest"
    found = json.loads(file.read_text())
    for section, keys in SECTIONS.items():
        assert set(keys) <= set(found[section])
    assert found["chip"]["total_bytes"] < found["chip"]["memory_bytes"]
    return found


@without_libtpu
@pytest.mark.compile
def test_a_run_on_cpu_does_not_touch_libtpu():
    """Whether or not JAX_PLATFORMS says that it is one."""
    program = "import muse_jax, jax; jax.devices(); print('libtpu.so' in open('/proc/self/maps').read())"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


@without_libtpu
@pytest.mark.compile
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_one_chip_is_a_topology(topology):
    assert len(compile.topology_devices(topology)[1]) == 1


@without_libtpu
@pytest.mark.compile
def test_a_topology_that_is_none_is_refused():
    with pytest.raises(specs.SpecError, match="v4:3x5x7"):
        compile.topology_devices("v4:3x5x7")


@without_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", [pytest.param("base_3b.py", marks=pytest.mark.compile), "base_3b.py:precomputed"])
def test_the_3b_step_on_the_papers_pod(tmp_path, as_users, config):
    """Compiled as `train` compiles it, since it is looked at for its times."""
    found = report(tmp_path, as_users, f"--config=configs/{config}", "--topology=v4:4x8x8")
    assert found["chips"] == 256
    assert found["chip"]["total_bytes"] < found["chip"]["memory_bytes"] * 2 / 3
    assert found["flops"]["recomputed_share"] < 0.15
    assert found["estimate"]["step_s"] < STEP_S[config]
    assert found["estimate"]["exposed_interconnect_s"] < WAITING[config] * found["estimate"]["step_s"]
    assert not found["unknown_loops"]


# In the order of their minutes, for the workers that share them: libtpu takes longest for convolutions.
COMPILED = (
    "vqgan_f8_512.py",
    "vqgan_f16_256.py",
    "decoder_f8_512.py",
    "superres_268m.py",
    "superres_512.py",
    "paella_f8_256.py",
    "base_632m.py",
    "maskgit_imagenet256.py",
    "base_3b.py:precomputed",
)
ALIKE = ("maskgit_imagenet512.py", "vqgan_imagenet256.py", "vqgan_imagenet512.py")  # others of the same networks


@without_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", [*(pytest.param(c, marks=pytest.mark.compile) for c in COMPILED), *ALIKE])
def test_the_big_configs_fit_the_papers_pod(tmp_path, as_users, config):
    report(tmp_path, as_users, f"--config=configs/{config}", "--topology=v4:4x8x8", "--optimization_level=O0")


@without_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x8x8", "v6e:16x16"])
def test_the_3b_step_on_later_chips(tmp_path, as_users, topology):
    report(
        tmp_path,
        as_users,
        "--config=configs/base_3b.py:precomputed",
        f"--topology={topology}",
        "--optimization_level=O0",
    )


@without_libtpu
@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sampling_by_class_on_one_chip(tmp_path, as_users):
    arguments = ("--config=configs/maskgit_imagenet256.py", "--topology=v4:2x2x1", "--mode=sample")
    assert set(report(tmp_path, as_users, *arguments)["programs"]) == {"base", "decoder"}


@without_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 8])
def test_sampling_on_one_chip(tmp_path, as_users, batch):
    arguments = ("--config=configs/superres_512.py", "--topology=v4:2x2x1", "--mode=sample", f"--batch={batch}")
    assert set(report(tmp_path, as_users, *arguments)["programs"]) == {"base", "superres", "decoder"}
