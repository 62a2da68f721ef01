"""Base model of the scenes: 8x8 tokens from a caption (Muse, section 2.3).

    python -m muse_jax.train --config=configs/scenes/base.py --workdir=runs/scenes/base \
        --config.task.tokenizer=runs/scenes/tokenizer_low

About 8 minutes on one CPU core. Variants: "" (quickstart), "long" (better, slower), "tiny" (for tests).
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
        tokenizer="pretrained:tokenizer_low",
        low_tokenizer="",
        text_dropout=0.1,  # Muse, section 2.7
        label_smoothing=0.0,  # MaskGIT's 0.1 is for millions of pictures seen often; here none is seen twice
        mask_schedule="cosine",  # Muse, section 2.6
        min_mask_ratio=0.0,
        visible_weight=0.0,
        low_corruption=0.0,
        codebook_init=True,
    )
    config.model = dict(
        name="base",
        codebook_size=512,
        grid=(8, 8),
        layers=4,
        width=128,
        heads=4,
        mlp_width=512,
        text=dict(
            vocabulary_size=64,
            layers=2,
            width=128,
            heads=4,
            head_dim=32,
            mlp_width=256,
            position_buckets=32,
            position_max_distance=128,
            dropout=0.0,
            gated=True,
            qk_norm=True,  # or the order of words is not learned
            trainable=True,  # small, and learned along with the model
            weights="",
        ),
        dropout=0.0,
        qk_norm=True,
        relative_positions=True,  # not in Muse: shapes come out whole in fewer steps
        remat="none",
        unroll=4,  # all layers in one iteration: the scan's copies cost time on CPU
        dtype="float32",
    )
    config.data = dict(
        name="scenes",
        image_size=32,
        split="train",
        eval_split="test",
        text_length=20,  # the longest caption has 17 words
        vocabulary="scenes",
        workers=0,
        prefetch=2,
    )
    config.optimizer = dict(
        name="muon",  # half of AdamW's steps to the same loss
        learning_rate=0.02,
        adam_learning_rate=2e-3,
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
    config.train = dict(
        steps=1000,
        batch_size=64,
        log_every=25,
        eval_every=0,
        eval_batches=4,
        sample_every=0,
        matmul_precision="bfloat16",  # on CPUs with such instructions a step takes three quarters of the time
    )
    config.checkpoint = dict(every_steps=250, keep=2)
    config.sample = dict(
        num_inference_steps=16,  # Muse, section 2.8, has 24; with tokens taken back 16 do as well
        schedule="cosine",
        guidance_scale=2.0,
        guidance_ramp="constant",
        token_temperature=0.3,  # low-resolution pictures that keep all statements: 62%, at 0.7 55%
        choice_temperature=8.0,
        top_k=0,
        top_p=1.0,
        selection_rule="revocable",  # mends what a model of few steps drew wrong
    )
    if variant == "long":
        config.model.update(width=160, heads=5, mlp_width=640)
        config.train.steps = 5200
        config.sample.update(num_inference_steps=24, guidance_scale=3.0, token_temperature=1.0, choice_temperature=4.5)
        config.sample.selection_rule = "most_confident"
    if variant == "tiny":
        config.model.update(codebook_size=32, layers=2, width=32, heads=2, mlp_width=64, unroll=1)
        config.model.text.update(layers=1, width=32, heads=2, head_dim=16, mlp_width=64)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
        config.sample.num_inference_steps = 4
    return specs.locked(config)
