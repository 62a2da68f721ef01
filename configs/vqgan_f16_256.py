"""Muse's low-resolution tokenizer: 256x256 pixels, f=16, 16x16 tokens of 8192 codes (section 2.2, appendix A.2).

    python -m muse_jax.train --config=configs/vqgan_f16_256.py --workdir=runs/vqgan_f16_256

256 TPU v4 chips hold one picture each. `python -m muse_jax.compile --config=configs/vqgan_f16_256.py
--topology=v4:4x8x8` says what a step takes. "Table" is a table of Muse's appendix (arXiv 2301.00704).
"""

import ml_collections

from muse_jax import specs


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokenizer",
        trainable="all",
        init_from="",
        reconstruction=1.0,  # not in the paper; VQGAN's own (Esser et al. 2021)
        codebook=1.0,  # as above
        commitment=0.25,  # VQ-VAE's beta, which VQGAN keeps
        perceptual=0.05,  # VQGAN table: perceptual loss weight
        perceptual_weights="weights/lpips/params.safetensors",
        adversarial=0.1,  # VQGAN table: adversarial loss weight
        adversarial_start=50_000,  # not in the paper; VQGAN starts late too, when pictures have shape
        adversarial_warmup=5_000,  # the discriminator alone before it, so that its first word is worth hearing
        adaptive_weight=True,  # VQGAN's equation 7
        revive_after=1_000,  # steps of 65,536 latents: a code still unused then is dead
    )
    config.model = dict(
        name="vqgan",
        codebook_size=8192,  # VQGAN table
        code_dim=256,  # not in the paper; MaskGIT's
        channels=128,  # VQGAN table: base channels
        channel_multipliers=(1, 1, 2, 2, 4),  # not in the paper; MaskGIT's for f=16
        res_blocks=2,  # VQGAN table. The 19 blocks of section 2.2 come from no two blocks a resolution: here 10 + 10
        stem_patch=1,  # none: convolutions all the way, as the paper's
        encoder_kernel=3,
        decoder_channels=0,  # as the encoder
        decoder_res_blocks=0,
        normalization="group",  # VQGAN's
        normalize_codes=False,
        discriminator_channels=64,  # PatchGAN's (Isola et al. 2017), 70x70 pixels a patch
        discriminator_layers=3,
        dtype="bfloat16",  # of convolutions; parameters, norms, codebook and losses are float32
    )
    config.data = dict(
        name="folder",
        path="data/pairs",  # not in the paper: 460M pairs of its own
        image_size=256,  # section 2.2
        crop="random",
        flip=True,  # a tokenizer reads no captions, so left and right may change places
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adamw",  # VQGAN table: Adam
        learning_rate=1e-4,  # VQGAN table
        schedule="cosine",  # VQGAN table
        final_scale=0.0,
        warmup_steps=10_000,  # VQGAN table
        b1=0.9,  # VQGAN table
        b2=0.99,  # VQGAN table
        weight_decay=1e-4,  # VQGAN table
        clip_norm=0.0,  # not in the paper
        accumulate=1,
        gradient_dtype="float32",  # see base_3b.py
        ema_decay=0.0,  # section 3: none while training; muse_jax.average afterwards
    )
    # 40M parameters fit everywhere: every chip holds them whole, and only gradients travel.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(
        steps=1_000_000,  # VQGAN table
        batch_size=256,  # VQGAN table
        log_every=100,
        eval_every=5_000,  # with the checkpoints
        eval_batches=8,
        sample_every=5_000,
        donate=True,  # see base_3b.py
    )
    config.checkpoint = dict(every_steps=5_000, keep=8)  # section 3, for the average over checkpoints
    config.sample = {}
    return specs.locked(config)
