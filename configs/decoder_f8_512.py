"""Muse's fine-tuned decoder: a larger one for the codes of vqgan_f8_512 (section 2.5, appendix A.2).

    python -m muse_jax.train --config=configs/decoder_f8_512.py --workdir=runs/decoder_f8_512

Encoder and codebook stay bit for bit, so that tokens mean the same. 256 TPU v4 chips hold one picture each.
`python -m muse_jax.compile --config=configs/decoder_f8_512.py --topology=v4:4x8x8` says what a step takes.
"Table" is a table of Muse's appendix (arXiv 2301.00704).
"""

import ml_collections

from muse_jax import specs


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokenizer",
        trainable="decoder",  # section 2.5
        init_from="runs/vqgan_f8_512",
        reconstruction=1.0,  # not in the paper; VQGAN's own (Esser et al. 2021)
        codebook=0.0,  # frozen
        commitment=0.0,
        perceptual=0.005,  # decoder table: perceptual loss weight
        perceptual_weights="weights/lpips/params.safetensors",
        adversarial=0.1,  # decoder table: adversarial loss weight
        adversarial_start=5_000,  # not in the paper; pictures have their shape from the start
        adversarial_warmup=5_000,  # the discriminator, a new one, learns alone before it
        adaptive_weight=True,  # VQGAN's equation 7
        revive_after=0,  # the codebook is frozen
    )
    config.model = dict(
        name="vqgan",
        codebook_size=8192,  # vqgan_f8_512's, as all of the encoder
        code_dim=256,  # not in the paper; MaskGIT's
        channels=128,  # encoder: vqgan_f8_512's
        channel_multipliers=(1, 1, 2, 4),  # not in the paper; MaskGIT's without one of the levels of 2
        res_blocks=2,  # encoder: vqgan_f8_512's
        stem_patch=1,  # none: convolutions all the way, as the paper's
        encoder_kernel=3,
        decoder_channels=256,  # decoder table: base channels
        decoder_res_blocks=4,  # decoder table: residual blocks a resolution
        normalization="group",  # VQGAN's
        normalize_codes=False,
        discriminator_channels=64,  # PatchGAN's (Isola et al. 2017), 70x70 pixels a patch
        discriminator_layers=3,
        dtype="bfloat16",  # of convolutions; parameters, norms, codebook and losses are float32
    )
    config.data = dict(
        name="folder",
        path="data/pairs",  # not in the paper: 460M pairs of its own
        image_size=512,  # section 2.2
        crop="random",
        flip=True,  # a tokenizer reads no captions, so left and right may change places
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adamw",  # decoder table: Adam
        learning_rate=1e-4,  # decoder table
        schedule="cosine",  # decoder table
        final_scale=0.0,
        warmup_steps=10_000,  # decoder table
        b1=0.9,  # decoder table
        b2=0.99,  # decoder table
        weight_decay=1e-4,  # decoder table
        clip_norm=0.0,  # not in the paper
        accumulate=1,
        gradient_dtype="float32",  # see base_3b.py
        ema_decay=0.0,  # section 3: none while training; muse_jax.average afterwards
    )
    # Parameters fit everywhere: every chip holds them whole, and only gradients travel.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(
        steps=1_000_000,  # decoder table
        batch_size=256,  # decoder table
        log_every=100,
        eval_every=5_000,  # with the checkpoints
        eval_batches=8,
        sample_every=5_000,
        donate=True,  # see base_3b.py
    )
    config.checkpoint = dict(every_steps=5_000, keep=8)  # section 3, for the average over checkpoints
    config.sample = {}
    return specs.locked(config)
