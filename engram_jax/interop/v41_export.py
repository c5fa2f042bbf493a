"""A trained memory as a checkpoint in DeepSeek-V4.1's layout.

  config.json                         the fields of `v41_config.py`
  model.safetensors.index.json        which file holds which tensor
  model-00001-of-0000n.safetensors    wkv and gains of all layers
  model-00002-of-... and on           the table of a layer each

The tensors are those of `deepseek_v41.py`. Rows are written as they come; the
folder appears whole or not at all. Where it is told which checkpoint they are
from, config.json and the header of every file say so, and `open_v41` refuses a
folder put together of two.
"""

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Array, Float, UInt8

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError, require
from engram_jax.fusion.engram import EngramParams, param_shapes
from engram_jax.identity import WeightsIdentity
from engram_jax.interop.deepseek_v41 import tensor_shapes
from engram_jax.interop.fp8_blocks import pack_blocks
from engram_jax.interop.safetensors_files import INDEX, encode_header
from engram_jax.interop.v41_config import (
  ABOUT,
  QUANTIZATION,
  V41Fields,
  fields_of,
)
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import RowFormat, pack_rows

#: Rows that `pack_chunks` packs at a time.
CHUNK = 2**16


def pack_chunks(
  table: Float[Array | np.ndarray, "_R d"], rows: int
) -> Iterator[UInt8[np.ndarray, "_rows n"]]:
  """The first `rows` of a table as packed fp8 rows, `CHUNK` at a time.

  Args:
    table: [R, d], R at least `rows`.
    rows: number of rows to pack, counted from the first.

  Raises:
    InputError: an entry that is not finite, or d no multiple of 32.
  """
  row_format = RowFormat("fp8", table.shape[1])
  for start in range(0, rows, CHUNK):
    part = np.asarray(table[start : min(start + CHUNK, rows)])
    yield pack_rows(part, row_format)


def export_v41(
  folder: str | os.PathLike[str],
  config: EngramConfig,
  hashing: NgramHash,
  params: Mapping[int, EngramParams],
  chunks: Mapping[int, Iterable[UInt8[np.ndarray, "_rows n"]]],
  *,
  made_from: WeightsIdentity | None = None,
  compression_digest: str | None = None,
) -> None:
  """Writes a memory that `open_v41(folder, released=False)` opens.

  Args:
    folder: must not exist, or be empty.
    config: without convolution and biases, seed 0, one table size.
    hashing: its hash.
    params: parameters of each layer. The projections are rounded to fp8, one
      scale per block of 32 x 32; the gains stay float32.
    chunks: per layer its packed fp8 rows in order, uint8 [any number, d + d /
      32] at a time: of `pack_chunks`, or of a store.
    made_from: the checkpoint that all this is from, `TrainedModel.identity`;
      None if it is from none.
    compression_digest: digest of the map of tokens that it was trained under,
      `TokenCompression.digest`; None if unknown.

  Raises:
    InputError: a config that the layout has no fields for, other layers, more
      or fewer rows than the hash names, numbers that are not finite, or a
      folder that cannot be written to.
  """
  fields, folder = fields_of(config, hashing), Path(folder)
  RowFormat("fp8", config.head_dim)  # refuses other widths
  for name, given in (("params", params), ("chunks", chunks)):
    same = sorted(given) == sorted(config.layers)
    require(same, name, list(given), f"layers {list(config.layers)}")
  for layer in config.layers:
    _require_params(params[layer], config, layer)
  empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
  require(empty, "folder", folder, "a new or empty one")
  folder = folder.absolute()
  partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  try:
    partial.mkdir()
  except OSError as error:
    valid = f"within a writable folder ({error.strerror})"
    raise InputError("folder", folder, valid) from None
  try:
    about = {} if made_from is None else {"made_from": made_from.to_dict()}
    if compression_digest is not None:
      about["compression_digest"] = compression_digest
    metadata = made_from and made_from.to_metadata()
    _write_all(partial, fields, params, chunks, about, metadata)
    _sync(partial)
    os.replace(partial, folder)
    _sync(folder.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _require_params(
  params: EngramParams, config: EngramConfig, layer: int
) -> None:
  for name, shape in param_shapes(config).items():
    value = getattr(params, name)
    found = tuple(value.shape)
    require(found == shape, f"params[{layer}].{name}", found, str(shape))
    finite = np.isfinite(np.asarray(value)).all()
    field = f"params[{layer}].{name}"
    require(finite, field, "NaN or infinity", "finite numbers")


def _write_all(
  folder: Path,
  fields: V41Fields,
  params: Mapping[int, EngramParams],
  chunks: Mapping[int, Iterable[np.ndarray]],
  about: Mapping[str, Any],
  metadata: Mapping[str, str] | None,
) -> None:
  layers = fields.engram_layer_ids
  shapes = {layer: tensor_shapes(fields, layer) for layer in layers}
  count, file_of, sizes = len(layers) + 1, {}, []

  def create(shard: int, names: list[str]) -> tuple[BinaryIO, dict[str, int]]:
    """A file for these tensors, and where in it each starts."""
    path = folder / f"model-{shard:05}-of-{count:05}.safetensors"
    tensors = {}
    for name in names:
      dtypes, shape = shapes[int(name.split(".")[1])][name]
      tensors[name] = dtypes[-1], shape  # of two the lossless one
    header = encode_header(tensors, metadata=metadata)
    file, starts, at = open(path, "xb"), {}, len(header)
    file.write(header)
    for name, (dtype, shape) in tensors.items():
      starts[name] = at
      at += math.prod(shape) * (4 if dtype == "F32" else 1)
      file_of[name] = path.name
    file.truncate(at)
    sizes.append(at - len(header))
    return file, starts

  small = [
    name for layer in layers for name in shapes[layer] if ".embed." not in name
  ]
  file, starts = create(1, small)
  with file:
    for layer in layers:
      for name, array in _layer_arrays(params[layer]).items():
        file.seek(starts[f"layers.{layer}.engram.{name}"])
        file.write(array.tobytes())
    _flush(file)
  for shard, layer in enumerate(layers, 2):
    names = [name for name in shapes[layer] if ".embed." in name]
    file, starts = create(shard, names)
    with file:
      rows, d = fields.num_rows[layer], fields.engram_head_dim
      _write_rows(file, list(starts.values()), chunks[layer], layer, rows, d)
      _flush(file)

  stored = dataclasses.asdict(fields)
  config = {"text_config": stored, "quantization_config": QUANTIZATION}
  if about:
    config[ABOUT] = dict(about)
  index = {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of}
  for name, content in (("config.json", config), (INDEX, index)):
    with open(folder / name, "xb") as file:
      file.write(json.dumps(content, indent=2).encode() + b"\n")
      _flush(file)


def _layer_arrays(params: EngramParams) -> dict[str, np.ndarray]:
  """The small tensors of a layer as they are stored."""
  projection = np.asarray(params.projection, np.float32)
  matrix = projection.transpose(1, 2, 0).reshape(-1, len(projection))
  values, scales = pack_blocks(np.ascontiguousarray(matrix))
  return {
    "wkv.weight": values,
    "wkv.scale": scales,
    "q_weight": np.asarray(params.query_scale, "<f4"),
    "k_weight": np.asarray(params.key_scale, "<f4"),
  }


def _write_rows(
  file: BinaryIO,
  starts: list[int],
  chunks: Iterable[np.ndarray],
  layer: int,
  rows: int,
  d: int,
) -> None:
  """Packed rows as two tensors, values and scales, as they come."""
  size, total = RowFormat("fp8", d).bytes_per_row, 0
  parts = (starts[0], slice(0, d)), (starts[1], slice(d, size))
  field, valid = f"chunks[{layer}]", f"{rows} rows in all"
  for chunk in chunks:
    ok = chunk.dtype == np.uint8 and chunk.ndim == 2 and chunk.shape[1] == size
    found = f"{chunk.dtype}{list(chunk.shape)}"
    require(ok, field, found, f"uint8[rows, {size}]")
    ok = total + len(chunk) <= rows
    require(ok, field, f"{total + len(chunk)} rows", valid)
    for start, columns in parts:
      width = columns.stop - columns.start
      file.seek(start + total * width)
      file.write(chunk[:, columns].tobytes())
    total += len(chunk)
  require(total == rows, field, f"{total} rows", valid)


def _flush(file: BinaryIO) -> None:
  file.flush()
  os.fsync(file.fileno())


def _sync(folder: Path) -> None:
  """Makes the names in a folder survive a loss of power."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
