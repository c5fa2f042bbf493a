"""DeepSeek-V4.1's memory, from the files of its checkpoint as they are.

  layers.{i}.engram.embed.weight   e4m3  [R, d]      values of the rows
  layers.{i}.engram.embed.scale    e8m0  [R, d / 32] their scales
  layers.{i}.engram.wkv.weight     e4m3  [(G + 1) D, K d]   G keys, the value
  layers.{i}.engram.wkv.scale      e8m0  [(G + 1) D / 32, K d / 32]
  layers.{i}.engram.q_weight       bf16 or f32  [G, D]
  layers.{i}.engram.k_weight       bf16 or f32  [G, D]

  compression = compress_tokens(tokenizer)
  checkpoint = open_v41(folder, compression=compression)
  engram = checkpoint.engram(layer=1)          157 MB read, made float32
  ids = checkpoint.hashing.hash(compression(token_ids), breaks=...)
  rows = unpack(checkpoint.store.read(ids), checkpoint.store.row_format)

The tables of the released model are 203 GB in two of 48 files. Opening reads
config.json, the index and the headers of the files that hold the memory:
milliseconds for files of that size (`tests/interop/test_full_size.py`), and
nothing of them becomes resident; then a row costs its two pages, values and
scales lying apart. (A row file has both in one page.)

The module is `fusion/engram.py` without biases and convolution. One difference:
at a score of exactly 0 V4.1's gate is sigmoid(0.001), ours 1/2.

Its sibling, the memory of Qwen3.8-Flash-Next, is not read here. Known are the
multipliers (splitmix64 from seed 1234 gives the published ones), the primes
(from 20,000,000 on), raw token ids, and that n-grams end at EOS. Not known for
certain: which id stands beyond an EOS; how the 8-bit rows are scaled (published
copies have one factor for the table, one for each of its 128 parts, or none);
the gate and the groups of its norms, whose gains are 1 + w. And there is no
reference value to test against.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int8, UInt8

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError, require
from engram_jax.fusion.engram import Engram, EngramParams
from engram_jax.identity import WeightsIdentity, require_same_weights
from engram_jax.interop.fp8_blocks import scale_shape, unpack_blocks
from engram_jax.interop.modules import engram_of
from engram_jax.interop.safetensors_files import SafetensorsFile, Shards
from engram_jax.interop.v41_config import (
  RELEASED,
  RELEASED_MULTIPLIERS,
  V41Fields,
  compressed_pad,
  read_about,
  read_fields,
  require_compression,
  require_released,
)
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.host_stores import HostReads
from engram_jax.stores.quantization import BLOCK, RowFormat
from engram_jax.types import Break

TableBytes = tuple[UInt8[np.ndarray, "_R d"], UInt8[np.ndarray, "_R blocks"]]


class SafetensorsStore(HostReads):
  """Packed fp8 rows whose values and scales are two tensors; a `RowStore`.

  Args:
    tables: per layer uint8 [R, d] and uint8 [R, d / 32], C order, usually
      views of a mapped file; not copied.
    row_format: format of the rows, fp8.
  """

  def __init__(self, tables: Mapping[int, TableBytes], row_format: RowFormat):
    d = row_format.width
    require(row_format.name == "fp8", "row_format", row_format.name, "fp8")
    for layer, (values, scales) in tables.items():
      rows = len(values)
      found = values.shape, scales.shape
      expected = (rows, d), (rows, d // BLOCK)
      require(found == expected, f"tables[{layer}]", found, f"{expected}")
    super().__init__(row_format, {i: len(v) for i, (v, _) in tables.items()})
    self._tables = dict(tables)

  def copy_rows(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
    """Copies packed rows of a layer, values and scales side by side.

    Args:
      layer: one of the store's layers.
      ids: int [n], rows of its table.
      out: uint8 [n, d + d / 32], written in place.
    """
    values, scales = self._tables[layer]
    d = self.row_format.width
    out[:, :d] = np.take(values, ids, axis=0)
    out[:, d:] = np.take(scales, ids, axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class V41Checkpoint:
  """The memory of a checkpoint, open for reading.

  Attributes:
    folder: folder of its files.
    config: the memory's sizes; it computes in bfloat16.
    hashing: names the rows of compressed token ids.
    store: the rows, packed as fp8 rows of 264 bytes (for d = 256).
    made_from: the checkpoint of ours that it is from; None if it says none.
  """

  folder: Path
  config: EngramConfig
  hashing: NgramHash
  store: SafetensorsStore
  made_from: WeightsIdentity | None
  _files: Mapping[str, SafetensorsFile]

  def params(self, layer: int) -> EngramParams:
    """The parameters of one layer, float32, without biases and convolution.

    Of `q_weight` and `k_weight` only the product matters; they are the gains of
    the norms of hidden state and key.

    Raises:
      InputError: an unknown layer, or numbers that are not finite.
    """
    require_layer = layer in self.config.layers
    require(require_layer, "layer", layer, f"one of {self.config.layers}")
    config, name = self.config, f"layers.{layer}.engram"
    streams, size = config.streams, config.hidden_size
    rows, columns = (streams + 1) * size, config.memory_width
    try:
      matrix = unpack_blocks(
        self._view(f"{name}.wkv.weight").reshape(rows, columns),
        self._view(f"{name}.wkv.scale").reshape(scale_shape(rows, columns)),
      )
    except InputError as error:
      field = f"{name}.wkv of {self.folder}"
      raise InputError(field, error.value, error.valid) from None
    # (out, in) there; here an input's keys and value lie together.
    projection = matrix.reshape(streams + 1, size, columns).transpose(2, 0, 1)
    return EngramParams(
      projection=jnp.asarray(projection),
      key_scale=self._gain(f"{name}.k_weight"),
      query_scale=self._gain(f"{name}.q_weight"),
    )

  def engram(self, layer: int) -> Engram:
    """The module of one layer; see `params`."""
    return engram_of(self.params(layer), self.config)

  def _view(self, name: str) -> UInt8[np.ndarray, "n"]:
    return self._files[name].view(name)

  def _gain(self, name: str):
    dtype = self._files[name].tensors[name].dtype
    gain = self._view(name).view(_GAINS[dtype]).astype(np.float32)
    found = "NaN or infinity"
    ok = np.isfinite(gain).all()
    require(ok, f"{name} of {self.folder}", found, "finite numbers")
    shape = self.config.streams, self.config.hidden_size
    return jnp.asarray(gain.reshape(shape))


_GAINS = {"BF16": jnp.bfloat16, "F32": np.float32}


def open_v41(
  folder: str | os.PathLike[str],
  *,
  compression: TokenCompression | None = None,
  released: bool = True,
  made_from: WeightsIdentity | None = None,
  allow_other_step: bool = False,
) -> V41Checkpoint:
  """Opens the memory of a checkpoint; no tensor is read.

  Args:
    folder: with config.json, the index and the safetensors files.
    compression: the model's map of tokens, to be checked against the config.
    released: the model must be DeepSeek-V4.1-Flash, as it was released (see
      `v41_config.RELEASED`). False takes any memory of the layout, e.g. one of
      `export_v41`.
    made_from: the checkpoint that an export must be from; None for any.
    allow_other_step: take an export of another step of the same run.

  Raises:
    InputError: a file or field that is missing, or anything that contradicts
      anything else: by name, with what was found and what is expected.
  """
  folder = Path(folder)
  path = folder / "config.json"
  fields = read_fields(path)
  if released:
    require_released(fields, path)
  source, digest = read_about(path)
  if made_from is not None:
    valid = "a checkpoint: the folder does not say which it is from"
    require(source is not None, f"made_from of {path}", source, valid)
    require_same_weights(
      source, made_from, path, allow_other_step=allow_other_step
    )
  if compression is not None:
    require_compression(compression, fields, released=released)
    valid = f"{digest}, that of {path}"
    same = digest in (None, compression.digest)
    require(same, "compression.digest", compression.digest, valid)
  files = _find(Shards(folder), fields)
  for file in dict.fromkeys(files.values()):
    _require_part(file, source, path)
  # After the files, whose sizes bound the search for primes.
  pad = compressed_pad(fields, compression, released=released)
  try:
    hashing = fields.hashing(pad)
  except InputError as error:
    field = f"{error.field} of {path}"
    raise InputError(field, error.value, error.valid) from None
  if released:
    for layer, expected in RELEASED_MULTIPLIERS.items():
      found = hashing.multipliers[layer].tolist()
      field = f"multipliers[{layer}]"
      require(found == expected, field, found, f"{expected}, V4.1's")
  d, tables = fields.engram_head_dim, {}
  for layer in fields.engram_layer_ids:
    pair = []
    for name, width in (("weight", d), ("scale", d // BLOCK)):
      name = f"layers.{layer}.engram.embed.{name}"
      files[name].read_at_random(name)
      pair.append(files[name].view(name).reshape(-1, width))
    tables[layer] = tuple(pair)
  store = SafetensorsStore(tables, RowFormat("fp8", d))
  return V41Checkpoint(folder, fields.config(), hashing, store, source, files)


def compress_tokens(tokenizer) -> TokenCompression:
  """The released model's map of tokens, from its tokenizer.

  The texts are decoded by the `tokenizers.Tokenizer` within, special tokens
  kept, no clean-up of spaces, as in DeepSeek's own code.

  Raises:
    InputError: the tokenizer of another model.
  """
  compression = TokenCompression.from_tokenizer(tokenizer)
  fields = V41Fields(**RELEASED, rms_norm_eps=1e-6)
  require_compression(compression, fields, released=True)
  return compression


def image_breaks(
  spans: Sequence[Sequence[tuple[int, int]]], length: int
) -> Int8[np.ndarray, "B L"]:
  """Where images stand, as `breaks` for hash and fusion.

  V4.1 calls their positions dead: no n-gram holds one or reaches across it, and
  they get nothing from the memory.

  Args:
    spans: per sequence the images' (first position, one past the last).
    length: L, positions of a sequence.

  Returns:
    `Break.NON_TEXT` there, 0 elsewhere.

  Raises:
    InputError: a span that is not within the sequence.
  """
  breaks = np.zeros((len(spans), length), np.int8)
  for row, images in enumerate(spans):
    for span in images:
      start, stop = span
      valid = f"0 <= start <= stop <= {length}"
      require(0 <= start <= stop <= length, f"spans[{row}]", span, valid)
      breaks[row, start:stop] = Break.NON_TEXT
  return breaks


def tensor_shapes(
  fields: V41Fields, layer: int
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Per tensor of a layer: the dtypes that it may have, and its shape.

  Args:
    fields: sizes that the config of the checkpoint states.
    layer: zero-based block that reads the memory.
  """
  d, rows = fields.engram_head_dim, fields.num_rows[layer]
  gain = ("BF16", "F32"), (fields.hc_mult, fields.hidden_size)
  matrix = (fields.hc_mult + 1) * fields.hidden_size, fields.columns * d
  shapes = {
    "embed.weight": (("F8_E4M3",), (rows, d)),
    "embed.scale": (("F8_E8M0",), (rows, d // BLOCK)),
    "wkv.weight": (("F8_E4M3",), matrix),
    "wkv.scale": (("F8_E8M0",), scale_shape(*matrix)),
    "q_weight": gain,
    "k_weight": gain,
  }
  return {f"layers.{layer}.engram.{name}": x for name, x in shapes.items()}


def _require_part(
  file: SafetensorsFile, wanted: WeightsIdentity | None, path: Path
) -> None:
  """Refuses a file of another export than the config at `path`."""
  try:
    found = WeightsIdentity.from_metadata(file.metadata)
  except InputError as error:
    field = f"{error.field} of {file.path}"
    raise InputError(field, error.value, error.valid) from None
  if found is not None and wanted is not None:
    require_same_weights(found, wanted, file.path)
  valid = f"{wanted}, as in {path}"
  require(found == wanted, f"made_from of {file.path}", found, valid)


def _find(shards: Shards, fields: V41Fields) -> dict[str, SafetensorsFile]:
  """The file of each tensor of the memory."""
  return {
    name: shards.find(name, dtypes, shape)
    for layer in fields.engram_layer_ids
    for name, (dtypes, shape) in tensor_shapes(fields, layer).items()
  }
