"""Tests of the byte-level tokenizer."""

import json
import os
import random

import pytest

from engram_jax.data import tokenizers as lib
from engram_jax.errors import InputError

TEXTS = (
  "def f(x):\n  return x  # comment\n" * 20,
  "hello world, it's 1234 " * 20,
)
HARD = (
  "",
  " ",
  " leading and trailing ",
  "\r\n\t mixed \n\n\n white\u00a0space\u2028 \x1c",
  "\ufeffbyte order mark, e\u0301, 漢字, 🎉👩‍👩‍👧, \U0010ffff",
  "".join(map(chr, range(0x500))),
  "a <|endoftext|> b <|pad|><|endoftext|",
  bytes(range(256)).decode("latin-1"),
)


@pytest.fixture(scope="module")
def tokenizer():
  return lib.train_tokenizer(TEXTS, vocab_size=300)


def encode(tokenizer, text):
  return tokenizer.encode(text).ids


@pytest.mark.parametrize("text", (*TEXTS, *HARD))
def test_any_text_comes_back_and_holds_no_special_id(tokenizer, text):
  ids = encode(tokenizer, text)
  assert tokenizer.decode(ids) == text
  assert not {lib.PAD_ID, lib.END_ID} & set(ids)


def test_special_ids(tokenizer):
  assert tokenizer.token_to_id("<|pad|>") == lib.PAD_ID == 0
  assert tokenizer.token_to_id("<|endoftext|>") == lib.END_ID == 1
  assert tokenizer.decode([lib.END_ID, *encode(tokenizer, "a")]) == "a"


def test_training_is_deterministic_whatever_the_order(tokenizer):
  again = lib.train_tokenizer(TEXTS[::-1], vocab_size=300)
  assert again.to_str() == tokenizer.to_str()


def test_a_small_corpus_gives_the_size_that_it_gives():
  tokenizer = lib.train_tokenizer(["ab ab"], vocab_size=5000)
  assert 258 <= tokenizer.get_vocab_size() < 300
  assert tokenizer.decode(encode(tokenizer, HARD[4])) == HARD[4]
  assert lib.train_tokenizer(TEXTS, vocab_size=258).get_vocab_size() == 258
  with pytest.raises(InputError, match="vocab_size: 257; valid: at least 258"):
    lib.train_tokenizer(TEXTS, vocab_size=257)


def unbroken(characters, alphabet="abcdefghij"):
  return "".join(random.Random(0).choices(alphabet, k=characters))


@pytest.mark.parametrize("space", ("", "one two, 3 ", "\n\n"))
def test_words_without_end_are_cut_for_training(space):
  """Merges see pieces of one length, whatever surrounds a word."""
  word = unbroken(512 * 8 + 100)
  found = lib.train_tokenizer([space + word + space], vocab_size=300)
  first = " " * space.endswith(" ") + word  # a space belongs to the word
  pieces = [first[i : i + 512] for i in range(0, len(first), 512)]
  parts = [space.removesuffix(" "), *pieces, space]
  assert found.to_str() == lib.train_tokenizer(parts, vocab_size=300).to_str()
  assert found.decode(encode(found, word)) == word


def test_ordinary_text_is_not_cut(tokenizer, monkeypatch):
  # Lines without a space, of words that are short.
  texts = ["a1" * 5000, "x = [" + "1,2," * 5000, *TEXTS]
  found = lib.train_tokenizer(texts, vocab_size=300).to_str()
  monkeypatch.setattr(lib, "WORD_CHARACTERS", 10**9)
  assert lib.train_tokenizer(texts, vocab_size=300).to_str() == found


def test_so_much_of_long_words_and_no_more(monkeypatch, caplog):
  monkeypatch.setattr(lib, "LONG_WORDS_CHARACTERS", 2048)
  word = unbroken(5000)
  found = lib.train_tokenizer([word, *TEXTS], vocab_size=300)
  assert "without 2952 of 5000 characters of words longer" in caplog.text
  pieces = [word[i : i + 512] for i in range(0, 2048, 512)]
  part = lib.train_tokenizer([*pieces, *TEXTS], vocab_size=300)
  assert found.to_str() == part.to_str()


def test_a_text_without_lines_or_words_is_cut_too(tokenizer):
  words = "word, 12 " * 100_000
  parts = list(lib.segments(words))
  assert len(parts) > 2 and "".join(parts) == words
  assert max(map(len, parts)) <= 2 * lib.SEGMENT_CHARACTERS
  ids = [i for part in parts for i in encode(tokenizer, part)]
  assert ids == encode(tokenizer, words)
  run = unbroken(1_000_000)
  parts = list(lib.segments(run))
  assert "".join(parts) == run
  assert max(map(len, parts)) <= 2 * lib.SEGMENT_CHARACTERS


def test_what_cannot_be_encoded_is_refused():
  lib.require_text("prompt", "caf\xe9")
  for text in ("", os.fsdecode(b"caf\xe9")):
    with pytest.raises(InputError, match=r"^prompt: ") as raised:
      lib.require_text("prompt", text)
    str(raised.value).encode()


def test_save_and_load(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text("old")
  lib.save_tokenizer(tokenizer, path)
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
  loaded = lib.load_tokenizer(path)
  assert loaded.to_str() == tokenizer.to_str()
  for text in (*TEXTS, *HARD):
    assert encode(loaded, text) == encode(tokenizer, text)


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
  path = tmp_path / "tokenizer.json"
  path.write_text("old")
  monkeypatch.setattr(lib.os, "fsync", lambda _: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    lib.save_tokenizer(tokenizer, path)
  assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("content", (None, "", "{}", "not json\n" * 50))
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(
    InputError, match=r"^tokenizer_path: .*tokenizer.json; "
  ) as e:
    lib.load_tokenizer(path)
  assert "\n" not in str(e.value)


def test_a_tokenizer_with_other_special_tokens_is_refused(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(tokenizer.to_str().replace("<|pad|>", "<|other|>"))
  with pytest.raises(InputError, match=r"in which <\|pad\|> has id 0"):
    lib.load_tokenizer(path)
  json.loads(path.read_text())


def test_segments_change_no_token(tokenizer):
  texts = (*TEXTS, *HARD, "\n\n a)\n\n\n b\n c \n\td's\n" * 30, "\n" * 50)
  for text in texts:
    for characters in (1, 2, 7, 100):
      parts = list(lib.segments(text, characters=characters))
      assert "".join(parts) == text
      ids = [i for part in parts for i in encode(tokenizer, part)]
      assert ids == encode(tokenizer, text)
  assert len(list(lib.segments(TEXTS[0], characters=100))) > 5
