"""Streaming text: whole characters only, and together all of the text."""

import numpy as np
import pytest
import tokenizers

from engram_jax.data.tokenizers import END_ID, PAD_ID, train_tokenizer
from engram_jax.decoding.text import TextStream, byte_alphabet
from engram_jax.errors import InputError

TEXT = "def fünf(x):\n\treturn '→ 🎉👩‍🚀' + x  # naïve 日本語\x00\u00ad\n"


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([TEXT.replace("🎉", "") * 3], vocab_size=280)


def test_the_alphabet_is_the_tokenizers_own():
  alphabet = byte_alphabet()
  assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  assert sorted(alphabet.values()) == list(range(256))


def test_pieces_are_whole_characters_and_make_the_text(tokenizer):
  ids = tokenizer.encode(TEXT).ids
  stream = TextStream(tokenizer)
  pieces = [stream.push([token_id]) for token_id in ids]
  assert "".join(pieces) == TEXT and stream.close() == ""
  assert not any("\ufffd" in piece for piece in pieces)
  # Some characters take more than one token: nothing is printed before.
  assert "" in pieces and len(ids) < len(TEXT.encode())
  assert stream.push(ids) == TEXT


def test_special_tokens_are_no_text(tokenizer):
  ids = tokenizer.encode("ab").ids
  stream = TextStream(tokenizer)
  assert stream.push([PAD_ID, *ids, END_ID]) + stream.close() == "ab"


def test_any_tokens_decode_as_the_tokenizer_decodes_them(tokenizer):
  rng = np.random.default_rng(0)
  for _ in range(200):
    ids = rng.integers(2, tokenizer.get_vocab_size(), 12).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "".join(pieces) + stream.close() == tokenizer.decode(ids)


def test_a_character_cut_off_is_shown_at_the_end(tokenizer):
  first = tokenizer.encode("🎉").ids[:-1]
  stream = TextStream(tokenizer)
  assert stream.push(first) == "" and stream.close() == "\ufffd"
  # A new text may follow.
  assert stream.push(tokenizer.encode("ok").ids) == "ok"


def test_refusals(tokenizer):
  for bad in (-1, tokenizer.get_vocab_size()):
    with pytest.raises(InputError, match=f"token_ids: {bad}; valid: an id"):
      TextStream(tokenizer).push([bad])
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"日": 0, "a": 1}, unk_token="a")
  )
  with pytest.raises(InputError, match=r"token 0: '日'; valid: .*byte-level"):
    TextStream(words).push([0])
