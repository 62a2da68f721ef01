"""Which tokens a run may train on: the key of what was computed ahead, and its comparison with a run's own."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from muse_jax import specs
from muse_jax.interop import folder as weights
from muse_jax.specs import SpecError
from muse_jax.training import trees


def key(spec: specs.Spec, task: Any, vocabulary: Any) -> dict[str, Any]:
    """What decides the tokens and embeddings of a picture and its text, as JSON values.

    Of a tokenizer what makes tokens counts, and not the decoder, which may be fine-tuned.
    """
    text = spec.model.text
    return {
        "tokenizers": {name: _tokenizer_digest(tokenizer) for name, tokenizer in task.tokenizers.items()},
        "image_size": spec.data.image_size,
        "crop": spec.data.crop,
        "flip": spec.data.flip,
        "text": {
            "vocabulary": _digest(vocabulary.to_json()),
            "length": spec.data.text_length,
            "encoder": _digest({**dataclasses.asdict(text), "weights": ""}),
            "weights": "" if text.trainable else _weights_digest(text.weights),
            "dtype": spec.model.dtype,
        },
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    shape = {
        name: value
        for name, value in dataclasses.asdict(tokenizer.spec).items()
        if not name.startswith(("decoder_", "discriminator_"))
    }
    params = {"encoder": tokenizer.params["encoder"], "codebook": tokenizer.params["quantizer"]["codebook"]}
    return _digest([shape, trees.fingerprints(params)])


def _weights_digest(folder: str) -> str:
    """Of the fingerprints that were written with imported weights; "" where the folder isn't, or has none."""
    if not (epath.Path(folder) / weights.PARAMS).exists():
        return ""
    found = {name: getattr(leaf, "fingerprint", None) for name, leaf in weights.open_params(folder).items()}
    return "" if None in found.values() else _digest(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check(spec: specs.Spec, task: Any, source: Any, vocabulary: Any) -> None:
    """Raises SpecError, naming what differs, if a source's tokens aren't those that this run would make."""
    expected = key(spec, task, vocabulary)
    checked = [("data", spec.data, source)]
    if spec.data.name == "mixture":  # whose sources may have crops of their own
        parts = specs.mixture_parts(spec.data)
        checked = [(f"data.sources.{label}", parts[label][1], one) for label, one in source.sources.items()]
    for path, section, one in checked:
        wanted = {**expected, "crop": section.crop, "flip": section.flip}
        differences = [*_differences(wanted, one.key, path), *_other_grid(spec.model, one.features)]
        if differences:
            raise SpecError(
                f"{path}.path was precomputed for another run: {'; '.join(differences)}. Precompute it with this "
                "config, or bring back what it was made with."
            )
        _check_text(spec, expected["text"], one.key["text"], f"{path}.path")
        if one.seed != spec.seed and (section.crop != "center" or section.flip):
            logging.warning(
                "%s.path was precomputed with seed %d, and this run's is %d: the crops are not those of its own.",
                path, one.seed, spec.seed
            )  # fmt: skip


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in sorted({*expected["tokenizers"], *found["tokenizers"]}):
        have, wanted = found["tokenizers"].get(name), expected["tokenizers"].get(name)
        if have is None:
            yield f"it has no tokens of task.{name}"
        elif wanted is not None and have != wanted:
            yield f"task.{name} is another tokenizer (fingerprint {wanted}, the tokens' is {have})"
        elif wanted is None:
            yield f"it has tokens of a {name}, and this run has none"
    for name in ("image_size", "crop", "flip"):
        if expected[name] != found[name]:
            yield f"{path}.{name} is {expected[name]!r} and was {found[name]!r}"


def _other_grid(model: Any, features: Mapping[str, Any]) -> Iterator[str]:
    """Of low-resolution tokens, which are as many as the config asks for; others' number follows from the tokenizer."""
    if isinstance(model, specs.SuperResSpec):
        rows, columns = model.low_grid
        found = math.prod(features["low_tokens"]["shape"])
        if rows * columns != found:
            yield f"model.low_grid is {rows} x {columns}, and it has {found} low-resolution tokens of a picture"


def _check_text(spec: specs.Spec, expected: Mapping[str, str], found: Mapping[str, str], path: str) -> None:
    if not spec.data.text_embeddings:
        return
    names = {
        "vocabulary": "data.vocabulary",
        "length": "data.text_length",
        "encoder": "model.text",
        "weights": "model.text.weights",
        "dtype": "model.dtype",
    }
    for part, name in names.items():
        # A run that reads embeddings needs no weights of the encoder; where they are, they are compared.
        if expected[part] != found[part] and not (part == "weights" and not expected[part]):
            raise SpecError(
                f"{path} has text embeddings of another {name}; bring back what they were made with, or set "
                "data.text_embeddings=False to compute them while training."
            )
