"""Which stages are compiled for sampling; tests/test_compile.py compiles them."""

import pathlib

import jax
import pytest

from muse_jax import ahead, cascade, specs

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    ("config", "stages", "said"),
    [
        ("vqgan_f16_256", {}, "the config's model is a VQGAN model, which has no sampler"),
        ("paella_f8_256", {}, "the config's model is a Paella model, which has no sampler"),
        (
            "superres_512",
            {"base": "runs/vqgan_f16_256"},
            "'runs/vqgan_f16_256' is a VQGAN model, which can't be the base",
        ),
        (
            "superres_512",
            {"base": "runs/superres_512"},
            "'runs/superres_512' is a SuperRes model, which can't be the base",
        ),
        ("superres_512", {"base": "runs/paella_f8_256"}, "base is a Paella model"),
        (
            "superres_512",
            {"base": "runs/maskgit_imagenet256"},
            "superres has 8192 low-resolution codes, but base has 1024",
        ),
        ("superres_512", {"decoder": "runs/base_3b"}, "'runs/base_3b' is a Base model, which can't be the decoder"),
        ("superres_512", {"decoder": "runs/vqgan_f16_256"}, "decoder has 16 pixels a token, but tokenizer_high has 8"),
    ],
)
def test_stages_that_cannot_be_sampled_together_are_refused(config, stages, said):
    spec = specs.from_config(ahead.read_config(CONFIGS / f"{config}.py"))
    with pytest.raises(specs.SpecError, match=said):
        cascade.lower(spec, CONFIGS, 1, jax.devices()[0], **stages)
