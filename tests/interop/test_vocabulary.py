"""Ids and padding of seqio's SentencePiece vocabulary, and of ours, against transformers' T5 tokenizer."""

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


def odd_strings():
    """1,000 of them."""
    rng = np.random.default_rng(1)
    fixed = ["", " ", "a", "  a  red   dog ", "the" * 100, "\n", "▁", "a▁b", "A RED DOG", "<unk>x", "▁▁a"]
    made = []
    while len(fixed) + len(made) < 1000:
        chosen = rng.choice(len(ALPHABETS), rng.integers(1, 4))
        letters = "".join(ALPHABETS[i] for i in chosen) + " a red dog "
        made.append("".join(rng.choice(list(letters), rng.integers(1, 60))))
    return fixed + made


@pytest.fixture(scope="module")
def tokenizer(transformers, model):
    return transformers.T5Tokenizer.from_pretrained(model.parent, extra_ids=0, legacy=True)


def test_ids_and_padding_equal_transformers(tokenizer, model):
    import seqio

    vocabulary = seqio.SentencePieceVocabulary(str(model))
    words = SentencePiece.from_file(str(model))
    texts = odd_strings()
    assert len(texts) == 1000
    differ = []
    for text in texts:
        theirs = tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH)
        ids = [*vocabulary.encode(text)[: LENGTH - 1], vocabulary.eos_id]
        if theirs["input_ids"] != ids + [0] * (LENGTH - len(ids)):
            differ.append((text, theirs["input_ids"], ids))
    assert not differ, f"{len(differ)} differ, such as {differ[:3]}"
    # Ours cleans a text first (see `clean`), and leaves an empty one without any token.
    for text in map(clean, texts):
        theirs = tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH)
        ids, mask = words.encode(text, LENGTH)
        if theirs["input_ids"][0] == vocabulary.eos_id:
            assert not mask.any()
            continue
        np.testing.assert_array_equal(ids, theirs["input_ids"], err_msg=repr(text))
        np.testing.assert_array_equal(mask, np.array(theirs["attention_mask"], bool), err_msg=repr(text))
