"""The memory's fields in DeepSeek-V4.1's config.json, and what they mean here.

They stand in `text_config`; `quantization_config`, which says how the matrices
are stored, beside it or within. Of the hash only sizes are given: its
multipliers are drawn with seed 0 for the size of the compressed vocabulary, so
that one id more in the map of tokens changes every row id. Its primes start at
`engram_vocab_size`, for each order and layer at the next unused one, and their
sums are `engram_num_embeddings`, which checks both.

`engram_pad_token_id` is a token id; the hash needs its compressed one. That
field is ours, `engram_compressed_pad_token_id`: others make it from the map of
tokens. (In the released model both are 2.)

Ours is `engram_jax`, too, an object beside the others: `made_from`, the
checkpoint that an export is from (`identity.py`), and `compression_digest`,
that of its map of tokens. Either may be missing: it is unknown then.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError, require
from engram_jax.identity import WeightsIdentity
from engram_jax.interop.modules import require_released_options
from engram_jax.interop.safetensors_files import are_sizes, is_size, read_json
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import BLOCK

#: The fields of the released model, DeepSeek-V4.1-Flash.
RELEASED = {
  "hidden_size": 5120,
  "hc_mult": 4,
  "engram_layer_ids": (1, 14),
  "engram_num_embeddings": (384_006_168, 384_016_682),
  "engram_max_ngram_size": 4,
  "engram_n_heads": 8,
  "engram_head_dim": 256,
  "engram_vocab_size": 16_000_000,
  "engram_pad_token_id": 2,
  "engram_compressed_vocab_size": 99_092,
}
#: The compressed id of its pad token.
RELEASED_PAD = 2
#: Its multipliers: NumPy does not promise to draw the same ones for ever.
RELEASED_MULTIPLIERS = {
  1: [76632096046245, 4839876093313, 35959672319349, 73987337458391],
  14: [67716810739261, 51510806800915, 30921347202721, 82619226485591],
}
#: `TokenCompression.digest` of its tokenizer.
RELEASED_DIGEST = (
  "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
)
#: How its matrices are stored.
QUANTIZATION = {
  "quant_method": "fp8",
  "weight_block_size": [BLOCK, BLOCK],
  "scale_fmt": "ue8m0",
}


#: The field of an export that says what it is from.
ABOUT = "engram_jax"


@dataclasses.dataclass(frozen=True)
class V41Fields:
  """The fields by their names in the file.

  Attributes:
    hidden_size: D.
    hc_mult: G, residual streams.
    rms_norm_eps: epsilon of all norms, those of query and key included.
    engram_layer_ids: zero-based blocks.
    engram_num_embeddings: R of each of them.
    engram_max_ngram_size: N, largest order.
    engram_n_heads: H, per order.
    engram_head_dim: d, a multiple of 32.
    engram_vocab_size: least rows of a head.
    engram_pad_token_id: a token id.
    engram_compressed_vocab_size: V'.
    engram_compressed_pad_token_id: its compressed id; None if not given.
  """

  hidden_size: int
  hc_mult: int
  rms_norm_eps: float
  engram_layer_ids: tuple[int, ...]
  engram_num_embeddings: tuple[int, ...]
  engram_max_ngram_size: int
  engram_n_heads: int
  engram_head_dim: int
  engram_vocab_size: int
  engram_pad_token_id: int
  engram_compressed_vocab_size: int
  engram_compressed_pad_token_id: int | None = None

  @property
  def columns(self) -> int:
    """K, rows that one token reads in one layer."""
    return self.engram_n_heads * (self.engram_max_ngram_size - 1)

  @property
  def num_rows(self) -> dict[int, int]:
    """R per layer."""
    return dict(zip(self.engram_layer_ids, self.engram_num_embeddings))

  def config(self) -> EngramConfig:
    """The memory that the fields describe, computing in bfloat16."""
    return EngramConfig(
      hidden_size=self.hidden_size,
      layers=self.engram_layer_ids,
      rows_per_head=(self.engram_vocab_size,)
      * (self.engram_max_ngram_size - 1),
      heads=self.engram_n_heads,
      head_dim=self.engram_head_dim,
      streams=self.hc_mult,
      pad_id=self.engram_pad_token_id,
      short_conv=False,
      query_norm_eps=self.rms_norm_eps,
      key_norm_eps=self.rms_norm_eps,
      dtype="bfloat16",
    )

  def hashing(self, pad_id: int) -> NgramHash:
    """The hash that they describe.

    Args:
      pad_id: the compressed id of the pad token.

    Raises:
      InputError: its rows are not `engram_num_embeddings`.
    """
    config = self.config()
    hashing = NgramHash.create(
      vocab_size=self.engram_compressed_vocab_size,
      rows_per_head=config.rows_per_head,
      heads=config.heads,
      layers=config.layers,
      pad_id=pad_id,
    )
    found, expected = self.num_rows, hashing.num_rows
    valid = f"the sums of the hash's primes, {list(expected.values())}"
    same = found == expected
    require(same, "engram_num_embeddings", list(found.values()), valid)
    return hashing


def fields_of(config: EngramConfig, hashing: NgramHash) -> V41Fields:
  """The fields that describe `config` and its hash.

  Args:
    config: the memory's config.
    hashing: the hash made from it.

  Raises:
    InputError: something that the layout has no field for.
  """
  require_released_options(config)
  one_size = len(set(config.rows_per_head)) == 1
  valid = "one size for all orders"
  require(one_size, "rows_per_head", config.rows_per_head, valid)
  same = config.query_norm_eps == config.key_norm_eps
  valid = f"query_norm_eps, {config.query_norm_eps}"
  require(same, "key_norm_eps", config.key_norm_eps, valid)
  for name, value in dict(
    short_conv=False, projection_bias=False, signed_sqrt=True, seed=0
  ).items():
    found = getattr(config, name)
    require(found == value, name, found, f"{value}, as in V4.1")
  fields = V41Fields(
    hidden_size=config.hidden_size,
    hc_mult=config.streams,
    rms_norm_eps=config.query_norm_eps,
    engram_layer_ids=config.layers,
    engram_num_embeddings=tuple(hashing.num_rows.values()),
    engram_max_ngram_size=config.max_order,
    engram_n_heads=config.heads,
    engram_head_dim=config.head_dim,
    engram_vocab_size=config.rows_per_head[0],
    engram_pad_token_id=config.pad_id,
    engram_compressed_vocab_size=hashing.vocab_size,
    engram_compressed_pad_token_id=hashing.pad_id,
  )
  same = hashing.to_dict() == fields.hashing(hashing.pad_id).to_dict()
  valid = "the one that V4.1's rule draws for this config"
  require(same, "hashing", "another hash", valid)
  return fields


def read_fields(path: Path) -> V41Fields:
  """The fields of a config.json, each of a type and size that can be.

  Raises:
    InputError: a field that is missing or not so.
  """
  whole = read_json(path)
  text = whole.get("text_config")
  valid = "an object"
  ok = type(text) is dict
  require(ok, f"text_config of {path}", type(text).__name__, valid)
  stored = text.get("quantization_config", whole.get("quantization_config"))
  ok = type(stored) is dict
  found = type(stored).__name__
  require(ok, f"quantization_config of {path}", found, valid)
  for name, expected in QUANTIZATION.items():
    found, field = stored.get(name), f"quantization_config.{name} of {path}"
    require(found == expected, field, repr(found), repr(expected))
  values = {
    field.name: _value(field, text, path)
    for field in dataclasses.fields(V41Fields)
  }
  layers, rows = values["engram_layer_ids"], values["engram_num_embeddings"]
  name = f"text_config.engram_layer_ids of {path}"
  unique = 1 <= len(layers) == len(set(layers))
  require(unique, name, list(layers), "one or more different layers")
  name = f"text_config.engram_num_embeddings of {path}"
  require(len(rows) == len(layers), name, list(rows), "one for each layer")
  fields = V41Fields(**values)
  # Also a bound on the primes that will be looked for.
  least = fields.columns * fields.engram_vocab_size
  ok = min(rows) >= least
  require(ok, name, list(rows), f"{least} at least: columns * vocab_size")
  return fields


def read_about(path: Path) -> tuple[WeightsIdentity | None, str | None]:
  """What a config.json says the memory is from.

  Returns:
    The checkpoint, and the digest of its map of tokens; None for what is not
    said.

  Raises:
    InputError: a field that cannot be.
  """
  about = read_json(path).get(ABOUT, {})
  kind = type(about).__name__
  require(type(about) is dict, f"{ABOUT} of {path}", kind, "an object")
  digest = about.get("compression_digest")
  ok = digest is None or type(digest) is str
  field = f"{ABOUT}.compression_digest of {path}"
  require(ok, field, repr(digest), "64 hexadecimal digits")
  if "made_from" not in about:
    return None, digest
  try:
    return WeightsIdentity.from_dict(about["made_from"]), digest
  except InputError as error:
    field = f"{ABOUT}.{error.field} of {path}"
    raise InputError(field, error.value, error.valid) from None


def require_released(fields: V41Fields, path: Path) -> None:
  """Refuses fields that are not the released model's, by the first.

  Args:
    fields: fields to compare with DeepSeek-V4.1-Flash's.
    path: file that they were read from; named when refused.
  """
  for name, expected in RELEASED.items():
    found = getattr(fields, name)
    if isinstance(expected, tuple):
      found, expected = list(found), list(expected)
    field = f"text_config.{name} of {path}"
    valid = f"{expected}, DeepSeek-V4.1-Flash's"
    require(found == expected, field, found, valid)


def require_compression(
  compression: TokenCompression, fields: V41Fields, *, released: bool
) -> None:
  """Refuses a map of tokens under which the rows were not trained.

  Args:
    compression: map of tokens to check.
    fields: fields of the checkpoint that the rows come from.
    released: whether they are DeepSeek-V4.1-Flash's, whose map is known.
  """
  size = fields.engram_compressed_vocab_size
  same = compression.size == size
  valid = f"{size}, engram_compressed_vocab_size"
  require(same, "compression.size", compression.size, valid)
  found, pad = compression.vocab_size, fields.engram_pad_token_id
  valid = f"more than engram_pad_token_id = {pad}"
  require(found > pad, "compression.vocab_size", found, valid)
  if released:
    same = compression.digest == RELEASED_DIGEST
    valid = f"{RELEASED_DIGEST}, DeepSeek-V4.1-Flash's"
    require(same, "compression.digest", compression.digest, valid)


def compressed_pad(
  fields: V41Fields, compression: TokenCompression | None, *, released: bool
) -> int:
  """The compressed id of the pad token.

  Args:
    fields: fields of the checkpoint.
    compression: map of tokens; None takes the id that the fields state.
    released: whether they are DeepSeek-V4.1-Flash's, whose id is known.

  Raises:
    InputError: neither the map of tokens nor the fields say it, or they differ.
  """
  stored = RELEASED_PAD if released else fields.engram_compressed_pad_token_id
  if compression is None:
    valid = "the map of tokens: the config has no compressed pad id"
    require(stored is not None, "compression", None, valid)
    return stored
  pad = int(compression.canonical_ids[fields.engram_pad_token_id])
  name = "engram_compressed_pad_token_id"
  require(stored in (None, pad), name, stored, f"{pad}, by the map of tokens")
  return pad


def _value(field: dataclasses.Field, text: dict[str, Any], path: Path) -> Any:
  name = f"text_config.{field.name} of {path}"
  if field.name not in text:
    optional = field.default is None
    require(optional, name, "missing", "a value")
    return None
  value = text[field.name]
  if field.type is float:
    ok = type(value) in (int, float) and 0 < value <= sys.float_info.max
    require(ok, name, repr(value), "a number above 0")
    return float(value)
  if field.type == tuple[int, ...]:
    ok = are_sizes(value)
    require(ok, name, repr(value), "a list of integers >= 0")
    return tuple(value)
  least = _LEAST.get(field.name, 1)
  ok = is_size(value) and least <= value < 2**31
  require(ok, name, repr(value), f"an integer from {least} to 2**31 - 1")
  if field.name == "engram_head_dim":
    require(value % BLOCK == 0, name, value, f"a multiple of {BLOCK}")
  return value


_LEAST = {
  "engram_max_ngram_size": 2,
  "engram_vocab_size": 2,
  "engram_pad_token_id": 0,
  "engram_compressed_pad_token_id": 0,
}
