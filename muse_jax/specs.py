"""Specs: one frozen dataclass for each section of a config.

A config (``configs/*.py``, an ``ml_collections.ConfigDict``) is turned into a `Spec` once, before
anything is compiled. Unknown keys, wrong types and misfits fail here, with the key's full name,
what was given, what was expected and what to do. The rest of the code reads specs only.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


class SpecError(ValueError):
    """A config that cannot be run; the message names the key and the mend."""


# ---------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class TextEncoderSpec:
    """T5 1.1's encoder (Raffel et al. 2020; Shazeer 2020), at any size."""

    vocabulary_size: int
    layers: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    position_buckets: int = 32
    position_max_distance: int = 128
    dropout: float = 0.0
    gated: bool = True  # T5 1.1: gated GELU; False: T5 1.0's ReLU
    trainable: bool = True  # False: frozen, and `weights` must be given
    weights: str = ""  # a folder written by import_weights


@dataclasses.dataclass(frozen=True)
class VQGANSpec:
    """VQGAN (Esser et al. 2021), fully convolutional as in Muse 2.2.

    The downsampling factor is ``stem_patch * 2 ** (len(channel_multipliers) - 1)``.
    """

    codebook_size: int
    code_dim: int
    channels: int
    channel_multipliers: tuple[int, ...]
    res_blocks: int
    stem_patch: int = 1  # space-to-depth before the first convolution, its inverse after the last
    encoder_kernel: int = 3  # 1: with a stem patch alone, a token describes its own patch only
    decoder_channels: int = 0  # 0: as the encoder
    decoder_res_blocks: int = 0  # 0: as the encoder
    normalization: str = "group"  # "group" (32 groups) or "layer" (each position by itself)
    normalize_codes: bool = False  # l2-normalised codes (Yu et al. 2022)
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        return self.stem_patch * 2 ** (len(self.channel_multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class BaseSpec:
    """Muse's base model (section 2.3): masked transformer with cross-attention to text."""

    codebook_size: int
    grid: tuple[int, int]  # image tokens: rows, columns
    layers: int
    width: int
    heads: int
    mlp_width: int
    text: TextEncoderSpec
    dropout: float = 0.0
    qk_norm: bool = False
    relative_positions: bool = False  # a bias for each 2D offset on attention; not in Muse
    remat: str = "none"  # "none", "full", or a name in jax.checkpoint_policies
    unroll: int = 1  # layers per iteration of the scan over layers
    attention: str = "xla"  # who computes it: "xla" anywhere, "cudnn" its fused kernel, on NVIDIA GPUs in 16 bits
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class SuperResSpec:
    """Muse's super-resolution model (section 2.4)."""

    codebook_size: int
    grid: tuple[int, int]  # high-resolution tokens: rows, columns
    low_codebook_size: int
    low_grid: tuple[int, int]
    low_layers: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    block: tuple[int, int]  # multi-axis attention's block: rows, columns
    text: TextEncoderSpec
    dropout: float = 0.0
    qk_norm: bool = False
    relative_positions: bool = False  # a bias for each 2D offset on attention; not in Muse
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"  # as for the base model
    dtype: str = "float32"


MODELS = {"vqgan": VQGANSpec, "base": BaseSpec, "superres": SuperResSpec}

# ----------------------------------------------------------------------------------------- task


@dataclasses.dataclass(frozen=True)
class TokenizerTaskSpec:
    """Learning a VQGAN, or fine-tuning its decoder alone (Muse 2.2, 2.5 and appendix A.2)."""

    trainable: str = "all"  # "all", or "decoder": encoder and codebook stay bit for bit
    init_from: str = ""  # a stage folder; required for trainable="decoder"
    reconstruction: float = 1.0  # weight of the mean absolute and squared error
    codebook: float = 1.0
    commitment: float = 0.25
    perceptual: float = 0.0  # weight of LPIPS; 0 is off and needs no file
    perceptual_weights: str = ""  # LPIPS weights (safetensors)
    adversarial: float = 0.0
    adversarial_start: int = 0  # first step whose generator loss has the adversarial term
    adversarial_warmup: int = 0  # steps before it in which the discriminator learns alone
    adaptive_weight: bool = True  # Esser et al. 2021, equation 7
    revive_after: int = 0  # steps a code may go unused before it is revived; 0: never


@dataclasses.dataclass(frozen=True)
class TokensTaskSpec:
    """Learning to predict masked image tokens (Muse 2.3, 2.4, 2.6)."""

    tokenizer: str  # stage folder of the tokenizer of the predicted tokens
    low_tokenizer: str = ""  # super-resolution: stage folder of the low-resolution tokenizer
    text_dropout: float = 0.1  # share of examples without their text (guidance, section 2.7)
    label_smoothing: float = 0.0
    mask_schedule: str = "cosine"
    min_mask_ratio: float = 0.0
    visible_weight: float = 0.0  # weight of the loss on places that are not masked
    low_corruption: float = 0.0  # highest share of low-resolution tokens replaced at random
    codebook_init: bool = False  # start token embeddings as a random projection of the tokenizers' codes


TASKS = {"tokenizer": TokenizerTaskSpec, "tokens": TokensTaskSpec}

# ------------------------------------------------------------------------------------- the rest

# The usual table of `rules`: examples over `data` and `fsdp`, widths over `fsdp`, and what a layer
# holds several of over `tensor`. Configs copy it and change what they want otherwise.
RULES: Mapping[str, Any] = {
    "batch": ("data", "fsdp"),
    "tokens": None,
    "text": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "layers": None,
    "positions": None,
    "buckets": None,
    "code": None,
    "rows": None,
    "columns": None,
    "channels_in": None,
    "channels_out": "fsdp",
}


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where examples come from and what a batch holds."""

    name: str  # "scenes", "folder", "tfds", "synthetic", or "precomputed": tokens and text embeddings
    image_size: int
    path: str = ""  # folder: the folder; tfds: its data_dir
    dataset: str = ""  # tfds: name, such as "cifar10" or "oxford_flowers102:2.1.1"
    split: str = "train"
    eval_split: str = "test"
    image_key: str = "image"
    text_key: str = ""  # tfds: feature with the caption or the label
    text_length: int = 0  # tokens of text; 0: no text in the batch
    vocabulary: str = ""  # "scenes", "captions" (made from the data), "bytes", or a sentencepiece model
    crop: str = "center"  # "center" or "random"
    flip: bool = False  # random horizontal flip; not where captions say left and right
    workers: int = 0  # processes that load; 0: threads of this one
    prefetch: int = 2  # batches held ready


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer, its schedule, and what differs from it for other parameter labels."""

    name: str = "adamw"  # "adamw", "adafactor" or "muon"
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # after the warm-up: "cosine" (to final_scale), "constant" or "linear"
    final_scale: float = 0.0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # 0: off
    accumulate: int = 1  # micro-batches a step
    gradient_dtype: str = "float32"  # between the backward pass and the optimizer, and of sums over micro-batches
    ema_decay: float = 0.0  # 0: no EMA
    adam_learning_rate: float = 0.0  # muon: for what is no matrix; 0: learning_rate
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {label: {field: value}}


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each mesh axis; one of them may be -1, the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1  # slices joined over DCN, along `data`


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    steps: int
    batch_size: int  # global
    log_every: int = 50
    eval_every: int = 0  # 0: at the end only
    eval_batches: int = 4
    sample_every: int = 0  # previews of fixed prompts; 0: at the end only
    stop_after_nonfinite: int = 10  # such steps in a row that end the run
    donate: bool = True  # the new state takes the old one's memory; False keeps both
    tpu_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # XLA's, for compiling the step for TPUs


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    every_steps: int = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
    """Steps that are recorded for xprof, in the workdir."""

    start_step: int = 10
    num_steps: int = 0  # 0: none


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """The sampler settings that a stage is meant to be used with."""

    num_inference_steps: int = 24
    schedule: str = "cosine"
    guidance_scale: float = 1.0  # logits = u + s (c - u); 1 is off
    guidance_ramp: str = "linear"  # "linear": from 1 to the scale over the steps; "constant"
    token_temperature: float = 1.0
    choice_temperature: float = 4.5
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off


@dataclasses.dataclass(frozen=True)
class Spec:
    """A whole run."""

    seed: int
    task: Any  # one of TASKS' dataclasses, by the config's task.name
    model: Any  # one of MODELS' dataclasses, by the config's model.name
    data: DataSpec
    optimizer: OptimizerSpec
    mesh: MeshSpec
    rules: Mapping[str, Any]  # logical axis -> mesh axis, tuple of mesh axes, or None
    train: TrainSpec
    checkpoint: CheckpointSpec
    sample: SampleSpec
    profile: ProfileSpec = dataclasses.field(default_factory=ProfileSpec)
    frozen_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what is otherwise for frozen networks

    @property
    def rules_of_frozen(self) -> Mapping[str, Any]:
        """The rules of networks that are read and not trained."""
        return {**self.rules, **self.frozen_rules}


def from_config(config: Any) -> Spec:
    """Checks a config (a ConfigDict or nested dict) and returns its `Spec`.

    Raises:
      SpecError: naming the key, what was given, what was expected.
    """
    tree = json.loads(config.to_json_best_effort()) if hasattr(config, "to_json_best_effort") else config
    sections = {field.name for field in dataclasses.fields(Spec)}
    _check_keys(tree, sections, "config")
    task = _named(TASKS, tree.get("task", {}), "task")
    model = _named(MODELS, tree.get("model", {}), "model")
    rest = {
        "data": DataSpec,
        "optimizer": OptimizerSpec,
        "mesh": MeshSpec,
        "train": TrainSpec,
        "checkpoint": CheckpointSpec,
        "sample": SampleSpec,
        "profile": ProfileSpec,
    }
    built = {name: _build(cls, tree.get(name, {}), name) for name, cls in rest.items()}
    for name in ("rules", "frozen_rules"):
        built[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(tree.get(name, {})).items()}
    spec = Spec(seed=_convert(int, tree.get("seed", 0), "seed"), task=task, model=model, **built)
    _check_misfits(spec)
    return spec


def to_config(spec: Spec) -> dict[str, Any]:
    """The spec as a nested dict of JSON values; `from_config` reads it back to an equal spec."""
    tree = dataclasses.asdict(spec)
    for section, table in (("task", TASKS), ("model", MODELS)):
        names = {cls: name for name, cls in table.items()}
        tree[section] = {"name": names[type(getattr(spec, section))], **tree[section]}
    return json.loads(json.dumps(tree))


def _named(table: Mapping[str, type], tree: Mapping[str, Any], path: str) -> Any:
    tree = dict(tree)
    name = tree.pop("name", None)
    if name not in table:
        raise SpecError(f"{path}.name is {name!r}; expected one of {', '.join(map(repr, table))}.")
    return _build(table[name], tree, path)


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise SpecError(f"{path} is {tree!r}; expected a section with the keys of {cls.__name__}.")
    hints = typing.get_type_hints(cls)
    _check_keys(tree, set(hints), path)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in tree
    ]
    if missing:
        raise SpecError(
            f"{path} lacks {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'} to the config."
        )
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in tree.items()})


def _check_keys(tree: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"{path}.{key} is not a key of the config.{hint} Known keys: {', '.join(sorted(known))}.")


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        args = typing.get_args(hint)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise SpecError(f"{path} is {value!r}; expected a sequence.")
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise SpecError(f"{path} has {len(value)} values, {value!r}; expected {len(args)}.")
        return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is Mapping:
        return dict(value)
    if hint is Any or isinstance(hint, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SpecError(f"{path} is {value!r}, of type {type(value).__name__}; expected {hint.__name__}.")
    return value


def _one_of(value: str, allowed: Sequence[str], path: str) -> None:
    if value not in allowed:
        raise SpecError(f"{path} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _positive(section: Any, names: Sequence[str], path: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise SpecError(f"{path}.{name} is {getattr(section, name)}; expected at least 1.")


def _check_misfits(spec: Spec) -> None:
    """What can be told from the config alone."""
    _positive(spec.train, ("steps", "batch_size", "log_every"), "train")
    _positive(spec.checkpoint, ("every_steps", "keep"), "checkpoint")
    _positive(spec.data, ("image_size",), "data")
    for name in ("start_step", "num_steps"):
        if getattr(spec.profile, name) < 0:
            raise SpecError(f"profile.{name} is {getattr(spec.profile, name)}; expected at least 0.")
    _one_of(spec.data.name, ("scenes", "folder", "tfds", "synthetic", "precomputed"), "data.name")
    _one_of(spec.data.crop, ("center", "random"), "data.crop")
    _one_of(spec.optimizer.name, ("adamw", "adafactor", "muon"), "optimizer.name")
    _one_of(spec.optimizer.gradient_dtype, ("float32", "bfloat16"), "optimizer.gradient_dtype")
    _one_of(spec.optimizer.schedule, ("cosine", "constant", "linear"), "optimizer.schedule")
    if spec.train.batch_size % spec.optimizer.accumulate:
        raise SpecError(
            f"train.batch_size {spec.train.batch_size} is not a multiple of optimizer.accumulate "
            f"{spec.optimizer.accumulate}; change one of them."
        )
    for axis in (*spec.rules.values(), *spec.frozen_rules.values()):
        for name in (axis,) if isinstance(axis, str) else axis or ():
            _one_of(name, ("data", "fsdp", "tensor"), "a mesh axis in rules")
    if isinstance(spec.model, VQGANSpec):
        _check_tokenizer(spec)
    else:
        _check_transformer(spec)


def _check_tokenizer(spec: Spec) -> None:
    if not isinstance(spec.task, TokenizerTaskSpec):
        raise SpecError("model.name 'vqgan' needs task.name 'tokenizer'.")
    if spec.data.image_size % spec.model.factor:
        raise SpecError(
            f"data.image_size {spec.data.image_size} is not a multiple of the tokenizer's factor {spec.model.factor} "
            "(model.stem_patch times 2 for each channel multiplier after the first); change one of them."
        )
    _one_of(spec.task.trainable, ("all", "decoder"), "task.trainable")
    if spec.task.trainable == "decoder" and not spec.task.init_from:
        raise SpecError("task.trainable is 'decoder' but task.init_from is empty; name the trained tokenizer's folder.")
    if bool(spec.task.perceptual) != bool(spec.task.perceptual_weights):
        raise SpecError(
            f"task.perceptual is {spec.task.perceptual} and task.perceptual_weights {spec.task.perceptual_weights!r}: "
            "give the LPIPS file, or set task.perceptual=0 to train without the perceptual loss."
        )


def _check_transformer(spec: Spec) -> None:
    model = spec.model
    if not isinstance(spec.task, TokensTaskSpec):
        raise SpecError("this model predicts tokens; it needs task.name 'tokens'.")
    if model.width % model.heads:
        raise SpecError(f"model.width {model.width} is not a multiple of model.heads {model.heads}.")
    _one_of(model.attention, ("xla", "cudnn"), "model.attention")
    if model.attention == "cudnn" and model.dtype not in ("bfloat16", "float16"):
        raise SpecError(f"model.attention 'cudnn' has kernels for 16 bits only; model.dtype is {model.dtype!r}.")
    if spec.data.text_length < 1:
        raise SpecError("data.text_length is 0, but the model is conditioned on text; set the length of the prompts.")
    if not spec.task.tokenizer:
        raise SpecError(
            "task.tokenizer is empty; name the folder of a trained tokenizer (--config.task.tokenizer=DIR)."
        )
    if not model.text.trainable and not model.text.weights:
        raise SpecError("model.text is frozen but model.text.weights is empty; name its weights or make it trainable.")
    if isinstance(model, SuperResSpec):
        if not spec.task.low_tokenizer:
            raise SpecError(
                "task.low_tokenizer is empty; super-resolution needs the low-resolution tokenizer's folder."
            )
        if model.heads % 2:
            raise SpecError(f"model.heads {model.heads} is odd; multi-axis attention gives half of them to each axis.")
        for side, block in zip(model.grid, model.block, strict=True):
            if side % block:
                raise SpecError(f"model.grid {model.grid} is not a multiple of model.block {model.block}.")
