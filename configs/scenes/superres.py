"""Super-resolution model of the scenes: 16x16 tokens from 8x8 and a caption (Muse, section 2.4).

    python -m muse_jax.train --config=configs/scenes/superres.py --workdir=runs/scenes/superres \
        --config.task.tokenizer=runs/scenes/tokenizer_high --config.task.low_tokenizer=runs/scenes/tokenizer_low

About 5 minutes on one CPU core. Variants: "" (quickstart), "long" (better, slower), "tiny" (for tests).
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
        name="tokens",
        tokenizer="pretrained:tokenizer_high",
        low_tokenizer="pretrained:tokenizer_low",
        text_dropout=0.1,
        label_smoothing=0.0,
        mask_schedule="cosine",
        min_mask_ratio=0.0,
        visible_weight=0.0,
        low_corruption=0.1,  # so that it stands the base model's mistakes
        codebook_init=True,
    )
    config.model = dict(
        name="superres",
        codebook_size=512,
        grid=(16, 16),
        low_codebook_size=512,
        low_grid=(8, 8),
        low_layers=2,
        layers=4,
        width=96,
        heads=4,
        mlp_width=384,
        block=(4, 4),  # 16 blocks of 16 tokens: both axes of attention see 16
        text=dict(
            vocabulary_size=64,
            layers=1,
            width=96,
            heads=4,
            head_dim=24,
            mlp_width=192,
            position_buckets=32,
            position_max_distance=128,
            dropout=0.0,
            gated=True,
            trainable=True,
            weights="",
        ),
        dropout=0.0,
        qk_norm=True,
        relative_positions=True,  # not in Muse: a place finds its low-resolution tokens at once
        remat="none",
        unroll=4,
        dtype="float32",
    )
    config.data = dict(
        name="scenes",
        image_size=64,
        split="train",
        eval_split="test",
        text_length=20,
        vocabulary="scenes",
        workers=0,
        prefetch=2,
    )
    config.optimizer = dict(
        name="muon",
        learning_rate=0.02,
        adam_learning_rate=1e-2,
        schedule="cosine",
        final_scale=0.02,
        warmup_steps=30,
        b1=0.95,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=1,
        ema_decay=0.0,
        # Tables start with unit variance, so that Adam needs steps of this size to move them in time.
        overrides=dict(embeddings=dict(name="adamw", learning_rate=0.03)),
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    # In 0.8 of the time 1100 of these learn as much as 800 steps of 16.
    config.train = dict(
        steps=1300,
        batch_size=8,
        log_every=25,
        eval_every=0,
        eval_batches=8,
        sample_every=0,
        matmul_precision="bfloat16",  # on CPUs with such instructions a step takes nine tenths of the time
    )
    config.checkpoint = dict(every_steps=250, keep=2)
    config.sample = dict(
        num_inference_steps=8,  # Muse, section 2.8
        schedule="cosine",
        guidance_scale=1.0,  # off: the low-resolution tokens say enough, and it takes half of the time
        guidance_ramp="constant",
        token_temperature=0.01,  # the likeliest tokens, as the low-resolution ones leave little to choose
        choice_temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    if variant == "long":
        config.train.update(steps=4200, batch_size=16, eval_batches=4)
        config.optimizer.adam_learning_rate = 2e-3
        config.sample.token_temperature = 0.8
    if variant == "tiny":
        config.model.update(
            codebook_size=32, low_codebook_size=32, low_layers=1, layers=2, width=32, heads=2, mlp_width=64, unroll=1
        )
        config.model.text.update(layers=1, width=32, heads=2, head_dim=16, mlp_width=64)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
        config.sample.num_inference_steps = 2
    return specs.locked(config)
