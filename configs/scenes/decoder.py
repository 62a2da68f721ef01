"""Fine-tuned decoder of the scenes' high-resolution tokenizer (Muse, section 2.5 and appendix A.2).

    python -m muse_jax.train --config=configs/scenes/decoder.py --workdir=runs/scenes/decoder \
        --config.task.init_from=runs/scenes/tokenizer_high

Encoder and codebook stay bit for bit, so that tokens mean the same; a larger decoder is trained.
About 1 minute on 2 CPU cores. Variants: "" (quickstart), "long" (better, slower), "tiny" (for tests).
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
        name="tokenizer",
        trainable="decoder",
        init_from="pretrained:tokenizer_high",
        reconstruction=1.0,
        codebook=0.0,  # frozen
        commitment=0.0,
        perceptual=0.0,  # off: needs a file of weights; the paper's weight is 0.005
        perceptual_weights="",
        adversarial=0.1,  # the paper's weight
        adversarial_start=100,
        adversarial_warmup=50,
        adaptive_weight=True,
        revive_after=0,
    )
    config.model = dict(
        name="vqgan",
        codebook_size=512,
        code_dim=8,
        channels=96,  # encoder: as the tokenizer's
        channel_multipliers=(1,),
        res_blocks=2,
        stem_patch=4,
        encoder_kernel=1,
        decoder_channels=96,  # as trained: with twice the blocks the decoder starts as the one it was
        decoder_res_blocks=4,  # the paper doubles them too (2 to 4), and the channels
        normalization="layer",
        normalize_codes=True,
        discriminator_channels=16,
        discriminator_layers=2,
        dtype="float32",
    )
    config.data = dict(name="scenes", image_size=64, split="train", eval_split="test", workers=0, prefetch=2)
    config.optimizer = dict(
        name="muon",
        learning_rate=0.005,  # a quarter of the tokenizer's: it goes on from there
        adam_learning_rate=1e-3,
        schedule="cosine",
        final_scale=0.02,
        warmup_steps=30,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=1,
        ema_decay=0.0,
        overrides=dict(discriminator=dict(name="adamw", learning_rate=1e-3)),
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    config.train = dict(steps=120, batch_size=16, log_every=25, eval_every=0, eval_batches=4, sample_every=0)
    config.checkpoint = dict(every_steps=150, keep=2)
    config.sample = {}
    if variant == "long":
        config.train.steps = 1000
        config.task.update(adversarial_start=500, adversarial_warmup=100)
    if variant == "tiny":
        config.model.update(codebook_size=32, channels=16, res_blocks=1, decoder_channels=16, decoder_res_blocks=2)
        config.task.update(adversarial_start=2, adversarial_warmup=1)
        config.train.update(steps=4, batch_size=8, log_every=2, eval_batches=1)
    return specs.locked(config)
