"""Muse's base model, 3B: 16x16 tokens of 8192 codes from a text (section 2.3, appendix's base table).

    python -m muse_jax.compile --config=configs/base_3b.py --topology=v4:4x8x8
    python -m muse_jax.train --config=configs/base_3b.py --workdir=runs/base_3b

Section 3: about a week on 512 cores (256 chips) of TPU v4 for 1M steps, 0.6 s a step; the first command prints
its estimate of ours. Variants: "" (tokens and text embeddings are made in the step, by the frozen VQGAN and the
frozen T5-XXL), "precomputed" (they are read from the data, as `muse_jax.precompute --text_embeddings` wrote them with
this config). To read the tokens alone: --config.data.name=precomputed --config.data.path=data/precomputed.
"""

import ml_collections

from muse_jax import specs


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; see the variants above."""
    if variant not in ("", "precomputed"):
        raise ValueError(f"unknown variant {variant!r}; expected '' or 'precomputed'.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = dict(
        name="tokens",
        tokenizer="runs/vqgan_f16_256",  # section 2.2: the f=16 tokenizer
        low_tokenizer="",
        text_dropout=0.1,  # section 2.7
        label_smoothing=0.1,  # not in the paper; MaskGIT's, by the same authors
        mask_schedule="cosine",  # section 2.6
        min_mask_ratio=0.0,  # section 2.6: none
        visible_weight=0.0,  # section 2.6: loss on masked tokens only
        low_corruption=0.0,
        codebook_init=False,  # not in the paper
    )
    config.model = dict(
        name="base",
        codebook_size=8192,  # VQGAN table
        grid=(16, 16),  # section 2.2: 256 / 16
        layers=48,  # base table
        width=2048,  # base table
        heads=16,  # not in the paper; 128 wide, the side of a TPU's matrix unit
        mlp_width=8192,  # base table
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
        relative_positions=False,  # section 2.3: learned absolute positions
        # The figures are muse_jax.compile's estimates for v4:4x8x8, of the variant "precomputed".
        remat="none",  # 15.3 of 32 GiB a chip with all that the backward pass needs; "full" would add a third of FLOPs
        unroll=1,  # gathers already go layer by layer; more layers an iteration is more code to compile
        # Scores of 256 x 256 places stay on the chip: all of attention is 3 of 55 ms of the step's own work, which is
        # the most that a fused kernel could save. "cudnn" is for GPUs.
        attention="xla",
        dtype="bfloat16",  # of products; parameters, norms, softmax and the optimizer are float32
    )
    config.data = dict(
        name="folder",
        path="data/pairs",  # not in the paper: 460M pairs of its own (section 3)
        image_size=256,  # section 2.2
        text_length=128,  # not in the paper; Imagen's, which reads T5-XXL too
        vocabulary="weights/t5/spiece.model",
        crop="random",
        flip=False,  # captions say left and right
        workers=16,  # of the 240 cores that a v4 host has
        prefetch=2,
    )
    config.optimizer = dict(
        name="adafactor",  # base table
        learning_rate=1e-4,  # base table
        schedule="cosine",  # base table
        final_scale=0.0,
        warmup_steps=5_000,  # base table
        b1=0.9,  # base table
        b2=0.96,  # base table
        weight_decay=0.045,  # base table
        clip_norm=0.0,  # not in the paper; Adafactor clips each parameter's update
        accumulate=1,
        # Chips exchange gradients in model.dtype already, 6.4 GB a step; this would save 102 MB a chip.
        gradient_dtype="float32",
        ema_decay=0.0,  # section 3: none while training; muse_jax.average afterwards
    )
    # A chip trains on 2 examples. What is trained is split 64 ways, over the two long sides of v4:4x8x8: groups
    # that span all three sides have no all-gather on TPU v4, and send twice as much in all-reduces instead.
    config.mesh = dict(data=4, fsdp=-1, tensor=1, slices=1)
    config.rules = dict(specs.RULES)
    # T5-XXL's kernels stay where they are and examples pass by, which is less than 9.1 GB of kernels to each chip at
    # each step. Of the MLPs' kernels each chip of the short side has a quarter, and between MLPs 2 examples of the 8
    # that these want: 0.3 GB to exchange, parts of sums in bfloat16 (in float32 half as much again, 1.5 ms a step).
    # Attention's are whole on each chip: 2.4 GB of memory, not 0.3 GB more to exchange. So is the words' table (0.26).
    config.frozen_rules = dict(batch="fsdp", residual=("fsdp", "data"), embed=None, mlp="data", heads=None, vocab=None)
    config.train = dict(
        steps=1_500_000,  # base table; section 3 says 1M
        batch_size=512,  # base table
        log_every=100,
        eval_every=5_000,  # with the checkpoints
        eval_batches=8,
        sample_every=5_000,
        compare_every=1_000,  # steps; copies of a parameter are compared by fingerprints, a pass over its bytes
        replay_every=10_000,  # a step of these is made twice and compared, which takes 0.4 of 32 GiB a chip meanwhile
        donate=True,  # without it a second state, 0.4 of 32 GiB a chip
        # Together they spread the exchange of a kernel or its gradient over products with others: by the estimate for
        # v4:4x8x8 0.092 s a step, 20% of it waiting for others, and of "precomputed", which has less to compute
        # meanwhile, 0.080 and 24%. That is with what the models say of when to exchange (`layers.awaited`,
        # `transformer.Layer`); without it "precomputed" took 0.094 s, with the first five alone 0.103, with none 0.122.
        # Tried beside them: up to 4 gathers at a time, other shares of the v4's common memory (8 MiB for scatters
        # compile without end; with 24 and more scatters become synchronous), other schedulers and estimates of how
        # long products take, all-reduces too, libtpu's own gathers a layer ahead, two and three layers a loop, all of
        # a layer's kernels in the layer before: more waiting, or no difference.
        tpu_options={
            "xla_enable_async_all_gather": True,  # a gather has a start and an end, and other work between them
            "xla_tpu_enable_async_collective_fusion": True,  # that work sends and receives too
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,  # for gathers
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,  # over several products
            "xla_tpu_overlap_compute_collective_tc": True,  # on the core that multiplies
            # Scatters of gradients need more memory than a core's own, whose place is v4's 128 MiB for both cores.
            "TPU v4": {
                "xla_enable_async_reduce_scatter_fusion": True,
                "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
                "xla_tpu_scoped_cmem_for_all_reduce": 16384,  # KiB of it
                "xla_tpu_max_cmem_used_by_memory_space_assignment": 65536,  # KiB of it, at most, for all else
                "xla_max_concurrent_async_all_gathers": 2,
            },
        },
    )
    config.checkpoint = dict(every_steps=5_000, keep=8)  # section 3, for the average over checkpoints
    config.sample = dict(
        num_inference_steps=24,  # section 2.8
        schedule="cosine",  # section 2.8
        guidance_scale=8.0,  # not in the paper
        guidance_ramp="linear",  # section 2.7
        token_temperature=1.0,  # not in the paper
        choice_temperature=4.5,  # not in the paper; MaskGIT's
        top_k=0,
        top_p=1.0,
    )
    if variant == "precomputed":
        config.data.update(name="precomputed", path="data/precomputed", text_embeddings=True)
    return specs.locked(config)
