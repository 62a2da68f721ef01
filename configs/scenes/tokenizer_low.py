"""Low-resolution tokenizer of the scenes: 32x32 pixels, f=4, 8x8 tokens (Muse, section 2.2).

    python -m muse_jax.train --config=configs/scenes/tokenizer_low.py --workdir=runs/scenes/tokenizer_low

About 2 minutes on 2 CPU cores. Variants: "" (quickstart), "long" (better, slower), "tiny" (for tests).
"""

import ml_collections

from muse_jax import specs


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; see the variants above."""
    if variant not in ("", "long", "tiny"):
        raise ValueError(f"unknown variant {variant!r}; expected '', 'long' or 'tiny'.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokenizer",
        trainable="all",
        init_from="",
        reconstruction=1.0,
        codebook=8.0,  # the mean over 8 dimensions: as a sum over them
        commitment=2.0,  # a quarter of it, as in VQ-VAE
        perceptual=0.0,  # off: the scenes have no texture, and LPIPS needs a file of weights
        perceptual_weights="",
        adversarial=0.0,  # off: nothing here is blurred for want of a better guess
        adversarial_start=0,
        adversarial_warmup=0,
        adaptive_weight=True,
        revive_after=60,
    )
    config.model = dict(
        name="vqgan",
        codebook_size=512,
        code_dim=8,  # low-dimensional and l2-normalised: more codes stay in use (Yu et al. 2022)
        channels=96,
        channel_multipliers=(1,),
        res_blocks=2,
        stem_patch=4,  # convolutions at 8x8 positions only: fast on CPU
        encoder_kernel=1,  # a token describes its own patch: tokens of less entropy, easier to predict
        decoder_channels=0,
        decoder_res_blocks=0,
        normalization="layer",
        normalize_codes=True,
        discriminator_channels=32,
        discriminator_layers=2,
        dtype="float32",
    )
    config.data = dict(name="scenes", image_size=32, split="train", eval_split="test", workers=0, prefetch=2)
    config.optimizer = dict(
        name="muon",
        learning_rate=0.02,
        adam_learning_rate=3e-3,
        schedule="cosine",
        final_scale=0.02,
        warmup_steps=30,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=1,
        ema_decay=0.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(steps=800, batch_size=64, log_every=25, eval_every=0, eval_batches=4, sample_every=0)
    config.checkpoint = dict(every_steps=250, keep=2)
    config.sample = {}
    if variant == "long":
        config.train.steps = 2000
    if variant == "tiny":
        config.model.update(codebook_size=32, channels=16, res_blocks=1)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
    return specs.locked(config)
