"""Token compression: many token ids that read alike become one canonical id.

  x'_t = P(x_t),   P: [0, V) -> [0, V')          (arXiv 2601.07372, §2.2)

P is a table made once on the host. The key of token id i is

  raw_token(i)         where text(i) = decode([i]) holds U+FFFD, else
  normalize(text(i))   or, where that is empty, text(i) itself,

and a key not seen before takes the next canonical id, in ascending order of i.
The order is part of the format: the hash multipliers are drawn from a range
that depends on V', so one wrong id changes every row id of the model.

Axes: V, token ids; V' (`size`), canonical ids.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from engram_jax.errors import (
  InputError,
  check_in_range,
  require,
  require_in_range,
  require_integer,
)
from engram_jax.files import whole_file
from engram_jax.memory.npz_files import read_npz

#: Canonical id of a position without text, also in a history.
NON_TEXT_ID = -1
_FORMAT = "engram_jax.TokenCompression/1"
_UNDECODABLE = "\ufffd"
# Stands for a lone space while surrounding white space is stripped; a private
# use character, as in the reference implementation.
_LONE_SPACE = "\ue000"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCompression:
  """The map from token ids to canonical ids: a value, made once on the host.

  Two are equal, and hash equally, when their maps are: so one may be a static
  argument of `jax.jit`.

  Attributes:
    canonical_ids: int32 `[V]`, read-only; the values 0 .. size - 1 in
      first-seen order.
    size: V', number of canonical ids.
    digest: hex sha256 of `canonical_ids` as little-endian int32.

  Raises:
    InputError: `canonical_ids` is not such a map.
  """

  canonical_ids: np.ndarray
  size: int = dataclasses.field(init=False)
  digest: str = dataclasses.field(init=False)

  def __post_init__(self):
    ids = _checked_map(self.canonical_ids)
    ids.setflags(write=False)
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    object.__setattr__(self, "canonical_ids", ids)
    object.__setattr__(self, "size", int(ids.max()) + 1)
    object.__setattr__(self, "digest", digest)

  @classmethod
  def from_tokenizer(cls, tokenizer: Any) -> "TokenCompression":
    """Makes the map of a tokenizer by the rule at the head of this file.

    The ids are 0 .. the largest that the tokenizer gives out, added tokens
    included. An id in between that it never gives out decodes to the empty
    text: all of these share the key "" and one canonical id.

    Args:
      tokenizer: a `tokenizers.Tokenizer`, a Hugging Face
        `PreTrainedTokenizerBase` that holds one, or the path of a
        `tokenizer.json`. Texts are decoded by the first, special tokens kept,
        no clean-up of spaces.

    Raises:
      InputError: a tokenizer of another kind, one without tokens, or a path
        where there is none.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
      tokenizer = _open_tokenizer(Path(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    methods = ("get_vocab", "decode_batch", "id_to_token")
    require(
      all(callable(getattr(backend, name, None)) for name in methods),
      "tokenizer",
      type(tokenizer).__name__,
      "a tokenizers.Tokenizer, or a fast Hugging Face tokenizer, which holds "
      "one as backend_tokenizer",
    )
    vocab = backend.get_vocab(with_added_tokens=True)
    require(len(vocab) > 0, "tokenizer", "no tokens", "one or more tokens")
    ids = range(max(vocab.values()) + 1)
    texts = backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
    return cls.from_texts(texts, [backend.id_to_token(i) for i in ids])

  @classmethod
  def from_texts(
    cls, texts: Sequence[str], raw_tokens: Sequence[str | None]
  ) -> "TokenCompression":
    """Makes the map of `[V]` decoded texts: the bare rule.

    Args:
      texts: what each token id decodes to alone.
      raw_tokens: the tokenizer's own string for it, the key where the text
        holds U+FFFD (a part of a UTF-8 sequence); unused elsewhere.

    Raises:
      InputError: no texts, or another number of raw tokens.
    """
    require(
      len(raw_tokens) == len(texts),
      "raw_tokens",
      f"{len(raw_tokens)} entries",
      f"one for each of the {len(texts)} texts",
    )
    normalize = _normalizer()
    seen: dict[str | None, int] = {}

    def key(text: str, raw_token: str | None) -> str | None:
      if _UNDECODABLE in text:
        return raw_token
      return normalize(text) or text

    keys = map(key, texts, raw_tokens)
    ids = [seen.setdefault(item, len(seen)) for item in keys]
    return cls(np.array(ids, np.int32))

  @classmethod
  def from_canonical_ids(cls, canonical_ids: Any) -> "TokenCompression":
    """Takes a ready map: integers `[V]`, dense and in first-seen order.

    Raises:
      InputError: it is not one; the first wrong entry is named.
    """
    return cls(np.asarray(canonical_ids))

  @classmethod
  def identity(cls, vocab_size: int) -> "TokenCompression":
    """The map that leaves `vocab_size` token ids as they are."""
    require_integer("vocab_size", vocab_size, low=1, high=2**31)
    return cls(np.arange(vocab_size, dtype=np.int32))

  @property
  def vocab_size(self) -> int:
    """V, number of token ids."""
    return len(self.canonical_ids)

  def __call__(
    self, token_ids: Shaped[Array | np.ndarray, "*shape"]
  ) -> Int32[Array | np.ndarray, "*shape"]:
    """Looks the canonical ids up, on device or on the host.

    Args:
      token_ids: integers of any shape; a negative one is a position that is
        not text and becomes -1 (see `engram_jax.types.Break.NON_TEXT`).

    Returns:
      int32 of the same shape, each -1 <= id < size: a JAX array for a JAX array
      (inside and outside of transformations), NumPy for NumPy.

    Raises:
      InputError: not integers, or a concrete id of V or more. Under a trace
        such an id becomes `size`, which is no canonical id; see `validate`.
    """
    xp: Any = jnp if isinstance(token_ids, jax.Array) else np
    dtype = np.dtype(token_ids.dtype)
    require(
      dtype.kind in "iu", "token_ids", f"dtype {dtype}", "an integer dtype"
    )
    ids = token_ids
    if dtype.itemsize < 4:  # too narrow for -1, or for the vocabulary
      ids = ids.astype(np.int32)
    if ids.dtype.kind != "u":
      ids = xp.maximum(ids, NON_TEXT_ID)
    require_in_range("token_ids", ids, low=NON_TEXT_ID, high=self.vocab_size)
    if xp is np:
      found = self.canonical_ids[ids]
    else:
      # Under Explicit mesh axes a gather is not told its sharding by its ids.
      found = (
        jnp.asarray(self.canonical_ids)
        .at[ids]
        .get(
          mode="fill",
          fill_value=self.size,
          out_sharding=jax.typeof(ids).sharding,
        )
      )
    return xp.where(ids < 0, np.int32(NON_TEXT_ID), found)

  def validate(self, token_ids: Shaped[Array | np.ndarray, "*shape"]) -> None:
    """Refuses ids >= V, also inside a `checkify`-ed function.

    See `errors.check_in_range`; any negative id is a position without text.
    """
    lowest = np.iinfo(np.int32).min
    check_in_range("token_ids", token_ids, low=lowest, high=self.vocab_size)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, TokenCompression) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the map to one file, an .npz whatever the name.

    The file appears whole or not at all: another process that loads `path`
    meanwhile finds the old one.

    Raises:
      InputError: the folder does not exist, or cannot be written to.
    """
    with whole_file(path) as file:
      np.savez_compressed(
        file,
        format=np.array(_FORMAT),
        canonical_ids=self.canonical_ids.astype("<i4"),
        size=np.array(self.size, "<i4"),
        digest=np.array(self.digest),
      )

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    *,
    vocab_size: int | None = None,
    digest: str | None = None,
  ) -> "TokenCompression":
    """Reads a file of `save`; nothing in it is executed.

    Args:
      path: the file.
      vocab_size: V that the map must have, e.g. the model's; None for any.
      digest: digest that it must have, e.g. a checkpoint's; None for any.

    Raises:
      InputError: the file is missing, truncated, altered or of another format,
        or it holds another map than the one asked for.
    """
    names = ("canonical_ids", "size", "digest")
    stored = read_npz(Path(path), names, format=_FORMAT, writer="save")
    found = cls(stored["canonical_ids"])
    for name in ("digest", "size"):
      value, actual = str(stored[name]), str(getattr(found, name))
      valid = f"{actual}, that of the map in {path}: the file was altered"
      require(value == actual, name, value, valid)
    for name, wanted in (("vocab_size", vocab_size), ("digest", digest)):
      value = getattr(found, name)
      require(wanted in (None, value), f"{name} of {path}", value, str(wanted))
    return found


def _normalizer() -> Callable[[str], str]:
  """The demo's text normaliser; the order of its steps matters."""
  # Not needed to use a map, only to make one.
  from tokenizers import Regex, normalizers

  return normalizers.Sequence(
    [
      normalizers.NFKC(),
      normalizers.NFD(),
      normalizers.StripAccents(),
      normalizers.Lowercase(),
      normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
      normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
      normalizers.Strip(),
      normalizers.Replace(_LONE_SPACE, " "),
    ]
  ).normalize_str


def _checked_map(ids: np.ndarray) -> Int32[np.ndarray, " V"]:
  """A fresh int32 copy of the map `ids`, or an `InputError`."""
  require(
    ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu",
    "canonical_ids",
    f"{ids.dtype} of shape {ids.shape}",
    "integers of shape [V], V >= 1",
  )
  # Dense in first-seen order: each id is at most one above all before it.
  limit = np.concatenate([[0], np.maximum.accumulate(ids)[:-1].astype(int) + 1])
  wrong = np.flatnonzero((ids < 0) | (ids > limit))
  if wrong.size:
    first = int(wrong[0])
    raise InputError(
      f"canonical_ids[{first}]",
      ids[first],
      f"0 <= id <= {limit[first]}: ids in first-seen order",
    )
  return ids.astype(np.int32)


def _open_tokenizer(path: Path) -> Any:
  """The tokenizer of a `tokenizer.json`."""
  # Of use to those alone who name one by its path.
  import tokenizers

  path = path.expanduser()
  require(path.is_file(), "tokenizer", path, "an existing tokenizer.json")
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises plain Exceptions
    valid = f"a tokenizer.json of Hugging Face's tokenizers ({error})"
    raise InputError("tokenizer", path, valid) from None
