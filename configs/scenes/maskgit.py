"""MaskGIT on scenes: 8x8 tokens of one object from its class, which is its colour and shape (arXiv 2202.04200).

    python -m muse_jax.train --config=configs/scenes/maskgit.py --workdir=runs/maskgit/base

Its tokenizer comes with the package; another one's folder is given with
--config.task.tokenizer=DIR. About 16 minutes of one CPU core. Variants: "" and "tiny" (for tests).
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
        text_dropout=0.1,  # of the classes; Muse, section 2.7: MaskGIT itself samples without guidance
        label_smoothing=0.0,  # MaskGIT's 0.1 is for pictures seen 300 times; here none is seen twice
        mask_schedule="cosine",  # section 3.3
        min_mask_ratio=0.0,
        visible_weight=0.0,  # section 3.1: loss on masked tokens only
        low_corruption=0.0,
        codebook_init=True,
    )
    config.model = dict(
        name="maskgit",
        codebook_size=512,
        grid=(8, 8),
        classes=24,  # 6 colours, 4 shapes
        layers=4,
        width=128,
        heads=4,
        mlp_width=512,
        dropout=0.0,
        qk_norm=True,
        relative_positions=True,  # not in MaskGIT: shapes come out whole in fewer steps
        remat="none",
        unroll=4,  # all layers in one iteration: the scan's copies cost time on CPU
        dtype="float32",
    )
    config.data = dict(
        name="scenes",
        image_size=32,
        split="train",
        eval_split="test",
        vocabulary="classes",
        workers=0,
        prefetch=2,
    )
    config.optimizer = dict(
        name="muon",  # as the scenes' base model
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
        num_inference_steps=16,  # table 3 and section 4.1: 8 to 12
        schedule="cosine",
        guidance_scale=2.0,
        guidance_ramp="constant",
        token_temperature=1.0,
        choice_temperature=4.5,  # the authors' code
        top_k=0,
        top_p=1.0,
    )
    if variant == "tiny":
        config.model.update(layers=2, width=32, heads=2, mlp_width=64, unroll=1)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
        config.sample.num_inference_steps = 4
    return specs.locked(config)
