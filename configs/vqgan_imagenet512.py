"""MaskGIT's tokenizer of ImageNet at 512x512: f=16, 32x32 tokens of 1024 codes (arXiv 2202.04200, section 4).

    python -m muse_jax.train --config=configs/vqgan_imagenet512.py --workdir=runs/vqgan_imagenet512

"Code" is the authors' repository, google-research/maskgit and, for what trains a tokenizer, magvit.
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
        reconstruction=1.0,  # code
        codebook=1.0,  # code
        commitment=0.25,  # code
        perceptual=0.1,  # code; there of a ResNet-50's features, here LPIPS
        perceptual_weights="weights/lpips/params.safetensors",
        adversarial=0.1,  # code
        adversarial_start=0,  # code
        adversarial_warmup=0,
        adaptive_weight=False,  # code: a fixed weight
        revive_after=1_000,  # code has an entropy loss that keeps codes alive instead
    )
    config.model = dict(
        name="vqgan",
        codebook_size=1024,  # section 4
        code_dim=256,  # code
        channels=128,  # code
        channel_multipliers=(1, 1, 2, 2, 4),  # code: f=16
        res_blocks=2,  # code; it has two more in the middle of encoder and decoder
        stem_patch=1,
        encoder_kernel=3,
        decoder_channels=0,  # as the encoder
        decoder_res_blocks=0,
        normalization="group",  # code
        normalize_codes=False,
        discriminator_channels=64,  # PatchGAN's (Isola et al. 2017); code has StyleGAN's discriminator
        discriminator_layers=3,
        dtype="bfloat16",  # of convolutions; parameters, norms, codebook and losses are float32
    )
    config.data = dict(
        name="tfds",
        dataset="imagenet2012",  # section 4
        image_size=512,
        split="train",
        eval_split="validation",
        crop="random",  # section 4
        flip=True,
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adamw",  # code: Adam
        learning_rate=1e-4,  # code
        schedule="constant",  # code
        final_scale=0.0,
        warmup_steps=0,
        b1=0.0,  # code
        b2=0.99,  # code
        weight_decay=0.0,
        clip_norm=0.0,
        accumulate=1,
        ema_decay=0.999,  # code
    )
    # 40M parameters fit everywhere: every chip holds them whole, and only gradients travel.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(
        steps=1_000_000,  # code
        batch_size=256,  # section 4
        log_every=100,
        eval_every=5_000,
        eval_batches=8,
        sample_every=5_000,
    )
    config.checkpoint = dict(every_steps=5_000, keep=3)
    config.sample = {}
    return specs.locked(config)
