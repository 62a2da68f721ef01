"""Paella on the scenes: 8x8 tokens from a caption (arXiv 2211.07292).

    python -m muse_jax.train --config=configs/scenes/paella.py --workdir=runs/paella/base

The tokens are those of the packaged pipeline's low-resolution tokenizer, 8x8 of pictures of 32x32 pixels. About 40
minutes of one CPU core, 1.2 seconds a step. Variants: "" and "tiny" (for tests).
"""

import ml_collections

from muse_jax import specs


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; see the variants above."""
    if variant not in ("", "tiny"):
        raise ValueError(f"unknown variant {variant!r}; expected '' or 'tiny'.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokens",
        tokenizer="pretrained:tokenizer_low",
        low_tokenizer="",
        text_dropout=0.1,  # as the paper's code, there for whole batches
        label_smoothing=0.0,  # the paper's 0.1 is for millions of pictures seen often; here none is seen twice
        corruption="noise",  # random codes in place of a mask id
        mask_schedule="cosine",  # the paper's code: a share of cos(pi t / 2) is noise
        min_mask_ratio=0.0,
        visible_weight=1.0,  # the loss is of all places: the model isn't told which are noise
        low_corruption=0.0,
        picture_share=0.1,  # examples that show their own picture instead of the text, for variations
        codebook_init=True,
    )
    config.model = dict(
        name="paella",
        codebook_size=512,
        grid=(8, 8),
        widths=(128, 192),  # of 8x8 and of 4x4 places
        down_blocks=(1, 2),
        up_blocks=(2, 2),
        heads=4,  # the paper has one vector for a text; which colour goes with which shape needs its words
        picture_encoder=True,
        layer_scale=0.3,  # the paper's 1e-6 is for networks of dozens of blocks and 500,000 steps
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
        remat="none",
        unroll=4,  # all blocks of a level in one iteration: the scan's copies cost time on CPU
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
        name="muon",  # half of AdamW's steps to the same loss, as for the base model
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
    config.train = dict(steps=2000, batch_size=64, log_every=25, eval_every=0, eval_batches=4, sample_every=0)
    config.checkpoint = dict(every_steps=250, keep=2)
    config.sample = dict(
        num_inference_steps=16,  # the paper: 8 to 12
        schedule="cosine",
        guidance_scale=2.0,
        guidance_ramp="constant",
        token_temperature=1.0,
        choice_temperature=0.0,  # places are renoised at random
        top_k=0,
        top_p=1.0,
        typical_p=0.5,  # the paper's code: 0.2
        selection_rule="anywhere",  # that is renoised
    )
    if variant == "tiny":
        config.model.update(widths=(32, 32), down_blocks=(1, 1), up_blocks=(2, 1), heads=2, unroll=1)
        config.model.text.update(layers=1, width=32, heads=2, head_dim=16, mlp_width=64)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
        config.sample.num_inference_steps = 4
    return specs.locked(config)
