"""Vocabularies: prompts to token ids.

All have the same few methods. Id 0 is padding everywhere, ``""`` becomes no tokens at all (the mask
is False everywhere, which is also what a dropped prompt looks like), and any Python string is a
valid prompt: it is cleaned before it is split.

  >>> words = WordVocabulary(["a", "circle", "red"])
  >>> ids, mask = words.encode("A red, red dragon", 8)
  >>> ids.tolist()
  [2, 4, 1, 4, 1, 0, 0, 0]
  >>> words.unknown("A red, red dragon")
  [',', 'dragon']
"""

import abc
import base64
import collections
import difflib
import functools
import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, Int32

PAD = 0
MAX_CHARACTERS = 10_000  # of a prompt; what comes after is not read
MAX_WORDS = 8192  # of a vocabulary made from captions
_CLASSES_SHOWN = 30
_CACHED_CHARACTERS = 500  # longer captions are rarely seen twice, and would fill the memory

_ASCII_TOKEN = re.compile(r"[a-z0-9_]+|[^\sa-z0-9_]")
_SPACES = re.compile(r"\s+")


def clean(text: str) -> str:
    """The text as every vocabulary reads it.

    Surrogate pairs are joined and lone ones become U+FFFD; NUL, control characters and byte order
    marks go, line breaks and tabs become spaces; NFC; at most `MAX_CHARACTERS` characters.

      >>> clean("caf" + "e" + chr(0x301) + chr(0) + chr(10) + " bar" + chr(0xD800))
      'café bar�'

    Raises:
      TypeError: if `text` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"A prompt must be a string; got {text!r}, of type {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        logging.warning("A prompt of %d characters is cut to its first %d.", len(text), MAX_CHARACTERS)
        text = text[:MAX_CHARACTERS]
    if not (text.isascii() and text.isprintable()):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or not _is_control(c))
        text = unicodedata.normalize("NFC", text)
    return _SPACES.sub(" ", text).strip()


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character == "\ufeff"


def split_words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks or symbols of a text."""
    text = clean(text).lower()
    if text.isascii():
        return _ASCII_TOKEN.findall(text)
    # Joiners and direction marks (Cf) are not seen and end no word; without them marks can join letters.
    text = unicodedata.normalize("NFC", "".join(c for c in text if unicodedata.category(c) != "Cf"))
    tokens, word = [], ""
    for character in text + " ":
        if unicodedata.category(character)[0] in "LNM" or character == "_":  # marks complete a letter
            word += character
            continue
        if word:
            tokens.append(word)
        word = ""
        if not character.isspace():
            tokens.append(character)
    return tokens


class Vocabulary(abc.ABC):
    """What turns a prompt into ids."""

    kind: str  # its name in `to_json`
    _warned = False

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of ids, padding included; every id is below it."""

    @abc.abstractmethod
    def tokens(self, text: str) -> list[int]:
        """The ids of a text, however many; [] for an empty one."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """A text with these ids; padding is left out."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs to make an equal vocabulary on any machine."""

    def unknown(self, text: str) -> list[str]:
        """Words of the text that have no id of their own, each once."""
        del text
        return []

    def encode(self, text: str, length: int) -> tuple[Int32[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Ids and mask of a text, cut or padded to `length`.

        Returns:
          ids: int32 [length], 0 after the text's end.
          mask: bool [length], True on the text; False everywhere for an empty text.
        """
        ids, mask = self.encode_batch([text], length)
        return ids[0], mask[0]

    def encode_batch(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        """`encode` of many texts, stacked."""
        ids = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), np.bool_)
        for row, text in enumerate(texts):
            found = self.tokens(text)
            if len(found) > length:
                self._report_cut(text, len(found), length)
                found = self._cut(found, length)
            ids[row, : len(found)] = found
            mask[row, : len(found)] = True
        return ids, mask

    def _cut(self, ids: list[int], length: int) -> list[int]:
        return ids[:length]

    def _report_cut(self, text: str, count: int, length: int) -> None:
        level = logging.debug if self._warned else logging.warning  # a data set may be full of long captions
        level("A prompt of %d tokens is cut to %d (data.text_length): %.80r", count, length, text)
        self._warned = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.kind, self.size))


class WordVocabulary(Vocabulary):
    """Whole words, lower-cased, punctuation split off: id 0 padding, 1 unknown, then the words.

    Args:
      words: in the order of their ids; each must be one token of `split_words`.
    """

    kind = "words"
    UNKNOWN = 1

    def __init__(self, words: Iterable[str]):
        self.words = tuple(words)
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = [word for word, n in collections.Counter(self.words).items() if n > 1]
            raise ValueError(f"Words of a vocabulary must differ; twice there: {', '.join(map(repr, twice[:5]))}.")
        for word in self.words:
            if split_words(word) != [word]:
                raise ValueError(f"{word!r} is not one lower-case word, so no prompt could ever have it.")
        self._cached_tokens = functools.lru_cache(maxsize=1 << 16)(self._tokens)

    @classmethod
    def from_captions(cls, captions: Iterable[str], limit: int = MAX_WORDS) -> "WordVocabulary":
        """The most frequent words of captions; equally frequent ones in alphabetical order.

        Raises:
          ValueError: if the captions have no word at all.
        """
        counts = collections.Counter(word for caption in captions for word in split_words(caption))
        if not counts:
            raise ValueError("The captions have no words to make a vocabulary from.")
        # A word that would be split another way when read again could never be found.
        ranked = sorted((w for w in counts if split_words(w) == [w]), key=lambda word: (-counts[word], word))
        if len(ranked) > limit:
            logging.warning("The captions have %d different words; the %d most frequent are kept.", len(ranked), limit)
        return cls(ranked[:limit])

    @property
    def size(self) -> int:
        return len(self.words) + 2

    def tokens(self, text: str) -> list[int]:
        return list(self._cached_tokens(text) if len(text) < _CACHED_CHARACTERS else self._tokens(text))

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids.get(word, self.UNKNOWN) for word in split_words(text))

    def unknown(self, text: str) -> list[str]:
        return list(dict.fromkeys(word for word in split_words(text) if word not in self._ids))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return " ".join("<unknown>" if i == self.UNKNOWN else self.words[i - 2] for i in map(int, ids) if i != PAD)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "words": list(self.words)}

    def __reduce__(self):
        return WordVocabulary, (self.words,)  # the cache of a loading process is its own


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, numbered as in ByT5 and seqio: 0 padding, 1 end, 2 unknown, byte b is b + 3.

    A text ends with id 1, also where it is cut.
    """

    kind = "bytes"
    END = 1
    FIRST = 3

    @property
    def size(self) -> int:
        return 256 + self.FIRST

    def tokens(self, text: str) -> list[int]:
        ids = [byte + self.FIRST for byte in clean(text).encode("utf-8")]
        return [*ids, self.END] if ids else []

    def _cut(self, ids: list[int], length: int) -> list[int]:
        return [*ids[: length - 1], self.END] if length else []

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return bytes(int(i) - self.FIRST for i in ids if int(i) >= self.FIRST).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


class ClassVocabulary(Vocabulary):
    """The names of classes: a class is a text of one id, its label + 1.

    >>> ClassVocabulary(["red circle", "blue square"]).tokens("Blue_square")
    [2]
    """

    kind = "classes"

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)
        self._labels = {self._key(name): label for label, name in enumerate(self.names)}
        if len(self._labels) != len(self.names):
            twice = [n for n, count in collections.Counter(map(self._key, self.names)).items() if count > 1]
            raise ValueError(f"Names of classes must differ; twice there: {', '.join(map(repr, twice[:5]))}.")

    @staticmethod
    def _key(name: str) -> str:
        return " ".join(clean(name).lower().replace("_", " ").split())

    @property
    def size(self) -> int:
        return len(self.names) + 1

    def tokens(self, text: str) -> list[int]:
        """[label + 1]; [] for an empty text, which is no class.

        Raises:
          ValueError: if there is no such class; names those that there are.
        """
        key = self._key(text)
        if key and key not in self._labels:
            close = difflib.get_close_matches(key, self._labels, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            shown = ", ".join(self.names[:_CLASSES_SHOWN]) + (", ..." if len(self.names) > _CLASSES_SHOWN else "")
            raise ValueError(f"Unknown class {text!r}.{hint} The {len(self.names)} classes are {shown}.")
        return [self._labels[key] + 1] if key else []

    def name(self, label: str | SupportsIndex) -> str:
        """The name of a class from its name, written in any way, or its number.

        Raises:
          ValueError: if there is no such class.
        """
        if isinstance(label, str):
            return self.decode(self.tokens(label))
        if not 0 <= int(label) < len(self.names):
            raise ValueError(f"Unknown class {label!r}; classes have the numbers 0 to {len(self.names) - 1}.")
        return self.names[int(label)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return " ".join(self.names[int(i) - 1] for i in ids if int(i) != PAD)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names)}


class SentencePiece(Vocabulary):
    """A SentencePiece model through seqio, such as T5's: 0 padding, 1 end, 2 unknown.

    The model itself is kept in `to_json`, so that a trained stage needs no other file. seqio, which
    imports TensorFlow, is imported at the first text that is encoded.

    Args:
      model: the model file's bytes.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model

    @classmethod
    def from_file(cls, path: str) -> "SentencePiece":
        """Reads a model file.

        Raises:
          FileNotFoundError: naming the other vocabularies, since the path may be a misspelt name.
        """
        file = epath.Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"data.vocabulary is {path!r}, which is no file; expected 'scenes', 'captions', 'bytes', 'classes' "
                "or the path of a SentencePiece model."
            )
        return cls(file.read_bytes())

    @functools.cached_property
    def _seqio(self) -> Any:
        import seqio  # late: it imports TensorFlow

        with tempfile.NamedTemporaryFile(suffix=".model") as file:  # seqio reads from files only
            file.write(self.model)
            file.flush()
            vocabulary = seqio.SentencePieceVocabulary(file.name)
            try:
                vocabulary.load_model()
            except Exception as error:
                raise ValueError(f"This is no SentencePiece model that seqio can read: {error}") from error
        if vocabulary.tokenizer.pad_id() != PAD or vocabulary.eos_id < 0:
            raise ValueError(
                f"The SentencePiece model has pad_id {vocabulary.tokenizer.pad_id()} and eos_id {vocabulary.eos_id}; "
                "expected 0 and 1 as T5 has them (train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1)."
            )
        return vocabulary

    @property
    def size(self) -> int:
        return int(self._seqio.vocab_size)

    def tokens(self, text: str) -> list[int]:
        ids = list(self._seqio.encode(clean(text)))
        return [*ids, int(self._seqio.eos_id)] if ids else []

    def _cut(self, ids: list[int], length: int) -> list[int]:
        return [*ids[: length - 1], ids[-1]] if length else []

    def unknown(self, text: str) -> list[str]:
        pieces = self._seqio.tokenizer.EncodeAsPieces(clean(text))
        ids = self._seqio.encode(clean(text))
        unknown = int(self._seqio.unk_id)
        return list(dict.fromkeys(p.lstrip("▁") for p, i in zip(pieces, ids, strict=True) if i == unknown))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        end = int(self._seqio.eos_id)
        return self._seqio.tokenizer.DecodeIds([int(i) for i in ids if int(i) not in (PAD, end)])

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sha256": hashlib.sha256(self.model).hexdigest(),
            "model": base64.b64encode(self.model).decode("ascii"),
        }

    def __reduce__(self):
        return SentencePiece, (self.model,)  # seqio's objects stay with their process


def from_json(data: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `to_json` described.

    Raises:
      ValueError: if the kind is unknown or the contents do not fit it.
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind == WordVocabulary.kind and isinstance(data.get("words"), list):
        return WordVocabulary(data["words"])
    if kind == ByteVocabulary.kind:
        return ByteVocabulary()
    if kind == ClassVocabulary.kind and isinstance(data.get("names"), list):
        return ClassVocabulary(data["names"])
    if kind == SentencePiece.kind and isinstance(data.get("model"), str):
        model = base64.b64decode(data["model"])
        if hashlib.sha256(model).hexdigest() != data.get("sha256"):
            raise ValueError("The vocabulary's SentencePiece model does not have the checksum written beside it.")
        return SentencePiece(model)
    raise ValueError(
        f"Not a vocabulary: kind {kind!r}; expected 'words', 'bytes', 'classes' or 'sentencepiece', whole."
    )
