"""Muse's super-resolution model: 64x64 tokens from 16x16 and a text (section 2.4, appendix's super-resolution table).

    python -m muse_jax.compile --config=configs/superres_512.py --topology=v4:4x8x8
    python -m muse_jax.train --config=configs/superres_512.py --workdir=runs/superres_512

A picture of 512 pixels is tokenized twice, decimated to 256 for the low-resolution tokens.
"""

import ml_collections

from muse_jax import specs


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokens",
        tokenizer="runs/vqgan_f8_512",  # section 2.2: the f=8 tokenizer
        low_tokenizer="runs/vqgan_f16_256",
        text_dropout=0.1,  # section 2.7
        label_smoothing=0.1,  # not in the paper; MaskGIT's, by the same authors
        mask_schedule="cosine",  # section 2.6
        min_mask_ratio=0.0,  # section 2.6: none
        visible_weight=0.0,  # section 2.6: loss on masked tokens only
        low_corruption=0.1,  # not in the paper; so that it stands the base model's mistakes
        codebook_init=False,  # not in the paper
    )
    config.model = dict(
        name="superres",
        codebook_size=8192,  # VQGAN table
        grid=(64, 64),  # section 2.2: 512 / 8
        low_codebook_size=8192,  # VQGAN table
        low_grid=(16, 16),  # base_3b's
        low_layers=16,  # super-resolution table
        layers=32,  # super-resolution table
        width=1024,  # super-resolution table
        heads=8,  # not in the paper; 128 wide, the side of a TPU's matrix unit
        mlp_width=4096,  # super-resolution table
        block=(8, 8),  # not in the paper: 64 blocks of 64 tokens, so that both axes of attention see 64
        text=dict(  # section 2.1: T5-XXL's encoder, 4.6B; T5 1.1's published sizes
            vocabulary_size=32128,
            layers=24,
            width=4096,
            heads=64,
            head_dim=64,
            mlp_width=10240,
            position_buckets=32,
            position_max_distance=128,
            dropout=0.0,  # it is not trained
            gated=True,
            trainable=False,  # section 2.1: frozen
            weights="weights/t5_xxl",
        ),
        dropout=0.0,  # not in the paper; few of 460M pairs are seen twice
        qk_norm=True,  # not in the paper; keeps bfloat16's attention from saturating in so deep a model
        relative_positions=False,  # section 2.4: learned absolute positions
        # muse_jax.compile for v4:4x8x8: with "none" the backward pass keeps 43.6 GiB a chip, of 32; with what products
        # give kept alone, but for attention's scores, 10.6, 1.7% of the FLOPs done twice, and an estimate of 0.194 s a
        # step; with the scores ("dots_saveable") 13.7, 0.1% and 0.199 s: they cost more to keep than to compute.
        remat="dots_with_no_batch_dims_saveable",
        unroll=1,
        attention="xla",  # see base_3b.py
        dtype="bfloat16",  # of products; parameters, norms, softmax and the optimizer are float32
    )
    config.data = dict(
        name="folder",
        path="data/pairs",  # not in the paper: 460M pairs of its own (section 3)
        image_size=512,  # section 2.2
        text_length=128,  # not in the paper; Imagen's, which reads T5-XXL too
        vocabulary="weights/t5/spiece.model",
        crop="random",
        flip=False,  # captions say left and right
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adafactor",  # super-resolution table
        learning_rate=1e-4,  # super-resolution table
        schedule="cosine",  # super-resolution table
        final_scale=0.0,
        warmup_steps=5_000,  # super-resolution table
        b1=0.9,  # super-resolution table
        b2=0.96,  # super-resolution table
        weight_decay=0.045,  # super-resolution table
        clip_norm=0.0,  # not in the paper; Adafactor clips each parameter's update
        accumulate=1,
        gradient_dtype="float32",  # see base_3b.py
        ema_decay=0.0,  # section 3: none while training; muse_jax.average afterwards
    )
    # As base_3b.py's: trained parameters 64 ways; T5-XXL's kernels stay on the 4 chips of v4:4x8x8's short side.
    config.mesh = dict(data=4, fsdp=-1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.frozen_rules = dict(batch="fsdp", embed=None, mlp="data", heads="data", vocab=None)
    config.train = dict(
        steps=1_000_000,  # super-resolution table
        batch_size=512,  # super-resolution table
        log_every=100,
        eval_every=5_000,  # with the checkpoints
        eval_batches=8,
        sample_every=5_000,
        donate=True,  # see base_3b.py
    )
    config.checkpoint = dict(every_steps=5_000, keep=8)  # section 3, for the average over checkpoints
    config.sample = dict(
        num_inference_steps=8,  # section 2.8
        schedule="cosine",  # section 2.8
        guidance_scale=8.0,  # not in the paper
        guidance_ramp="linear",  # section 2.7
        token_temperature=1.0,  # not in the paper
        choice_temperature=4.5,  # not in the paper; MaskGIT's
        top_k=0,
        top_p=1.0,
    )
    return specs.locked(config)
