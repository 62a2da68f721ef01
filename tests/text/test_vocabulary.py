"""Any string is a prompt; ids, masks and files do what the networks rely on."""

import functools
import pickle
import time
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from muse_jax.text import vocabulary as vocabulary_lib
from muse_jax.text.vocabulary import ByteVocabulary, ClassVocabulary, SentencePiece, WordVocabulary

WORDS = WordVocabulary(["a", "red", "circle", ",", "café"])


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    """A small SentencePiece model with T5's special ids."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "captions.txt"
    lines = [f"{n} {c} {s} on white" for n in ("a", "two") for c in ("red", "blue") for s in ("dot", "box")]
    corpus.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus), model_prefix=str(folder / "m"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return str(folder / "m.model")


CORNERS = (
    "",
    " ",
    "\x00",
    "\ufeff",
    "\ud800",
    "\ud83d\ude00",
    "👩\u200d👩",
    "z" + "\u0335" * 500,
    "İ ΑΣ",
    "a\u200d\u0301",
)
STRANGE = strategies.text(strategies.characters(), max_size=60)  # all of Unicode, lone surrogates too
settings = functools.partial(hypothesis.settings, derandomize=True, deadline=None, database=None)


def test_ids_and_mask_of_words():
    ids, mask = WORDS.encode("A red,  RED circle!", 8)
    assert ids.dtype == np.int32
    assert mask.dtype == np.bool_
    assert ids.tolist() == [2, 3, 5, 3, 4, 1, 0, 0]  # 0 padding, 1 unknown, words from 2 in their order
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert WORDS.size == 7
    assert WORDS.unknown("a blue circle, blue again") == ["blue", "again"]
    assert WORDS.decode(ids) == "a red , red circle <unknown>"


@pytest.mark.parametrize("make", [lambda _: WORDS, lambda _: ByteVocabulary(), SentencePiece.from_file])
def test_every_vocabulary_keeps_the_contract(make, piece):
    words = make(piece)
    for empty in ("", "  \n", "\x00"):
        ids, mask = words.encode(empty, 4)
        assert not ids.any()
        assert not mask.any()
    ids, mask = words.encode("a red dot", 64)
    assert mask.sum() == len(words.tokens("a red dot")) > 0
    assert (ids[~mask] == 0).all()
    assert (ids[mask] > 0).all()
    assert ids.max() < words.size
    again = vocabulary_lib.from_json(words.to_json())
    assert again == words
    np.testing.assert_array_equal(again.encode("a red dot", 64)[0], ids)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(words)).encode("a red dot", 64)[0], ids)
    batch_ids, batch_mask = words.encode_batch(["", "a red dot"], 64)
    np.testing.assert_array_equal(batch_ids[1], ids)
    np.testing.assert_array_equal(batch_mask[1], mask)
    assert not batch_mask[0].any()


def test_bytes_and_pieces_are_numbered_as_in_seqio(piece):
    import seqio

    for text in ("a red dot", "Ünïcode ☃ 👍"):
        assert ByteVocabulary().tokens(text) == [*seqio.ByteVocabulary().encode(text), 1]
        assert SentencePiece.from_file(piece).tokens(text) == [*seqio.SentencePieceVocabulary(piece).encode(text), 1]
    assert ByteVocabulary().size == seqio.ByteVocabulary().vocab_size
    assert ByteVocabulary().decode(ByteVocabulary().tokens("Ünïcode")) == "Ünïcode"
    assert "snow" not in SentencePiece.from_file(piece).unknown("a red dot")
    assert SentencePiece.from_file(piece).unknown("a ☃") == ["☃"]


@pytest.mark.parametrize("words", [WORDS, ByteVocabulary()])
def test_a_long_prompt_is_cut_and_reported_once(words, caplog, monkeypatch):
    monkeypatch.setattr(words, "_warned", False)
    ids, mask = words.encode("red " * 30, 5)
    words.encode("red " * 30, 5)
    assert mask.all()
    assert len(ids) == 5
    if isinstance(words, ByteVocabulary):
        assert ids[-1] == ByteVocabulary.END  # the encoder always sees the end
    cut = [r for r in caplog.records if "is cut to 5" in r.getMessage() and r.levelname == "WARNING"]
    assert len(cut) == 1


def test_what_looks_the_same_is_the_same():
    same = ["café", "cafe\u0301", "CAFÉ", "ca\u200dfé", "\ufeffcafé\x00"]
    assert {tuple(WORDS.tokens(text)) for text in same} == {(6,)}
    assert vocabulary_lib.clean("\ud83d\ude00") == "😀"  # a pair that was written as two escapes
    assert vocabulary_lib.clean("a\ud83d") == "a\ufffd"
    assert vocabulary_lib.clean("a\tb\r\n c\x7f\x85") == "a b c"


@settings(max_examples=2000)
@hypothesis.given(STRANGE)
def check_prompt(text):
    cleaned = vocabulary_lib.clean(text)
    cleaned.encode("utf-8")  # no surrogates left
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(c) == "Cc" for c in cleaned)
    for words in (WORDS, ByteVocabulary()):
        ids, mask = words.encode(text, 16)
        assert ids.max() < words.size
        assert (ids[~mask] == 0).all()


def test_any_string_is_a_prompt():
    for text in CORNERS:
        check_prompt.hypothesis.inner_test(text)
    check_prompt()


def test_strange_strings_through_sentencepiece(piece):
    words = SentencePiece.from_file(piece)

    @settings(max_examples=300)
    @hypothesis.given(STRANGE)
    def check(text):
        assert max([0, *words.tokens(text)]) < words.size

    for text in CORNERS:
        check.hypothesis.inner_test(text)
    check()


@pytest.mark.parametrize("words", [WORDS, ByteVocabulary()])
@pytest.mark.parametrize("unit", ["a", "é\u0301\u0302", "red ", "\ud800"])
def test_ten_megabytes_take_less_than_counting_their_letters(words, unit):
    text = unit * (10_000_000 // len(unit))
    start = time.process_time()
    words.encode(text, 32)
    taken, start = time.process_time() - start, time.process_time()
    assert sum(1 for _ in text) == len(text)
    assert taken < 2 * (time.process_time() - start)


def test_names_of_classes():
    words = ClassVocabulary(["Red circle", "blue_square", "7"])
    assert words.size == 4
    ids, mask = words.encode_batch(["red  CIRCLE", "blue square", ""], 1)
    assert ids.tolist() == [[1], [2], [0]]
    assert mask.tolist() == [[True], [True], [False]]
    assert [words.name(label) for label in (0, "BLUE square", "", np.int64(2))] == [
        "Red circle",
        "blue_square",
        "",
        "7",
    ]
    assert vocabulary_lib.from_json(words.to_json()) == words
    with pytest.raises(
        ValueError, match="Unknown class 'red circel'. Did you mean 'red circle'.* 3 classes are Red ci"
    ):
        words.tokens("red circel")
    for label in (3, -1):
        with pytest.raises(ValueError, match=f"Unknown class {label}; classes have the numbers 0 to 2"):
            words.name(label)
    with pytest.raises(ValueError, match="twice there: 'a b'"):
        ClassVocabulary(["a b", "A_b"])


def test_what_is_no_string_is_refused():
    for value in (b"a red dot", None, 3):
        with pytest.raises(TypeError):
            vocabulary_lib.clean(value)


def test_words_from_captions_by_frequency():
    captions = ["b b b a", "a c", "c, d"]
    assert WordVocabulary.from_captions(captions).words == ("b", "a", "c", ",", "d")
    assert WordVocabulary.from_captions(captions, limit=2).words == ("b", "a")
    with pytest.raises(ValueError, match="no words"):
        WordVocabulary.from_captions(["", " "])


@settings(max_examples=200)
@hypothesis.given(strategies.lists(STRANGE, max_size=20))
def test_words_of_any_captions_are_found_again(captions):
    made = WordVocabulary.from_captions([*captions, *CORNERS, "a"], limit=10**6)
    assert all(made.tokens(word) == [i + 2] for i, word in enumerate(made.words))


def test_words_that_no_prompt_can_have_are_refused():
    with pytest.raises(ValueError, match="'Red'"):
        WordVocabulary(["Red"])
    with pytest.raises(ValueError, match="'two words'"):
        WordVocabulary(["two words"])
    with pytest.raises(ValueError, match="twice"):
        WordVocabulary(["a", "a"])


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="'klingon'"):
        vocabulary_lib.from_json({"kind": "klingon"})
    with pytest.raises(ValueError, match="checksum"):
        vocabulary_lib.from_json({"kind": "sentencepiece", "model": "AAAA", "sha256": "0"})
    with pytest.raises(FileNotFoundError, match="'captions'"):
        SentencePiece.from_file("capions")
    (tmp_path / "no.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        SentencePiece.from_file(str(tmp_path / "no.model")).tokens("a")
