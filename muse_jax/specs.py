"""Specs: one frozen dataclass for each section of a config.

A config (``configs/*.py``, an ``ml_collections.ConfigDict``) is turned into a `Spec` once, before
anything is compiled. Unknown keys, wrong types and misfits fail here, with the key's full name,
what was given, what was expected and what to do. The rest of the code reads specs only.
"""

import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    qk_norm: bool = False  # not T5: for encoders learned from nothing, which else do not find the order of words
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


@dataclasses.dataclass(frozen=True)
class MaskGITSpec:
    """MaskGIT (arXiv 2202.04200): masked transformer whose sequence has the class as one more token."""

    codebook_size: int
    grid: tuple[int, int]  # image tokens: rows, columns
    classes: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    qk_norm: bool = False
    relative_positions: bool = False  # a bias for each 2D offset on attention; not in MaskGIT
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"  # as for the base model
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class PaellaSpec:
    """Paella's U-Net (Rampas et al. 2022); each level has half the rows and columns of the one before."""

    codebook_size: int
    grid: tuple[int, int]  # image tokens: rows, columns; sampling may have others
    widths: tuple[int, ...]  # of the levels
    down_blocks: tuple[int, ...]  # blocks of each level on the way down
    up_blocks: tuple[int, ...]  # of each level on the way up, in the same order
    text: TextEncoderSpec
    heads: int = 0  # of the blocks' attention to the text's words; 0: none, the text is one vector
    picture_encoder: bool = False  # whether it can be conditioned on a picture instead of a text
    layer_scale: float = 1e-6  # what the residual branches are multiplied by at the start
    dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"


MODELS = {
    "vqgan": VQGANSpec,
    "base": BaseSpec,
    "superres": SuperResSpec,
    "maskgit": MaskGITSpec,
    "paella": PaellaSpec,
}

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
    text_dropout: float = 0.1  # share of examples without their text or class (guidance, section 2.7)
    label_smoothing: float = 0.0
    corruption: str = "mask"  # what stands at masked places: "mask", the mask id, or "noise", random codes (Paella)
    mask_schedule: str = "cosine"
    min_mask_ratio: float = 0.0
    visible_weight: float = 0.0  # weight of the loss on places that are not masked
    low_corruption: float = 0.0  # highest share of low-resolution tokens replaced at random
    picture_share: float = 0.0  # share of examples conditioned on their own picture instead of the text (Paella)
    codebook_init: bool = False  # start embeddings and logits from random projections of the tokenizers' codes


TASKS = {"tokenizer": TokenizerTaskSpec, "tokens": TokensTaskSpec}

# ------------------------------------------------------------------------------------- the rest

# The usual table of `rules`: examples over `data` and `fsdp`, widths over `fsdp`, and what a layer
# holds several of over `tensor`. Configs copy it and change what they want otherwise.
RULES: Mapping[str, Any] = {
    "batch": ("data", "fsdp"),
    "tokens": None,
    "text": None,
    "embed": "fsdp",
    "norm": None,  # scales are whole everywhere: what their few bytes would save is less than the wait for them
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


# Generated scenes, a folder of pictures, TFDS, what `convert` and `precompute` wrote, noise, several of them.
SOURCES = ("scenes", "folder", "tfds", "array_record", "precomputed", "synthetic", "mixture")
MADE = ("scenes", "synthetic")  # by the loader itself
LOCAL = ("folder", "array_record", "precomputed")  # which read files at random places
FILTERED = ("folder", "array_record")  # with pictures' sizes known, so that some can be left out
MOST_APART = 1e6  # a mixture's largest weight over its smallest
# What the sources of a mixture cannot have each for itself.
MIXED_ALIKE = ("sources", "image_size", "text_length", "text_embeddings", "vocabulary", "workers", "prefetch")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where examples come from and what a batch holds."""

    name: str  # one of SOURCES
    image_size: int
    path: str = ""  # folder, array_record, precomputed: the folder; tfds: its data_dir
    dataset: str = ""  # tfds: name, such as "cifar10" or "oxford_flowers102:2.1.1"
    split: str = "train"
    eval_split: str = "test"
    image_key: str = "image"
    text_key: str = ""  # tfds: feature with the caption or the label
    text_length: int = 0  # tokens of text; 0: no text in the batch
    vocabulary: str = ""  # "scenes", "captions" (made from the data), "bytes", a sentencepiece model, or "classes"
    crop: str = "center"  # "center" or "random"
    flip: bool = False  # random horizontal flip; not where captions say left and right
    min_side: int = 0  # folder, array_record: pictures whose shorter side has fewer pixels are left out
    max_aspect: float = 0.0  # folder, array_record: and those with a longer side over this times the shorter; 0: none
    most_broken: float = 0.01  # share of any 10,000 that a process reads, above which the run ends; 1: any
    text_embeddings: bool = False  # precomputed: batches have the text's embeddings; False: its ids
    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # mixture: {label: {"weight": ..., changes}}
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
    most_bytes: float = 0.0  # on a device over an even split on fsdp and tensor; 0: whatever the rules make of it


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    steps: int
    batch_size: int  # global
    log_every: int = 50
    eval_every: int = 0  # 0: at the end only
    eval_batches: int = 4
    sample_every: int = 0  # previews of fixed prompts; 0: at the end only
    # Batches (from, up to and without) that no step sees; those after them move up. For data at which the loss leaps.
    skip_batches: tuple[tuple[int, int], ...] = ()
    stop_after_nonfinite: int = 10  # such steps in a row that end the run
    compare_every: int = 1000  # steps; whether replicas are the same bits; 0: with each checkpoint only
    replay_every: int = 0  # steps; one is made twice, and has to give the same bits; 0: none is
    donate: bool = True  # the new state takes the old one's memory; False keeps both
    matmul_precision: str = ""  # jax's default_matmul_precision for the step; layers.product knows "bfloat16" on CPUs
    # XLA's, for compiling the step for TPUs; those of one kind of TPU alone stand under its `Device.device_kind`.
    tpu_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def batch_of(step: int, skipped: Iterable[Sequence[int]]) -> int:
    """The number of the batch that a step sees: the step's own, or a later one where some before it are skipped.

    >>> [batch_of(step, [(1, 3), (4, 5)]) for step in range(4)]
    [0, 3, 5, 6]
    """
    batch = step
    for first, after in sorted(skipped):
        batch += after - first if first <= batch else 0
    return batch


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    every_steps: int = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class DeadlinesSpec:
    """Seconds after which the run ends, with a message of who waits for what, instead of waiting on; 0: never."""

    start: float = 900.0  # joining the other processes, and all that belongs to no other phase
    restore: float = 1800.0
    compile: float = 7200.0
    data: float = 900.0  # waiting for a batch
    step: float = 900.0
    evaluate: float = 3600.0
    samples: float = 3600.0
    save: float = 1800.0  # a checkpoint, as far as the steps wait for it
    heartbeat: float = 60.0  # until a process of which nothing is heard counts as dead; not 0


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
    guidance_ramp: str = "linear"  # "linear": from 1 to the scale over the steps; "constant"; "power_cosine"
    guidance_power: float = 2.0  # of power_cosine
    guidance_start: float = 0.0  # shares of the steps between which there is guidance
    guidance_end: float = 1.0
    token_temperature: float = 1.0
    choice_temperature: float = 4.5
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    typical_p: float = 1.0  # locally typical sampling; 1: off
    selection_rule: str = "most_confident"  # what is masked again after a step; see sampling/selection.py
    remasking: float = 0.1  # of the rule "remask": highest share of the settled tokens at a step


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
    deadlines: DeadlinesSpec = dataclasses.field(default_factory=DeadlinesSpec)
    profile: ProfileSpec = dataclasses.field(default_factory=ProfileSpec)
    frozen_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what is otherwise for frozen networks

    @property
    def rules_of_frozen(self) -> Mapping[str, Any]:
        """The rules of networks that are read and not trained."""
        return {**self.rules, **self.frozen_rules}

    @property
    def condition_length(self) -> int:
        """Ids that a model of tokens is conditioned on: of a text, or the one of a class."""
        return 1 if isinstance(self.model, MaskGITSpec) else self.data.text_length


NAMED = {"task": TASKS, "model": MODELS}  # sections whose keys depend on their `name`
SECTIONS = {name: hint for name, hint in typing.get_type_hints(Spec).items() if dataclasses.is_dataclass(hint)}


def locked(config: Any) -> Any:
    """The ConfigDict of a config file, locked, with every key that it leaves at the specs' default.

    A flag can change only what a config holds; so all of it can be changed. Nothing is checked before flags
    have been read: `from_config` does that.
    """
    with config.unlocked():
        _fill(config, Spec)
        for name, table in NAMED.items():
            if name in config and config[name].get("name") in table:
                _fill(config[name], table[config[name].name])
    return config.lock()


def _fill(section: Any, cls: type) -> None:
    """Adds what a section of a ConfigDict leaves at the defaults of `cls`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            if field.name not in section:
                section[field.name] = {}
            _fill(section[field.name], hints[field.name])
        elif field.name not in section and field.default is not dataclasses.MISSING:
            section[field.name] = field.default
        elif field.name not in section and field.default_factory is not dataclasses.MISSING:
            section[field.name] = field.default_factory()


def check_file(file: str) -> None:
    """Raises SpecError where there can be no config."""
    if not os.path.isfile(file):
        raise SpecError(f"there is no config {file}.")
    if not file.endswith(".py"):
        raise SpecError(f"{file} is no config; name a .py file of configs/.")


def from_config(config: Any) -> Spec:
    """Checks a config (a ConfigDict or nested dict) and returns its `Spec`.

    Raises:
      SpecError: naming the key, what was given, what was expected.
    """
    spec = from_stored(config)
    _check_misfits(spec)
    return spec


def from_stored(config: Any) -> Spec:
    """The `Spec` of a run that was started once, whether or not it would be today.

    So that stages and workdirs stay of use when something else comes to be refused.

    Raises:
      SpecError: for unknown keys, missing ones and wrong types.
    """
    tree = json.loads(config.to_json_best_effort()) if hasattr(config, "to_json_best_effort") else config
    tree = _section(tree, "config")
    _check_keys(tree, {field.name for field in dataclasses.fields(Spec)}, "config")
    built = {name: _named(table, tree.get(name, {}), name) for name, table in NAMED.items()}
    built |= {name: _build(cls, tree.get(name, {}), name) for name, cls in SECTIONS.items()}
    for name in ("rules", "frozen_rules"):
        built[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in _section(tree.get(name, {}), name).items()}
    return Spec(seed=_convert(int, tree.get("seed", 0), "seed"), **built)


def to_config(spec: Spec) -> dict[str, Any]:
    """The spec as a nested dict of JSON values; `from_config` reads it back to an equal spec."""
    tree = dataclasses.asdict(spec)
    for section, table in NAMED.items():
        names = {cls: name for name, cls in table.items()}
        tree[section] = {"name": names[type(getattr(spec, section))], **tree[section]}
    return json.loads(json.dumps(tree))


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with the keys that did not exist when it was written, at their defaults.

    Raises:
      SpecError: for a key that exists no longer.
    """
    return to_config(from_stored(stored))


def _section(value: Any, path: str, keys: str = "of keys and values") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{path} is {value!r}; expected a section {keys}.")
    return dict(value)


def _named(table: Mapping[str, type], tree: Any, path: str) -> Any:
    tree = _section(tree, path)
    name = tree.pop("name", None)
    if name not in table:
        raise SpecError(f"{path}.name is {name!r}; expected one of {', '.join(map(repr, table))}.")
    return _build(table[name], tree, path)


def _build(cls: type, tree: Any, path: str) -> Any:
    tree = _section(tree, path, f"with the keys of {cls.__name__}")
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


def _one_of(value: Any, allowed: Sequence[str], path: str) -> None:
    if value not in allowed:
        raise SpecError(f"{path} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _each(section: Any, names: Sequence[str], path: str, is_right: Callable[[float], bool], expected: str) -> None:
    """Raises SpecError for the first of the numbers that isn't right; comparisons with nan are not."""
    for name in names:
        if not is_right(getattr(section, name)):
            raise SpecError(f"{path}.{name} is {getattr(section, name)}; expected {expected}.")


def _positive(section: Any, names: Sequence[str], path: str) -> None:
    _each(section, names, path, lambda value: value >= 1, "at least 1")


def _not_negative(section: Any, names: Sequence[str], path: str) -> None:
    _each(section, names, path, lambda value: 0 <= value < math.inf, "at least 0, and finite")


def _share(section: Any, names: Sequence[str], path: str) -> None:
    _each(section, names, path, lambda value: 0 <= value <= 1, "a share, 0 to 1")


def _below_one(section: Any, names: Sequence[str], path: str) -> None:
    _each(section, names, path, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _check_options(options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(value, Mapping) != key.startswith("TPU "):
            raise SpecError(
                f"train.tpu_options has {key!r}: {value!r}; expected XLA's options with a value each, and under a kind "
                "of TPU as jax names it ('TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite') a section of those for it."
            )


def _check_skipped(skipped: Sequence[Sequence[int]]) -> None:
    ends = [end for first_and_after in sorted(skipped) for end in first_and_after]
    if ends and (ends[0] < 0 or any(a >= b for a, b in itertools.pairwise(ends))):
        raise SpecError(
            f"train.skip_batches is {tuple(skipped)!r}; expected pairs (first, after), each first below its after, "
            "that don't touch, such as ((1000, 1200),)."
        )


def _check_numbers(spec: Spec) -> None:
    """Those with which a run would fail late, or train nonsense in silence."""
    _positive(spec.train, ("steps", "batch_size", "log_every"), "train")
    _not_negative(spec.train, ("eval_every", "eval_batches", "sample_every", "compare_every", "replay_every"), "train")
    _check_options(spec.train.tpu_options)
    _check_skipped(spec.train.skip_batches)
    _positive(spec.checkpoint, ("every_steps", "keep"), "checkpoint")
    _not_negative(spec.deadlines, [field.name for field in dataclasses.fields(spec.deadlines)], "deadlines")
    _positive(spec.deadlines, ("heartbeat",), "deadlines")
    _not_negative(spec.profile, ("start_step", "num_steps"), "profile")
    if spec.profile.num_steps and spec.profile.start_step >= spec.train.steps:
        raise SpecError(
            f"profile.start_step is {spec.profile.start_step}, but the run ends at train.steps {spec.train.steps}, and "
            "nothing would be recorded; set it to an earlier step."
        )
    if not 0 <= spec.seed < 2**63:
        raise SpecError(f"seed is {spec.seed}; expected at least 0 and less than 2**63.")
    _positive(spec.mesh, ("slices",), "mesh")
    _positive(spec.optimizer, ("accumulate",), "optimizer")
    _below_one(spec.optimizer, ("ema_decay",), "optimizer")
    _check_optimizers(spec.optimizer)
    _check_sizes(spec.model, "model")
    if isinstance(spec.task, TokensTaskSpec):
        shares = ("text_dropout", "min_mask_ratio", "low_corruption", "picture_share")
        _share(spec.task, shares, "task")
        _below_one(spec.task, ("label_smoothing",), "task")
        _not_negative(spec.task, ("visible_weight",), "task")
    else:
        weights = ("reconstruction", "codebook", "commitment", "perceptual", "adversarial")
        steps = ("adversarial_start", "adversarial_warmup", "revive_after")
        _not_negative(spec.task, (*weights, *steps), "task")
    if not isinstance(spec.model, VQGANSpec):
        _below_one(spec.model, ("dropout",), "model")
    if hasattr(spec.model, "text"):
        _below_one(spec.model.text, ("dropout",), "model.text")


def label_spec(spec: OptimizerSpec, label: str) -> OptimizerSpec:
    """The optimizer section as it is for one label.

    Raises:
      SpecError: for a field that doesn't exist, that can't differ by label, or of the wrong type.
    """
    shared = ("overrides", "accumulate", "ema_decay", "gradient_dtype")
    fields = {f.name: f.type for f in dataclasses.fields(spec) if f.name not in shared}
    changes = _section(spec.overrides.get(label, {}), f"optimizer.overrides.{label}", "with keys of OptimizerSpec")
    for key, value in changes.items():
        path = f"optimizer.overrides.{label}.{key}"
        if key not in fields:
            raise SpecError(f"{path} can't be set; known keys: {', '.join(sorted(fields))}.")
        wanted = type(getattr(spec, key))
        if wanted is float and type(value) is int:
            changes[key] = value = float(value)
        if type(value) is not wanted:
            raise SpecError(f"{path} is {value!r}, of type {type(value).__name__}; expected {wanted.__name__}.")
    return dataclasses.replace(spec, overrides={}, **changes)


def _check_optimizers(spec: OptimizerSpec) -> None:
    """The settings that every label has for itself; that there are such labels only the parameters know."""
    sections = {f"optimizer.overrides.{label}": label_spec(spec, label) for label in spec.overrides}
    sections = {"optimizer": spec, **sections}
    for path, section in sections.items():
        _one_of(section.name, ("adamw", "adafactor", "muon"), f"{path}.name")
        _one_of(section.schedule, ("cosine", "constant", "linear"), f"{path}.schedule")
        rates = ("learning_rate", "adam_learning_rate", "final_scale", "warmup_steps", "weight_decay", "clip_norm")
        _not_negative(section, rates, path)
        _below_one(section, ("b1", "b2"), path)


def _check_sizes(section: Any, path: str) -> None:
    """A model's numbers and words, each by itself."""
    for field in dataclasses.fields(section):
        name, value = field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_sizes(value, f"{path}.{name}")
        elif name in ("decoder_channels", "decoder_res_blocks") or (
            name == "heads" and isinstance(section, PaellaSpec)
        ):
            _not_negative(section, (name,), path)
        elif type(value) is int:
            _positive(section, (name,), path)
        elif isinstance(value, tuple) and not (value and min(value) >= 1):
            raise SpecError(f"{path}.{name} is {value}; expected numbers of at least 1.")
        elif name == "dtype":
            _one_of(value, ("float32", "bfloat16", "float16"), f"{path}.dtype")
        elif name == "remat" and value not in ("none", "full"):
            _check_remat(value, path)
    if isinstance(section, PaellaSpec):
        _not_negative(section, ("layer_scale",), path)
    if isinstance(section, TextEncoderSpec):
        _check_positions(section, path)


def _check_positions(text: TextEncoderSpec, path: str) -> None:
    """A quarter of the buckets have a distance each; the next ones grow from there to the largest."""
    _each(text, ("position_buckets",), path, lambda value: value >= 4, "at least 4")
    exact = text.position_buckets // 4
    _each(text, ("position_max_distance",), path, lambda value: value > exact,
          f"more than {exact}, a quarter of {path}.position_buckets")  # fmt: skip


def _check_remat(value: str, path: str) -> None:
    import jax  # for the few configs that name one; reading a config needs it for nothing else

    policy = None if value.startswith("_") else getattr(jax.checkpoint_policies, value, None)
    # A policy is asked with any operation's parameters; what takes no such keywords makes one from arguments.
    kinds = [] if policy is None else [p.kind for p in inspect.signature(policy).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise SpecError(
            f"{path}.remat is {value!r}; expected 'none', 'full' or the name of a policy in jax.checkpoint_policies, "
            "not of a function that makes one."
        )


def _check_misfits(spec: Spec) -> None:
    """What can be told from the config alone."""
    _check_numbers(spec)
    _check_data(spec.data)
    _one_of(spec.optimizer.gradient_dtype, ("float32", "bfloat16"), "optimizer.gradient_dtype")
    _one_of(spec.train.matmul_precision, ("", "bfloat16", "tensorfloat32", "float32"), "train.matmul_precision")
    if spec.train.batch_size % spec.optimizer.accumulate:
        raise SpecError(
            f"train.batch_size {spec.train.batch_size} is not a multiple of optimizer.accumulate "
            f"{spec.optimizer.accumulate}; change one of them."
        )
    for rules in ("rules", "frozen_rules"):
        for key, axis in getattr(spec, rules).items():
            for name in axis if isinstance(axis, tuple) else () if axis is None else (axis,):
                _one_of(name, ("data", "fsdp", "tensor"), f"{rules}.{key}, a mesh axis or several,")
    if isinstance(spec.model, VQGANSpec):
        _check_tokenizer(spec)
    else:
        _check_predictor(spec)


def mixture_parts(data: DataSpec) -> dict[str, tuple[float, DataSpec]]:
    """{label: (weight, data section)} of a mixture's sources, which have what they don't change from `data`.

    Raises:
      SpecError: if there is no source, or one has no sound weight, is no data section, is a mixture itself, or changes
        what a batch has in common.
    """
    if not data.sources:
        raise SpecError("data.name is 'mixture' and data.sources is empty; a mixture has sources: give at least one.")
    parts = {}
    for label, tree in data.sources.items():
        path = f"data.sources.{label}"
        changes = _section(tree, path, "with a weight and keys of DataSpec")
        if "weight" not in changes:
            raise SpecError(f"{path}.weight is missing; give each source of a mixture its weight.")
        weight = _convert(float, changes.pop("weight"), f"{path}.weight")
        if not 0 < weight < math.inf:
            raise SpecError(f"{path}.weight is {weight}; expected a positive number.")
        for key in MIXED_ALIKE:
            if key in changes:
                raise SpecError(f"{path}.{key} is set, but a batch has one data.{key}; set that.")
        shared = {**dataclasses.asdict(data), "sources": {}, "min_side": 0, "max_aspect": 0.0}
        parts[label] = weight, _build(DataSpec, {**shared, **changes}, path)
        if parts[label][1].name == "mixture":
            known = ", ".join(repr(name) for name in SOURCES if name != "mixture")
            raise SpecError(f"{path}.name is 'mixture'; a mixture has no mixture in it. Expected one of {known}.")
    weights = [weight for weight, _ in parts.values()]
    if max(weights) / MOST_APART > min(weights):
        raise SpecError(
            f"data.sources have weights from {min(weights)} to {max(weights)}; expected none to be over "
            f"{MOST_APART:,.0f} times another. Leave out a source that would hardly ever come."
        )
    return parts


def is_precomputed(data: DataSpec) -> bool:
    """Whether batches have tokens in the place of pictures."""
    if data.name == "mixture":
        return all(is_precomputed(part) for _, part in mixture_parts(data).values())
    return data.name == "precomputed"


def _check_data(data: DataSpec, path: str = "data") -> None:
    _positive(data, ("image_size",), path)
    _not_negative(data, ("text_length", "min_side", "workers", "prefetch"), path)
    _share(data, ("most_broken",), path)
    _one_of(data.name, SOURCES, f"{path}.name")
    _one_of(data.crop, ("center", "random"), f"{path}.crop")
    if data.path and data.name in MADE and path == "data":  # a mixture's sources have its path, whether they need one
        raise SpecError(
            f"{path}.path is {data.path!r}, but {path}.name {data.name!r} reads no files. "
            "For a folder of pictures take configs/pictures (quickstart: --configs=configs/pictures); else unset it."
        )
    if data.name in LOCAL and "://" in data.path:
        raise SpecError(
            f"{path}.path is {data.path!r}, but {path}.name {data.name!r} reads files at random places, which a bucket "
            "gives through a mount only: mount it (gcsfuse; launch/README.md does), and name the folder there."
        )
    if data.sources and data.name != "mixture":
        raise SpecError(
            f"{path}.name is {data.name!r} and {path}.sources has {len(data.sources)} entries; "
            "a mixture has sources, everything else has none."
        )
    if data.name == "mixture":
        for label, (_, part) in mixture_parts(data).items():
            _check_data(part, f"data.sources.{label}")
        if data.min_side or data.max_aspect:
            raise SpecError(f"{path}.min_side and {path}.max_aspect are set; set them in the mixture's sources.")
        return
    if (data.min_side or data.max_aspect) and data.name not in FILTERED:
        raise SpecError(
            f"{path}.min_side and {path}.max_aspect filter {' and '.join(map(repr, FILTERED))}, not {data.name!r}; "
            "set them to 0, or filter with muse_jax.convert. Precomputed tokens were filtered when they were made."
        )
    if data.max_aspect and not data.max_aspect >= 1:
        raise SpecError(
            f"{path}.max_aspect is {data.max_aspect}; a longer side is at least once the shorter. Set 0 for no filter."
        )
    if data.text_embeddings and data.name != "precomputed":
        raise SpecError(f"{path}.text_embeddings is set, but only {path}.name='precomputed' has them; unset it.")


def _check_tokenizer(spec: Spec) -> None:
    if is_precomputed(spec.data):
        raise SpecError("data.name 'precomputed' has tokens, not the pictures that a tokenizer learns from; change it.")
    if not isinstance(spec.task, TokenizerTaskSpec):
        raise SpecError("model.name 'vqgan' needs task.name 'tokenizer'.")
    if spec.data.image_size % spec.model.factor:
        raise SpecError(
            f"data.image_size {spec.data.image_size} is not a multiple of the tokenizer's factor {spec.model.factor} "
            "(model.stem_patch times 2 for each channel multiplier after the first); change one of them."
        )
    _one_of(spec.model.normalization, ("group", "layer"), "model.normalization")
    _check_groups(spec.model)
    _one_of(spec.task.trainable, ("all", "decoder"), "task.trainable")
    if spec.task.trainable == "decoder" and not spec.task.init_from:
        raise SpecError("task.trainable is 'decoder' but task.init_from is empty; name the trained tokenizer's folder.")
    if spec.task.adversarial and spec.data.image_size < 2**spec.model.discriminator_layers:
        raise SpecError(
            f"model.discriminator_layers is {spec.model.discriminator_layers}, each of which halves the sides of "
            f"pictures, but data.image_size is {spec.data.image_size}; expected at most "
            f"{spec.data.image_size.bit_length() - 1}."
        )
    if bool(spec.task.perceptual) != bool(spec.task.perceptual_weights):
        raise SpecError(
            f"task.perceptual is {spec.task.perceptual} and task.perceptual_weights {spec.task.perceptual_weights!r}: "
            "give both, or set task.perceptual=0 and task.perceptual_weights='' to train without the perceptual loss."
        )


def _check_groups(model: VQGANSpec) -> None:
    for channels in (model.channels, model.decoder_channels or model.channels):
        for multiplier in model.channel_multipliers if model.normalization == "group" else ():
            if channels * multiplier > 32 and channels * multiplier % 32:
                raise SpecError(
                    f"model.normalization is 'group', of 32 groups, but {channels} times {multiplier} channels are no "
                    "multiple of 32; change model.channels or model.decoder_channels, or take 'layer'."
                )


def _check_predictor(spec: Spec) -> None:
    model = spec.model
    if not isinstance(spec.task, TokensTaskSpec):
        raise SpecError("this model predicts tokens; it needs task.name 'tokens'.")
    if isinstance(model, PaellaSpec):
        _check_paella(spec)
    else:
        _check_transformer(spec)
    if not spec.task.tokenizer:
        raise SpecError(
            "task.tokenizer is empty; name the folder of a trained tokenizer (--config.task.tokenizer=DIR)."
        )
    _check_condition(spec)


def _check_paella(spec: Spec) -> None:
    model = spec.model
    if spec.task.corruption != "noise":
        raise SpecError(f"task.corruption is {spec.task.corruption!r}, but Paella has no mask id; set it to 'noise'.")
    if not len(model.widths) == len(model.down_blocks) == len(model.up_blocks) > 0:
        raise SpecError(
            f"model.widths {model.widths}, model.down_blocks {model.down_blocks} and model.up_blocks {model.up_blocks} "
            "say different numbers of levels; give one number for each level in all three."
        )
    for name in ("widths", "down_blocks", "up_blocks"):
        if min(getattr(model, name)) < 1:
            raise SpecError(f"model.{name} is {getattr(model, name)}; expected at least 1 for each level.")
    if min(model.grid) < 2 ** len(model.widths):
        raise SpecError(
            f"model.grid is {model.grid}, but of {len(model.widths)} levels the coarsest has two rows and columns only "
            f"with {2 ** len(model.widths)} of each; take a larger grid or fewer levels."
        )
    for width in model.widths if model.heads else ():
        if width % model.heads:
            raise SpecError(f"model.widths {model.widths} are not all multiples of model.heads {model.heads}.")
    if spec.task.picture_share and not model.picture_encoder:
        raise SpecError("task.picture_share needs an encoder of pictures; set model.picture_encoder=True.")


def _check_transformer(spec: Spec) -> None:
    model = spec.model
    if spec.task.corruption != "mask":
        raise SpecError(f"task.corruption is {spec.task.corruption!r}; the transformers need 'mask'.")
    if spec.task.picture_share:
        raise SpecError("task.picture_share is of Paella alone; the transformers read texts.")
    if model.width % model.heads:
        raise SpecError(f"model.width {model.width} is not a multiple of model.heads {model.heads}.")
    _one_of(model.attention, ("xla", "cudnn"), "model.attention")
    if model.attention == "cudnn" and model.dtype not in ("bfloat16", "float16"):
        raise SpecError(f"model.attention 'cudnn' has kernels for 16 bits only; model.dtype is {model.dtype!r}.")
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


def _check_condition(spec: Spec) -> None:
    """What the model is conditioned on must be in the batches."""
    model, data = spec.model, spec.data
    if isinstance(model, MaskGITSpec):
        _positive(model, ("classes",), "model")
        if data.vocabulary != "classes" or data.text_length:
            raise SpecError(
                f"data.vocabulary is {data.vocabulary!r} and data.text_length {data.text_length}, but the model is "
                "conditioned on classes; set data.vocabulary='classes' and data.text_length=0."
            )
        return
    if data.text_length < 1:
        raise SpecError("data.text_length is 0, but the model is conditioned on text; set the length of the prompts.")
    if data.vocabulary == "classes":
        raise SpecError("data.vocabulary is 'classes', but the model is conditioned on text; use model.name='maskgit'.")
    if not model.text.trainable and not model.text.weights:
        raise SpecError("model.text is frozen but model.text.weights is empty; name its weights or make it trainable.")
    if data.text_embeddings and model.text.trainable:
        raise SpecError("data.text_embeddings is set, but model.text is trained, and its embeddings change; unset it.")
