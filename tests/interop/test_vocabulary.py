"""Ids and padding of seqio's SentencePiece vocabulary, and of ours, against transformers' T5 tokenizer."""

import re
import unicodedata

import numpy as np
import pytest
import sentencepiece

from muse_jax.text.vocabulary import SentencePiece, clean

LENGTH = 24
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABC xyz 0123456789",
    " \t\n.,;:!?'\"()[]{}<>/\\|@#$%^&*_+-=~`",
    "àéîõüßñçøåÆŒ",
    "абвгдежз ΑΒΓαβγ",
    "漢字かなカナ한국어",
    "ﬁﬂ①②Ⅳ½²ｆｕｌｌ　ＷＩＤＴＨ",  # NFKC changes them
    "e\u0301a\u0308o\u0302 ",  # combining marks
    "🙂👩\u200d🚀🇫🇷❤\ufe0f",
    "\u00a0\u200b\u2009\u3000\ufeff\u00ad▁",
    "עברית العربية हिन्दी ไทย",
    "\x01\x07\x1f\x7f\x85\ufffd\U0010ffff\ue000",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small SentencePiece model with T5's special ids and normalisation."""
    path = tmp_path_factory.mktemp("vocabulary")
    words = "a red blue green circle square of the in on with above below picture dog cat".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(500)]
    (path / "text").write_text("\n".join(lines + ["àéîõü 漢字かな 0123456789 .,;:!?"] * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        f"--input={path}/text --model_prefix={path}/spiece --vocab_size=150 --hard_vocab_limit=false "
        "--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1 --normalization_rule_name=nmt_nfkc --minloglevel=2"
    )
    return path / "spiece.model"


def comparable(text):
    """Whether transformers means to do with a text what SentencePiece does.

    Its tokenizers split off written special tokens, so that a caption could end itself, where SentencePiece, T5's own,
    reads "</s>" as any other letters; and they normalise by grapheme: a combining mark that composes with nothing is
    dropped after what NFKC expands, where SentencePiece makes it an unknown token.
    """
    special = re.search(r"<unk>|</s>|<pad>|<extra_id_\d+>", text)
    return not special and not any(unicodedata.category(character)[0] == "M" for character in text)


def odd_strings():
    """1,000 of them, as our vocabularies read them (see `clean`), and those left out."""
    rng = np.random.default_rng(1)
    fixed = ["", " ", "a", "  a  red   dog ", "the" * 100, "\n", "▁", "a▁b", "A RED DOG", "<unk>x", "▁▁a", "ﬁ\u0308"]
    fixed += ["a </s> red", "<pad> dog", "<extra_id_0> a cat", "< / s >"]
    made, left_out = [], []
    while len(made) < 1000:
        chosen = rng.choice(len(ALPHABETS), rng.integers(1, 4))
        letters = "".join(ALPHABETS[i] for i in chosen) + " a red dog "
        text = clean(fixed.pop() if fixed else "".join(rng.choice(list(letters), rng.integers(1, 60))))
        (made if comparable(text) else left_out).append(text)
    return made, left_out


@pytest.fixture(scope="module")
def tokenizer(transformers, model):
    return transformers.T5Tokenizer.from_pretrained(model.parent, extra_ids=0, legacy=True)


def test_ids_and_padding_equal_transformers(tokenizer, model):
    import seqio

    vocabulary = seqio.SentencePieceVocabulary(str(model))
    ours = SentencePiece.from_file(str(model))
    texts, left_out = odd_strings()
    assert len(texts) == 1000
    for text in texts:
        theirs = tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH)
        pieces = [*vocabulary.encode(text)[: LENGTH - 1], vocabulary.eos_id]
        assert [*pieces, *[0] * (LENGTH - len(pieces))] == theirs["input_ids"], ascii(text)
        ids, mask = ours.encode(text, LENGTH)
        if len(pieces) == 1:  # an empty text has no token at all with us, not the end's
            assert not mask.any()
            continue
        np.testing.assert_array_equal(ids, theirs["input_ids"], err_msg=ascii(text))
        np.testing.assert_array_equal(mask, np.array(theirs["attention_mask"], bool), err_msg=ascii(text))
    for text in left_out:  # there ours are SentencePiece's
        assert ours.tokens(text) == [*vocabulary.encode(text), vocabulary.eos_id], ascii(text)
