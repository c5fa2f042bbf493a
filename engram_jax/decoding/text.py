"""Tokens to text as they come, for byte-level BPE.

A token is a piece of a UTF-8 byte sequence and may end in the middle of a
character: what can be printed is the longest prefix of whole characters.
Joined, the pieces are what decoding all tokens at once gives.
"""

import codecs
from collections.abc import Iterable
from typing import Any

from engram_jax.errors import InputError, require


def byte_alphabet() -> dict[str, int]:
  """The character that stands for each byte in a byte-level BPE vocabulary.

  Printable bytes of Latin-1 stand for themselves; the others, in ascending
  order, are U+0100 and on (GPT-2's convention).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in set(printable)]
  alphabet = {chr(byte): byte for byte in printable}
  return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


class TextStream:
  """Turns one sequence's tokens into text piece by piece; holds what is left.

  Special tokens are no text. Bytes that are no UTF-8 become U+FFFD. Of a batch,
  leave out where `generate` yields `NO_TOKEN`: that is no token id.

  Example:
    >>> stream = TextStream(tokenizer)
    >>> for step in generate(...):
    ...   print(stream.push([step.tokens[0]]), end="", flush=True)
    >>> print(stream.close())
  """

  def __init__(self, tokenizer: Any):
    """Starts an empty stream.

    Args:
      tokenizer: a byte-level BPE `tokenizers.Tokenizer`.
    """
    self._tokenizer = tokenizer
    self._added = tokenizer.get_added_tokens_decoder()
    self._alphabet = byte_alphabet()
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token_ids: Iterable[int]) -> str:
    """The characters that these tokens complete.

    Raises:
      InputError: an id that the tokenizer has no token for, or a token that is
        not spelled in bytes.
    """
    data = b"".join(self._bytes(int(token_id)) for token_id in token_ids)
    return self._decoder.decode(data)

  def close(self) -> str:
    """What is left at the end: U+FFFD for a character that was cut off."""
    text = self._decoder.decode(b"", final=True)
    self._decoder.reset()
    return text

  def _bytes(self, token_id: int) -> bytes:
    if token_id in self._added:
      added = self._added[token_id]
      return b"" if added.special else added.content.encode()
    token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
    size = self._tokenizer.get_vocab_size()
    valid = f"an id of the tokenizer's {size} tokens"
    require(token is not None, "token_ids", token_id, valid)
    try:
      return bytes(self._alphabet[character] for character in token)
    except KeyError:
      valid = "a token of a byte-level BPE tokenizer"
      raise InputError(f"token {token_id}", repr(token), valid) from None
