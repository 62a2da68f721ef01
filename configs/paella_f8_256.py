"""Paella's text-to-image model, the 573M of its paper (arXiv 2211.07292, section 4; values from its published code).

    python -m muse_jax.compile --config=configs/paella_f8_256.py --topology=v4:4x8x8
    python -m muse_jax.train --config=configs/paella_f8_256.py --workdir=runs/paella_f8_256

578M parameters; without token embedding and classifier 573M. The paper trained on 600M pictures of LAION-5B's
aesthetic part, on 64 GPUs.
"""

import ml_collections

from muse_jax import specs


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokens",
        # f=8 and 8192 codes, as the paper's; fully convolutional, so that it serves 256 pixels too.
        # Differs from the paper: there ruDALL-E's Gumbel VQGAN.
        tokenizer="runs/vqgan_f8_512",
        low_tokenizer="",
        text_dropout=0.1,  # Differs from the paper: of single examples, there of whole batches
        label_smoothing=0.1,
        corruption="noise",
        mask_schedule="cosine",  # a share of cos(pi t / 2) is noise
        min_mask_ratio=0.0,
        visible_weight=1.0,  # the loss is of all tokens
        low_corruption=0.0,
        picture_share=0.0,  # the paper fine-tunes for variations afterwards
        codebook_init=False,  # not in the paper
    )
    config.model = dict(
        name="paella",
        codebook_size=8192,
        grid=(32, 32),  # 256 / 8
        widths=(320, 640, 1280),
        down_blocks=(4, 8, 16),
        up_blocks=(4, 8, 16),  # from the coarsest: 16, 8, 4
        heads=0,  # no attention; the text is one vector
        picture_encoder=False,
        layer_scale=1e-6,
        # Differs from the paper: the mean of a frozen T5 1.1 large's outputs, 1024 wide as the CLIP vector there.
        text=dict(
            vocabulary_size=32128,
            layers=24,
            width=1024,
            heads=16,
            head_dim=64,
            mlp_width=2816,
            position_buckets=32,
            position_max_distance=128,
            dropout=0.0,
            gated=True,
            trainable=False,
            weights="weights/t5_large",
        ),
        dropout=0.0,
        remat="none",  # 6 examples a chip: what the backward pass needs fits
        unroll=1,
        dtype="bfloat16",  # of products; parameters, norms and the optimizer are float32
    )
    config.data = dict(
        name="folder",
        path="data/laion_aesthetics",
        image_size=256,
        text_length=77,  # CLIP's
        vocabulary="weights/t5/spiece.model",
        crop="random",
        flip=False,  # captions say left and right
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-4,
        schedule="linear",  # the paper's code: one cycle, linear, a tenth of the steps upward
        final_scale=0.0,
        warmup_steps=50_000,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,  # PyTorch's usual
        clip_norm=5.0,
        accumulate=1,
        ema_decay=0.0,  # none in the paper
    )
    config.mesh = dict(data=-1, fsdp=8, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(
        steps=501_000,
        batch_size=1536,  # the paper: 1408, which 256 chips don't divide
        log_every=100,
        eval_every=5_000,
        eval_batches=8,
        sample_every=5_000,
    )
    config.checkpoint = dict(every_steps=5_000, keep=4)
    config.sample = dict(
        num_inference_steps=12,
        schedule="cosine",
        guidance_scale=5.0,  # 4 to 6
        guidance_ramp="constant",
        token_temperature=1.0,
        choice_temperature=0.0,  # places are renoised at random
        top_k=0,
        top_p=1.0,
        typical_p=0.2,
        selection_rule="anywhere",  # that is renoised
    )
    return specs.locked(config)
