"""Byte-level BPE: train, save, load.

Every text is a sequence of UTF-8 bytes and every byte has a token, so that any
text comes back exactly: decode(encode(text).ids) == text. Two ids are not
text: `PAD_ID`, and `END_ID`, which closes a document. A text that spells one of
their names out is encoded as ordinary characters and never as the special id:
what a document says cannot move the boundaries between documents.

Training takes time in proportion to the text times the longest word: pairs are
merged within words, and each merge looks at the whole of every word with the
pair. A word is what the byte-level pre-tokenizer gives, and an unbroken run of
letters is one, of whatever length. So longer words than text has are cut for
training, and only so many of their characters are looked at.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from engram_jax.errors import InputError, require
from engram_jax.files import write_whole

PAD_TOKEN, PAD_ID = "<|pad|>", 0
END_TOKEN, END_ID = "<|endoftext|>", 1
SPECIAL_TOKENS = {PAD_TOKEN: PAD_ID, END_TOKEN: END_ID}
#: 256 bytes and the special tokens.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
#: A long text is encoded in segments of about this many characters.
SEGMENT_CHARACTERS = 1 << 18
#: Longer words are cut for training; the standard library has none.
WORD_CHARACTERS = 512
#: Characters of longer words that a tokenizer is trained on, at most.
LONG_WORDS_CHARACTERS = 1 << 20

# Where words longer than WORD_CHARACTERS can be: nothing but one kind of
# characters. The looks back keep the search linear.
_UNBROKEN = re.compile(
  rf"(?<!\S)\S{{{WORD_CHARACTERS}}}|(?<!\s)\s{{{WORD_CHARACTERS}}}"
)
# Before a space between two characters that are none.
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def train_tokenizer(
  texts: Iterable[str], *, vocab_size: int
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer; the same texts give the same one.

  Args:
    texts: documents, in any order.
    vocab_size: size asked for, special tokens included. A small corpus has too
      few different pairs and gives fewer tokens: `get_vocab_size()` of the
      result is the size, and ids stay below it.

  Of words longer than `WORD_CHARACTERS`, such as a genome in one line, pieces
  of that length are looked at, and of these `LONG_WORDS_CHARACTERS` in all; a
  warning says so if there are more.

  Raises:
    InputError: `vocab_size` does not even hold the bytes.
  """
  require(
    vocab_size >= SMALLEST_VOCABULARY,
    "vocab_size",
    vocab_size,
    f"at least {SMALLEST_VOCABULARY}: 256 bytes and two special tokens",
  )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  words = _Words(tokenizer.pre_tokenizer)
  pieces = (
    piece
    for text in texts
    for segment in segments(text)
    for piece in words.bounded(segment)
  )
  tokenizer.train_from_iterator(pieces, trainer)
  if words.left_out:
    logging.warning(
      "the tokenizer was trained without %d of %d characters of words longer "
      "than %d, the text is not cut",
      words.left_out,
      words.left_out + words.looked_at,
      WORD_CHARACTERS,
    )
  return _text_only(tokenizer)


class _Words:
  """Cuts words that are too long, and counts their characters."""

  def __init__(self, pre_tokenizer: pre_tokenizers.PreTokenizer):
    self._pre_tokenizer = pre_tokenizer
    self.looked_at = self.left_out = 0

  def bounded(self, text: str) -> Iterator[str]:
    """The text in parts without a long word; all of it if there is none."""
    if not _UNBROKEN.search(text):
      yield text
      return
    start = 0  # of what has not been given yet
    for _, (begin, end) in self._pre_tokenizer.pre_tokenize_str(text):
      if end - begin <= WORD_CHARACTERS:
        continue
      if begin > start:
        yield text[start:begin]
      for at in range(begin, end, WORD_CHARACTERS):
        part = text[at : min(at + WORD_CHARACTERS, end)]
        if self.looked_at + len(part) > LONG_WORDS_CHARACTERS:
          self.left_out += end - at
          break
        self.looked_at += len(part)
        yield part
      start = end
    if start < len(text):
      yield text[start:]


def save_tokenizer(
  tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]
) -> None:
  """Writes the tokenizer to `path`, whole or not at all.

  Args:
    tokenizer: the tokenizer to write.
    path: the file, which is replaced if it exists.
  """
  write_whole(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """Reads a tokenizer that `save_tokenizer` wrote.

  Raises:
    InputError: no such file, not a tokenizer, or one whose special tokens are
      not `SPECIAL_TOKENS`.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(text)
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise InputError(
      "tokenizer_path", path, f"a readable tokenizer file ({reason})"
    ) from None
  except Exception as error:  # the library raises plain Exception
    reason = " ".join(str(error).split())[:80]
    raise InputError(
      "tokenizer_path", path, f"a tokenizer saved by this library ({reason})"
    ) from None
  for token, token_id in SPECIAL_TOKENS.items():
    require(
      tokenizer.token_to_id(token) == token_id,
      "tokenizer_path",
      path,
      f"a tokenizer in which {token} has id {token_id}",
    )
  return _text_only(tokenizer)


def require_text(field: str, text: str) -> None:
  """Refuses what cannot be encoded: nothing, or bytes that are no UTF-8.

  Args:
    field: name of the field or flag that gave the text.
    text: the text to encode.

  Raises:
    InputError: with `field` as its name.
  """
  require(text, field, repr(text), "some text to continue")
  try:
    text.encode()
  except UnicodeEncodeError:
    # How Python hands over an argument's bytes that are none.
    raise InputError(field, repr(text), "text in UTF-8") from None


def segments(
  text: str, *, characters: int = SEGMENT_CHARACTERS
) -> Iterator[str]:
  """Cuts a long text where cutting changes no token.

  A corpus in one file would otherwise be encoded by one thread, and at some
  hundred bytes of memory per token. The cut lies before a newline that follows
  a character which is no white space: the byte-level pre-tokenizer always
  splits there, since it joins newlines only to white space. In a line that goes
  on for as long again it lies before a space between two words, which begins
  the second of them; and where there is none either, anywhere: of a run that
  long without a break the tokens at the cut may be others.

  Args:
    text: any text.
    characters: length at which the next place to cut is looked for.

  Yields:
    Parts of `text`, in order; joined they are `text`. None if it is empty.
  """
  start = 0
  while start < len(text):
    lowest, highest = start + characters, start + 2 * characters
    stop = text.find("\n", lowest, highest)
    while stop > 0 and text[stop - 1].isspace():
      stop = text.find("\n", stop + 1, highest)
    if stop < 0:
      highest = lowest + SEGMENT_CHARACTERS
      space = _BETWEEN_WORDS.search(text, lowest, highest)
      stop = space.start() if space else min(highest, len(text))
    yield text[start:stop]
    start = stop


def _text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # Not part of the library's file format, so set after every load.
  tokenizer.encode_special_tokens = True
  return tokenizer
