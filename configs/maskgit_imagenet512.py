"""MaskGIT on ImageNet at 512x512: 32x32 tokens from a class (arXiv 2202.04200, section 4).

    python -m muse_jax.compile --config=configs/maskgit_imagenet512.py --topology=v4:4x8x8
    python -m muse_jax.train --config=configs/maskgit_imagenet512.py --workdir=runs/maskgit_imagenet512

The paper trains on 16 chips of a TPU and reaches FID 7.32 and Inception Score 156.0 in 12 steps (table 1). "Code" is
the authors' repository, google-research/maskgit, which has no trainer but its config.
"""

import ml_collections

from muse_jax import specs


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokens",
        tokenizer="runs/vqgan_imagenet512",  # section 4: one for each resolution
        low_tokenizer="",
        text_dropout=0.1,  # of the classes; not in the paper, which has no guidance: Muse's, section 2.7
        label_smoothing=0.1,  # section 4
        mask_schedule="cosine",  # section 3.3, table 3
        min_mask_ratio=0.0,  # section 3.1: r is uniform; code has min_masking_rate=0.5, and no word on what it does
        visible_weight=0.0,  # section 3.1: loss on masked tokens only
        low_corruption=0.0,
        codebook_init=False,  # not in the paper
    )
    config.model = dict(
        name="maskgit",
        codebook_size=1024,  # section 4
        grid=(32, 32),  # section 4: 512 / 16
        classes=1000,
        layers=24,  # section 4
        width=768,  # section 4
        heads=8,  # section 4; code has 16
        mlp_width=3072,  # section 4
        dropout=0.1,  # section 4
        qk_norm=False,
        relative_positions=False,  # section 4: learned absolute positions
        remat="none",
        unroll=1,
        dtype="bfloat16",  # of products; parameters, norms, softmax and the optimizer are float32
    )
    config.data = dict(
        name="tfds",
        dataset="imagenet2012",  # section 4
        image_size=512,
        split="train",
        eval_split="validation",
        text_key="label",
        vocabulary="classes",
        crop="random",  # section 4
        flip=True,
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adamw",  # section 4: Adam
        learning_rate=1e-4,  # code
        schedule="cosine",  # not in the paper; Muse's
        final_scale=0.0,
        warmup_steps=5_000,  # code
        b1=0.9,  # section 4
        b2=0.96,  # section 4
        weight_decay=0.045,  # code
        clip_norm=0.0,  # not in the paper
        accumulate=1,
        ema_decay=0.999,  # code
    )
    # 173M parameters fit everywhere: every chip holds them whole, and only gradients travel.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(
        steps=1_500_000,  # section 4: 300 epochs of 1,281,167 pictures
        batch_size=256,  # section 4
        log_every=100,
        eval_every=5_000,
        eval_batches=8,
        sample_every=5_000,
    )
    config.checkpoint = dict(every_steps=5_000, keep=3)
    config.sample = dict(
        num_inference_steps=12,  # table 1
        schedule="cosine",  # table 3
        guidance_scale=1.0,  # the paper has none
        guidance_ramp="linear",
        token_temperature=1.0,  # code
        choice_temperature=4.5,  # code
        top_k=0,
        top_p=1.0,
    )
    return specs.locked(config)
