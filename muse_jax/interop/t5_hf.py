"""T5 encoders from Hugging Face folders: T5 1.1, Flan and v1.0, the whole model or its encoder alone.

Read are `config.json`, `model.safetensors` or the files that `model.safetensors.index.json` lists,
and `spiece.model` if it is there. A `pytorch_model.bin` is read only where there is no safetensors.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from muse_jax import specs
from muse_jax.interop import folder, t5, tensors
from muse_jax.interop.tensors import Tensor, WeightsError

_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_TWIN = "encoder.embed_tokens.weight"  # a second name of the embedding in some files
_GATED = {"gated-gelu": True, "relu": False}
_EPSILON = 1e-6  # of our norms
_SIZES = ("num_layers", "d_model", "num_heads", "d_kv", "d_ff")  # in our spec's order, after the vocabulary's


def _name(ours: str, layer: int | None) -> str:
    first = f"encoder.block.{layer or 0}.layer."
    part = ours.split("/")
    if part[0] == "attention":
        return f"{first}0.SelfAttention.{_ATTENTION[part[1]]}.weight"
    if part[0] == "mlp":
        return f"{first}1.DenseReluDense.{part[1]}.weight"
    return {
        "token_embedder/embedding": "shared.weight",
        "encoder/relpos_bias/rel_embedding": f"{first}0.SelfAttention.relative_attention_bias.weight",
        "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
        "pre_attention_layer_norm/scale": f"{first}0.layer_norm.weight",
        "pre_mlp_layer_norm/scale": f"{first}1.layer_norm.weight",
    }[ours]


NAMES = t5.Names(
    name=_name,
    layer=re.compile(r"encoder\.block\.(\d+)\."),
    transposed=lambda ours: ours.endswith(("kernel", "rel_embedding")),
)


def convert(path: str) -> folder.Converted:
    """The encoder in a Hugging Face folder, or in one file of it.

    Raises:
      WeightsError: if it is not a T5 encoder, or damaged; the message names the tensor.
    """
    place = epath.Path(path)
    if not place.exists():
        raise WeightsError(f"there is no {path}; name a folder with config.json and model.safetensors.")
    files = _tensors(place) if place.is_dir() else tensors.open_file(place)
    where = place if place.is_dir() else place.parent
    spec = _spec(where / "config.json", files) if (where / "config.json").exists() else None
    converted = t5.convert(_encoder(files, path), NAMES, path, spec)
    words = where / folder.VOCABULARY
    if words.exists():
        model = t5.check_vocabulary(words.read_bytes(), converted.model, str(words))
        converted = dataclasses.replace(converted, vocabulary=model)
    return converted


def _tensors(place: epath.Path) -> dict[str, Any]:
    """The tensors of the folder's files, the first kind that is there."""
    for name in _FILES:
        if (place / name).exists():
            return tensors.open_file(place / name)
        if (place / (name + _INDEX)).exists():
            return _sharded(place, name + _INDEX)
    found = sorted(file.name for file in place.iterdir())[:10]
    raise WeightsError(f"{place} has neither {' nor '.join(_FILES)}, whole or in parts; found {', '.join(found)}.")


def _sharded(place: epath.Path, index: str) -> dict[str, Any]:
    """The tensors that an index lists, each from the file that it names."""
    try:
        listed: Mapping[str, str] = json.loads((place / index).read_text())["weight_map"]
        strange = [tensor for tensor, file in listed.items() if not isinstance(file, str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{place / index} is damaged: {error!r}.") from error
    if strange:
        found = listed[strange[0]]
        raise WeightsError(f"{place / index} has {strange[0]} in the file {found!r}; expected a file's name.")
    merged: dict[str, Any] = {}
    for name in sorted(set(listed.values())):
        if "/" in name or "\\" in name or name.startswith("."):
            raise WeightsError(f"{place / index} names the file {name!r}; expected one in the same folder.")
        owned = sorted(tensor for tensor, file in listed.items() if file == name)
        if not (place / name).exists():
            raise WeightsError(f"{place} lacks {name}, which has the tensor {owned[0]}; found no such file.")
        held = tensors.open_file(place / name)
        for tensor in owned:
            if tensor not in held:
                raise WeightsError(f"{place / name} lacks the tensor {tensor}, which {index} expects there.")
            merged[tensor] = held[tensor]
    return merged


def _encoder(files: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The encoder's tensors of a model: without the decoder's, and the embedding once."""
    kept = {name: t for name, t in files.items() if not name.startswith(("decoder.", "lm_head."))}
    twin = kept.pop(_TWIN, None)
    if twin is not None and "shared.weight" not in kept:
        kept["shared.weight"] = twin
    elif twin is not None and tuple(twin.shape) != tuple(kept["shared.weight"].shape):
        raise WeightsError(
            f"{where}: {_TWIN} has the shape {tuple(twin.shape)}; "
            f"expected shared.weight's {tuple(kept['shared.weight'].shape)}."
        )
    return kept


def _spec(path: epath.Path, files: Mapping[str, Tensor]) -> specs.TextEncoderSpec:
    """The encoder's sizes by config.json."""
    config = _read(path)
    if config.get("model_type") != "t5":
        raise WeightsError(f"{path} has the model_type {config.get('model_type')!r}; expected 't5'.")
    activation = config.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation not in _GATED:
        raise WeightsError(f"{path} has the feed_forward_proj {activation!r}; expected {list(_GATED)}.")
    if config.get("layer_norm_epsilon", _EPSILON) != _EPSILON:
        raise WeightsError(f"{path} has layer_norm_epsilon {config['layer_norm_epsilon']}; expected 1e-6.")
    sizes = {name: _size(config, name, path) for name in ("vocab_size", *_SIZES)}
    buckets = _size(config, "relative_attention_num_buckets", path, 32, least=4)
    distance = _size(config, "relative_attention_max_distance", path, 128)
    if distance <= buckets // 4:
        raise WeightsError(
            f"{path} has relative_attention_max_distance {distance}; expected more than a quarter of the {buckets} "
            "buckets, which hold a distance each."
        )
    if sizes["num_layers"] > t5.DEEPEST:
        raise WeightsError(f"{path} has num_layers {sizes['num_layers']}; expected at most {t5.DEEPEST}.")
    # The embedding may have more rows than config.json says: some models are padded after it is written.
    embedding = files.get("shared.weight", files.get(_TWIN))
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    return specs.TextEncoderSpec(
        *(max(sizes["vocab_size"], rows), *(sizes[name] for name in _SIZES)),
        position_buckets=buckets,
        position_max_distance=distance,
        gated=_GATED[activation],
    )


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}; expected a model's settings by name.")
    return config


def _size(config: Mapping[str, Any], name: str, path: epath.Path, default: int | None = None, least: int = 1) -> int:
    value = config.get(name, default)
    if type(value) is not int or not least <= value < 2**31:
        found = f"has {name} {value!r}" if name in config else f"lacks {name}"
        raise WeightsError(f"{path} {found}; expected a whole number from {least}, below 2^31.")
    return value
