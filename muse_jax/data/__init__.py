"""Where batches come from.

`make_source` gives random access to the examples of a split, `make_loader` an endless iterator over
batches, `make_vocabulary` what turns captions to ids, and `fingerprint` a short text that changes
when the data do. Sources are imported when they are asked for, so that no run needs the libraries
of another's data.

A source has ``len(source)`` and ``source[i]``, a dict with `image` uint8 [s, s, 3], or what was precomputed
from one, and, where there is one, `text` (str) and `label` (int); ``source.captions()`` for vocabularies,
``source.class_names()`` where `spec.vocabulary` is "classes" and examples must have a label;
``source.fingerprint()``; and either ``source.example(i, seed)``, whose seed (of the run, and the example id)
draws crop, flip and caption, or ``source.batch(indices, seeds)``, the same for many examples at once.
"""

from typing import Any

from muse_jax import specs
from muse_jax.data.loader import Loader, make_loader
from muse_jax.specs import DataSpec
from muse_jax.text import vocabulary as vocabulary_lib

__all__ = ["Loader", "fingerprint", "make_loader", "make_source", "make_vocabulary"]

# The vocabulary where data.vocabulary is empty.
_VOCABULARIES = {"scenes": "scenes", "synthetic": "bytes"}  # elsewhere "captions"


def make_source(spec: DataSpec, split: str = "train") -> Any:
    """The examples of a split, by index.

    Args:
      spec: the data section of a config.
      split: "train" or "eval"; which parts of the data they are is said by `spec.split` and `spec.eval_split`.

    Raises:
      ValueError: if `spec.name` is unknown, or the data cannot be used; says why and what to do.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'.")
    if spec.name == "scenes":
        from muse_jax.data.scene_source import SceneSource

        return SceneSource(spec, split)
    if spec.name == "folder":
        from muse_jax.data.folders import FolderSource

        return FolderSource(spec, split)
    if spec.name == "tfds":
        from muse_jax.data.tfds_source import TFDSSource

        return TFDSSource(spec, split)
    if spec.name == "array_record":
        from muse_jax.data.array_record_source import ArrayRecordSource

        return ArrayRecordSource(spec, split)
    if spec.name == "synthetic":
        from muse_jax.data.synthetic import SyntheticSource

        return SyntheticSource(spec, split)
    if spec.name == "precomputed":
        from muse_jax.data.precomputed_source import PrecomputedSource

        return PrecomputedSource(spec, split)
    if spec.name == "mixture":
        from muse_jax.data.mixture import Mixture

        return Mixture(
            {label: (weight, make_source(part, split)) for label, (weight, part) in specs.mixture_parts(spec).items()}
        )
    raise ValueError(f"data.name is {spec.name!r}; expected one of {', '.join(map(repr, specs.SOURCES))}.")


def make_vocabulary(spec: DataSpec) -> vocabulary_lib.Vocabulary | None:
    """The vocabulary of `spec.vocabulary`: "scenes", "captions", "bytes", a SentencePiece model's path, or "classes".

    Empty means the one that suits the data: "scenes", "captions" for folders and TFDS, else "bytes". The captions
    of precomputed tokens are those of the data that they were made of.

    Returns:
      The vocabulary: with "classes" the names of the labels, which the batches have instead of texts. None
      if `spec.text_length` is 0 and batches have neither.

    Raises:
      SpecError: for "classes" of a source that has none.
      ValueError, OSError: if the data or the vocabulary's file cannot be used.
    """
    if spec.vocabulary == "classes":
        source = make_source(spec)
        if not hasattr(source, "class_names"):
            raise specs.SpecError(
                f"data.vocabulary is 'classes', but data.name {spec.name!r} has no classes; use 'folder' or 'tfds'."
            )
        return vocabulary_lib.ClassVocabulary(source.class_names())
    if not spec.text_length:
        return None
    name = spec.vocabulary or _VOCABULARIES.get(spec.name, "captions")
    if name == "scenes":
        from muse_jax.data import scenes

        return vocabulary_lib.WordVocabulary(scenes.WORDS)
    if name == "captions":
        source = make_source(spec)
        if stored := getattr(source, "vocabulary", None):
            return vocabulary_lib.from_json(stored)
        return vocabulary_lib.WordVocabulary.from_captions(source.captions())
    if name == "bytes":
        return vocabulary_lib.ByteVocabulary()
    return vocabulary_lib.SentencePiece.from_file(name)


def fingerprint(spec: DataSpec) -> str:
    """A short text that changes when the training data do; written into checkpoints."""
    return make_source(spec).fingerprint()
