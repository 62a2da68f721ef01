"""The benchmark: what it counts, how it holds times against each other, and that it runs."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from muse_jax import benchmark, flops, specs
from muse_jax.models import vqgan

TEXT = specs.TextEncoderSpec(vocabulary_size=20, layers=2, width=8, heads=2, head_dim=6, mlp_width=10)


def test_products_and_convolutions_are_counted():
    a, b = jnp.zeros((2, 3, 4)), jnp.zeros((2, 4, 5))
    assert flops.count(lambda a, b: jnp.sin(a @ b) + 1, a, b) == 2 * 2 * 3 * 4 * 5
    assert flops.count(lambda a: jax.lax.scan(lambda c, _: (c @ c.mT @ c, None), a, length=7)[0], a) == 7 * 2 * 2 * 72
    x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 6, 10))
    dimensions = ("NHWC", "HWIO", "NHWC")

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dimensions)

    assert flops.count(jax.jit(convolution), x, kernel) == 2 * (2 * 4 * 4) * 10 * 6 * 9
    assert flops.count(vqgan.upsampled_convolution, x, kernel) == 2 * (2 * 16 * 16) * 10 * 6 * 9, "as the plain one"


def test_a_transformer_is_counted_as_on_paper():
    b, n, t, d, m, layers, v = 3, 8, 5, 16, 24, 2, 11
    spec = specs.BaseSpec(codebook_size=v, grid=(2, 4), layers=layers, width=d, heads=4, mlp_width=m, text=TEXT)
    text = TEXT.layers * (2 * t * 4 * 8 * 12 + 2 * 2 * t * t * 12 + 2 * t * 3 * 8 * 10)
    memory = 2 * t * 8 * d + layers * 2 * t * 2 * d * d
    layer = 2 * n * (6 * d * d + 2 * d * m) + 2 * 2 * n * n * d + 2 * 2 * n * t * d
    head = 2 * n * (d * d + d * v)
    assert flops.transformer(spec, b, t) == b * (text + memory + layers * layer + head)


def test_a_tokenizer_is_counted_as_on_paper():
    spec = specs.VQGANSpec(codebook_size=32, code_dim=4, channels=8, channel_multipliers=(1, 2), res_blocks=1)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def convolution(side, c, d, k=3):
        return 2 * side**2 * c * d * k**2

    encoder = convolution(8, 3, 8) + 2 * convolution(8, 8, 8)
    encoder += convolution(4, 8, 16) + convolution(4, 16, 16) + convolution(4, 8, 16, 1) + convolution(4, 16, 4, 1)
    quantizer = 2 * 4**2 * 4 * 32
    decoder = convolution(4, 4, 16) + 2 * convolution(4, 16, 16) + convolution(8, 16, 16)
    decoder += convolution(8, 16, 8) + convolution(8, 8, 8) + convolution(8, 16, 8, 1) + convolution(8, 8, 3)
    assert flops.encode(spec, images) == 2 * (encoder + quantizer)
    assert flops.forward(vqgan.VQGAN(spec), images) == 2 * (encoder + quantizer + decoder)


def test_the_perceptual_loss_is_counted_as_on_paper():
    """Both pictures forward, and by the pixels of one of them: three halves of a pass over a pair."""
    spec = benchmark.stage_spec("tokenizer_low", "tiny")
    task = dataclasses.replace(spec.task, perceptual=0.1, perceptual_weights="lpips.safetensors")
    picture, side, channels = 0, spec.data.image_size, 3
    for stage, (width, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(convolutions):
            picture, channels = picture + 2 * (side >> stage) ** 2 * channels * width * 9, width
    weighed = sum(2 * (side >> stage) ** 2 * width for stage, width in enumerate((64, 128, 256, 512, 512)))
    more = flops.train(dataclasses.replace(spec, task=task), {}) - flops.train(spec, {})
    assert more == 1.5 * spec.train.batch_size * (2 * picture + weighed)


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_a_train_step_is_at_least_three_forward_passes(stage):
    spec = benchmark.stage_spec(stage, "tiny")
    earlier = {
        path: benchmark.stage_spec(path, "tiny").model
        for path in (getattr(spec.task, "tokenizer", ""), getattr(spec.task, "low_tokenizer", ""))
        if path
    }
    work = flops.train(spec, earlier)
    if isinstance(spec.model, specs.VQGANSpec):
        images = jax.ShapeDtypeStruct((spec.train.batch_size, *(spec.data.image_size,) * 2, 3), jnp.float32)
        forward = flops.forward(vqgan.VQGAN(spec.model), images)
        assert (work == 3 * forward) == (stage != "decoder")
        if stage == "decoder":
            assert work > 3 * (forward - flops.encode(spec.model, images))
    else:
        assert work > 3 * flops.transformer(spec.model, spec.train.batch_size, spec.data.text_length)


def test_a_share_is_of_the_yardsticks_rate():
    """A case of half of the yardstick's work in the same time has a share of a half."""
    yardstick = benchmark.Case(lambda: time.sleep(0.02), flops=2e9)
    case = benchmark.Case(lambda: time.sleep(0.02), flops=1e9, extra_flops=5e8)
    found = benchmark.measure(case, yardstick, benchmark.Effort(rounds=3, seconds=0.04))
    assert found["share"] == pytest.approx(0.5, rel=0.25)
    assert found["seconds"] == pytest.approx(0.02, rel=0.25)
    assert found["share_with_optimizer"] == pytest.approx(1.5 * found["share"])
    assert found["share_lowest"] <= found["share"] <= found["share_highest"]


def test_a_case_is_held_against_products_of_its_own_precision():
    effort = benchmark.QUICK
    assert benchmark.train_case("wide", effort).yardstick == "products"
    assert benchmark.wide_spec(effort).train.matmul_precision == "float32"
    assert benchmark.train_case("base", effort).yardstick == "rounded products"
    assert benchmark.train_case("tokenizer_high", effort).yardstick == "convolutions"


def test_the_command(one_device):
    command = [
        sys.executable,
        "-m",
        "muse_jax.benchmark",
        "--quick",
        "--json",
        "--only=train/wide,sample,load/tokenizer_low",
    ]
    done = subprocess.run(command, env=one_device, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found["cases"]) == {"train/wide", "sample/wide", "load/tokenizer_low"}
    assert found["machine"]["products_gflops"] > 0
    assert found["cases"]["sample/wide"]["share"] > 0
    assert found["cases"]["load/tokenizer_low"]["ratio"] > 0


def test_a_case_that_is_not_there_is_refused():
    command = [sys.executable, "-m", "muse_jax.benchmark", "--only=trian"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0
    assert "trian" in done.stdout + done.stderr
    assert "train/base" in done.stdout + done.stderr
