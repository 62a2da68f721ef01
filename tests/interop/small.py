"""Small T5s: their sizes, prompts and embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax import serialization

from muse_jax import specs
from muse_jax.interop import folder
from muse_jax.models import t5
from muse_jax.training import trees

# Sizes that differ from one another, so that no transposition goes unseen.
SIZES = {"vocab_size": 61, "d_model": 24, "d_kv": 10, "num_heads": 3, "d_ff": 44, "num_layers": 3}
IDS = np.array([[3, 7, 60, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [4, 9, 9, 9, 2, 11, 5]], np.int32)  # the second: ""
IDS = np.pad(IDS, [(0, 0), (0, 150)], mode="wrap") * (np.arange(157) < [[4], [1], [150]])  # beyond the last bucket
MASK = IDS > 0


def our_embeddings(path, ids=IDS, mask=MASK, dtype="float32"):
    """What our encoder makes of the prompts, with the weights of an imported folder."""
    spec = folder.text_encoder_spec(path)
    params = trees.nest({name: jnp.asarray(leaf[()]) for name, leaf in folder.open_params(path).items()})
    encoder = t5.from_spec(spec, dtype=dtype)
    return np.asarray(jax.jit(encoder.apply)({"params": params}, ids, mask))


def relative_error(got, want, mask=MASK):
    """The largest error of a visible position's embedding, relative to that embedding's length."""
    got, want = np.asarray(got, np.float64)[mask], np.asarray(want, np.float64)[mask]
    return np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1))


def spec_of(sizes=SIZES, gated=True):
    """Our spec of the sizes."""
    names = ("vocab_size", "num_layers", "d_model", "num_heads", "d_kv", "d_ff")
    return specs.TextEncoderSpec(*(sizes[name] for name in names), gated=gated)


def our_params(spec=None, seed=0):
    """Random parameters of ours, {name: array}."""
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(t5.from_spec(spec or spec_of()).init, jax.random.key(0), ids, ids > 0)["params"]
    rng = np.random.default_rng(seed)
    unboxed = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda x: hasattr(x, "names"))
    return {n: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for n, leaf in trees.named_leaves(unboxed).items()}


def write_t5x(path, params, dtype="float32", held=()):
    """Writes our parameters as T5X lays its checkpoints out.

    One gzipped zarr array a parameter, in several chunks, and a msgpack tree with TensorStore's specs, or the arrays
    themselves where a name is in `held`; beside the encoder there are a decoder and the optimizer's state.
    """
    target = {}
    for name, value in params.items():
        if name.startswith("encoder/layers/"):
            for i, layer in enumerate(value):
                target[f"encoder/layers_{i}/" + name.removeprefix("encoder/layers/")] = layer
        else:
            target[name] = value
    target["decoder/decoder_norm/scale"] = np.ones(3, np.float32)
    tree = {"target": {}, "state": {"step": np.int32(7), "param_states": {"decoder_norm": np.zeros(3, np.float32)}}}
    for name, value in target.items():
        *folders, last = name.split("/")
        node = tree["target"]
        for key in folders:
            node = node.setdefault(key, {})
        spec = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": "target." + name.replace("/", ".")},
            "metadata": {
                "compressor": {"id": "gzip"},
                "shape": list(value.shape),
                "chunks": [-(-size // 2) for size in value.shape],
            },
        }
        node[last] = value if name in held else spec
        if name not in held:
            store = {**spec, "kvstore": {"driver": "file", "path": f"{path}/target.{name.replace('/', '.')}"}}
            array = tensorstore.open(store, create=True, open=True).result()
            array.write(np.asarray(value, array.dtype.numpy_dtype)).result()
    path.mkdir(parents=True, exist_ok=True)
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize({"version": 3, "optimizer": tree}))
