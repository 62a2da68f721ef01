"""T5's encoder from tensors under other names: what t5_hf and t5x share.

A format gives a function from our name of a parameter (and its layer) to its own, and says which are
transposed. Here the sizes are found, every name, shape and dtype is compared, and the parameters are
put together, layer by layer, when they are written.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import specs
from muse_jax.interop import folder, tensors
from muse_jax.interop.tensors import Tensor, WeightsError
from muse_jax.models import t5
from muse_jax.training import trees

_LAYERS = "encoder/layers/"
_EMBEDDING, _BIAS = "token_embedder/embedding", "encoder/relpos_bias/rel_embedding"
DEEPEST = 1000  # layers; the published ones have 24
_BUCKETS = 32  # of all of T5 v1.0, 1.1 and Flan
_ROWS = 4096  # of a table that are read at once
# What is small, and what every layer's result depends on, stays float32 in a bfloat16 file.
_SENSITIVE = ("scale", "rel_embedding")


@dataclasses.dataclass(frozen=True)
class Names:
    """How a format calls T5's parameters.

    Attributes:
      name: (our name, layer or None) -> its name. In a layer ours is without `encoder/layers/`.
      layer: matches the beginning of a layer's tensors; its group is the layer's number.
      transposed: (our name) -> whether its kernels are [out, in], or its table [buckets, heads].
    """

    name: Callable[[str, int | None], str]
    layer: re.Pattern[str]
    transposed: Callable[[str], bool]


def convert(
    found: Mapping[str, Tensor], names: Names, where: str, spec: specs.TextEncoderSpec | None = None
) -> folder.Converted:
    """The encoder's parameters, none of them read yet.

    Args:
      found: the encoder's tensors and no others.
      names: the format's.
      where: what the tensors are from, for messages.
      spec: from the format's config; None: the sizes are those of the tensors.

    Raises:
      WeightsError: if a tensor is missing, unknown, or has another shape than the rest imply.
    """
    spec = spec or _spec(found, names, where)
    ours = _shapes(spec)
    pieces = {name: _pieces(name, spec.layers, names) for name in ours}
    expected = {}
    for name, shape in ours.items():
        shape = shape[1:] if name.startswith(_LAYERS) else shape
        expected |= dict.fromkeys(pieces[name], shape[::-1] if names.transposed(_plain(name)) else shape)
    tensors.check(found, expected, where)
    leaves = [_leaf(name, shape, [found[p] for p in pieces[name]], names) for name, shape in ours.items()]
    model = dataclasses.asdict(spec)
    return folder.Converted(
        "text_encoder", leaves, {k: v for k, v in model.items() if k not in ("trainable", "weights")}
    )


def _spec(found: Mapping[str, Tensor], names: Names, where: str) -> specs.TextEncoderSpec:
    """The sizes that the tensors' shapes imply."""
    layers = _layers(found, names, where)
    gated = names.name("mlp/wi_0/kernel", 0) in found
    vocabulary, width = _matrix(found, names, _EMBEDDING, None, where)
    heads, buckets = _matrix(found, names, _BIAS, None, where)
    if buckets != _BUCKETS:  # a table that is transposed would be another model's
        name = names.name(_BIAS, None)
        expected = f"({_BUCKETS}, heads)" if names.transposed(_BIAS) else f"(heads, {_BUCKETS})"
        raise WeightsError(f"{where}: {name} has the shape {tuple(found[name].shape)}; expected {expected}.")
    inner = _matrix(found, names, "attention/query/kernel", 0, where)[1]
    mlp_width = _matrix(found, names, f"mlp/{'wi_0' if gated else 'wi'}/kernel", 0, where)[1]
    if inner % heads:
        name = names.name("attention/query/kernel", 0)
        raise WeightsError(f"{where}: {name} has {inner} outputs; expected a multiple of the {heads} heads.")
    return specs.TextEncoderSpec(*(vocabulary, layers, width, heads, inner // heads, mlp_width, buckets), gated=gated)


def _layers(found: Mapping[str, Tensor], names: Names, where: str) -> int:
    """How many layers the tensors' names number."""
    numbers = {match[1]: name for name in found if (match := names.layer.match(name))}
    if not numbers:
        raise WeightsError(
            f"{where} has no tensor like {names.name('attention/query/kernel', 0)}; it is no T5 encoder."
        )
    longest = max(numbers, key=len)  # Python reads no number of thousands of digits
    if len(longest) > len(str(DEEPEST)) or max(map(int, numbers)) >= DEEPEST:
        name = numbers[longest]
        raise WeightsError(f"{where} has the tensor {name[:100]}; expected layers that are numbered below {DEEPEST}.")
    return max(map(int, numbers)) + 1


def _matrix(found: Mapping[str, Tensor], names: Names, ours: str, layer: int | None, where: str) -> tuple[int, int]:
    name = names.name(ours, layer)
    if name not in found:
        raise WeightsError(f"{where} lacks the tensor {name}; expected a matrix of this name.")
    shape = tuple(found[name].shape)
    if len(shape) != 2:
        raise WeightsError(f"{where}: {name} has the shape {shape}; expected two dimensions.")
    if 0 in shape:
        raise WeightsError(f"{where}: {name} has the shape {shape}; expected sizes from 1.")
    return shape[::-1] if names.transposed(ours) else shape


def _shapes(spec: specs.TextEncoderSpec) -> dict[str, tuple[int, ...]]:
    """{our name: shape}; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    params = jax.eval_shape(t5.from_spec(spec).init, jax.random.key(0), ids, mask)["params"]
    return {name: tuple(leaf.shape) for name, leaf in trees.named_leaves(nn.unbox(params)).items()}


def _plain(name: str) -> str:
    return name.removeprefix(_LAYERS)


def _pieces(name: str, layers: int, names: Names) -> list[str]:
    """The format's tensors that make up one parameter of ours."""
    stacked = name.startswith(_LAYERS)
    return [names.name(_plain(name), i) for i in range(layers)] if stacked else [names.name(name, None)]


def _leaf(name: str, shape: tuple[int, ...], pieces: list[Tensor], names: Names) -> folder.Leaf:
    turned = names.transposed(_plain(name))

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        for piece in pieces:
            if turned or len(pieces) > 1:
                yield piece.name, _turn(piece[:], turned)
            else:
                for start in range(0, piece.shape[0], _ROWS):
                    stop = min(start + _ROWS, piece.shape[0])  # TensorStore has no room beyond
                    yield piece.name, piece[start:stop]

    # NumPy knows no common dtype of bfloat16 and float16.
    dtypes = {piece.dtype for piece in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    return folder.Leaf(name, shape, dtype, blocks, narrow=not name.endswith(_SENSITIVE))


def _turn(piece: np.ndarray, turned: bool) -> np.ndarray:
    return piece.T if turned else piece


def check_vocabulary(model: bytes, spec: Mapping[str, Any], where: str) -> bytes:
    """The SentencePiece model, if it is one that this encoder can have been trained with.

    Raises:
      WeightsError: if it is damaged, has other special ids than T5's, or more ids than the encoder.
    """
    import sentencepiece  # late: only folders that bring a vocabulary need it

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"{where} is no SentencePiece model: {error}.") from error
    if (pieces.pad_id(), pieces.eos_id()) != (0, 1):
        raise WeightsError(f"{where} has pad id {pieces.pad_id()} and end id {pieces.eos_id()}; expected 0 and 1.")
    if pieces.vocab_size() > spec["vocabulary_size"]:
        raise WeightsError(
            f"{where} has {pieces.vocab_size()} ids, but the encoder has {spec['vocabulary_size']} embeddings."
        )
    return model
