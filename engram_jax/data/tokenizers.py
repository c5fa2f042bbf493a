"""Byte-level BPE: train, save, load.

Every text is a sequence of UTF-8 bytes and every byte has a token, so that any
text comes back exactly: decode(encode(text).ids) == text. Two ids are not
text: `PAD_ID`, and `END_ID`, which closes a document. A text that spells one of
their names out is encoded as ordinary characters and never as the special id:
what a document says cannot move the boundaries between documents.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator

import tokenizers
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


def train_tokenizer(
  texts: Iterable[str], *, vocab_size: int
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer; the same texts give the same one.

  Args:
    texts: documents, in any order.
    vocab_size: size asked for, special tokens included. A small corpus has too
      few different pairs and gives fewer tokens: `get_vocab_size()` of the
      result is the size, and ids stay below it.

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
  pieces = (piece for text in texts for piece in segments(text))
  tokenizer.train_from_iterator(pieces, trainer)
  return _text_only(tokenizer)


def save_tokenizer(
  tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]
) -> None:
  """Writes the tokenizer to `path`, whole or not at all."""
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


def segments(
  text: str, *, characters: int = SEGMENT_CHARACTERS
) -> Iterator[str]:
  """Cuts a long text where cutting changes no token.

  A corpus in one file would otherwise be encoded by one thread, and at some
  hundred bytes of memory per token. The cut lies before a newline that follows
  a character which is no white space: the byte-level pre-tokenizer always
  splits there, since it joins newlines only to white space.

  Args:
    text: any text.
    characters: length at which the next place to cut is looked for.

  Yields:
    Parts of `text`, in order; joined they are `text`. None if it is empty.
  """
  start = 0
  while start < len(text):
    stop = text.find("\n", start + characters)
    while stop > 0 and text[stop - 1].isspace():
      stop = text.find("\n", stop + 1)
    stop = len(text) if stop < 0 else stop
    yield text[start:stop]
    start = stop


def _text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # Not part of the library's file format, so set after every load.
  tokenizer.encode_special_tokens = True
  return tokenizer
