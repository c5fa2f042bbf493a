"""Stores, rows and files that benchmarks make, and their tests use.

A packed row r of a layer is row (r mod `POOL`) of its random ones, so that a
file of any size is made, and checked, from a small part of it.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.host_stores import FileStore, HostReads
from engram_jax.stores.quantization import RowFormat, pack_rows, unpack_rows
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file
from engram_jax.stores.store import (
  Buffers,
  PackedRows,
  ReadStatistics,
  RowIdsByLayer,
)
from experiments.benchmarks import harness

#: Different rows of a table; they come again and again.
POOL = 2**16
#: About as many duplicates as bigrams and trigrams of text have.
ZIPF = 1.1
DISTRIBUTIONS = ("zipf", "uniform")


class SlowStore:
  """Another host store, made slower, to measure what hides a slow one.

  A read sleeps `delay_s` after the store's own work; other threads run
  meanwhile.

  Args:
    store: a `HostStore`, a `FileStore`, or another one of `HostReads`.
    delay_s: seconds added to each read.

  Raises:
    InputError: another kind of store, or a negative delay.
  """

  def __init__(self, store: HostReads, *, delay_s: float):
    found, valid = type(store).__name__, "a HostStore, FileStore or the like"
    require(isinstance(store, HostReads), "store", found, valid)
    ok = math.isfinite(delay_s) and delay_s >= 0
    require(ok, "delay_s", delay_s, "a finite number >= 0")
    self.store, self.delay_s = store, delay_s
    self.row_format, self.num_rows = store.row_format, store.num_rows

  @property
  def layers(self) -> tuple[int, ...]:
    return self.store.layers

  @property
  def statistics(self) -> ReadStatistics:
    return self.store.statistics

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """See `RowStore`."""
    rows = self.store.read(row_ids, buffers=buffers)
    time.sleep(self.delay_s)
    return rows


def forget_pages(store: FileStore) -> None:
  """Gives what was read of a store's file back: it comes from the disk again.

  The file is opened anew, for pages that a process maps stay; nothing else may
  hold the old one. Where a system cannot drop pages they stay in its cache.
  """
  path = store.file.path
  store.file = None
  if hasattr(os, "posix_fadvise"):
    with open(path, "rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  store.file = RowFile(path)


def draw_ids(distribution: str, shape: Sequence[int], rows: int) -> np.ndarray:
  """int32 ids below `rows`; the frequent ones are anywhere in the table."""
  rng, valid = harness.rng(), f"of {', '.join(DISTRIBUTIONS)}"
  require(distribution in DISTRIBUTIONS, "distributions", distribution, valid)
  if distribution == "uniform":
    return rng.integers(0, rows, shape, dtype=np.int32)
  ranks = (rng.zipf(ZIPF, shape) - 1) % rows
  return rng.permutation(rows)[ranks].astype(np.int32)


def make_rows(
  num_rows: Mapping[int, int], row_format: RowFormat
) -> dict[int, np.ndarray]:
  """Random packed rows, uint8 [R, n] per layer."""
  pack = jax.jit(pack_rows, static_argnums=1)
  packed = {}
  for layer, rows in num_rows.items():
    key = jax.random.fold_in(jax.random.key(harness.SEED), layer)
    shape = min(rows, POOL), row_format.width
    pool = np.array(pack(0.02 * jax.random.normal(key, shape), row_format))
    # Every page is one of its own.
    packed[layer] = np.resize(pool, (rows, row_format.bytes_per_row))
  return packed


def to_tables(
  packed: Mapping[int, np.ndarray], row_format: RowFormat
) -> dict[int, jax.Array]:
  """The numbers that packed rows stand for, float32 [R, d] per layer."""
  unpack = jax.jit(unpack_rows, static_argnums=1)
  return {i: unpack(jnp.asarray(x), row_format) for i, x in packed.items()}


def make_row_file(
  path: pathlib.Path, hashing: NgramHash, row_format: RowFormat
) -> RowFile:
  """The file of `make_rows`' rows, made if it is not there, and opened.

  Raises:
    InputError: a file that is there, and holds other rows.
  """
  pool = make_rows(dict.fromkeys(hashing.layers, POOL), row_format)

  def chunks(layer: int, rows: int) -> Iterator[np.ndarray]:
    for first in range(0, rows, POOL):
      yield pool[layer][: min(POOL, rows - first)]

  if not path.exists():
    header = Header(row_format, hashing.num_rows, hashing)
    numbers = hashing.num_rows.items()
    write_row_file(path, {i: chunks(i, n) for i, n in numbers}, header)
  file, rng = RowFile(path, hashing=hashing), harness.rng(1)
  for layer, rows in hashing.num_rows.items():
    ids = np.sort(rng.integers(0, rows, 1000))
    out = np.empty((len(ids), row_format.bytes_per_row), np.uint8)
    file.read(layer, ids, out)
    same = np.array_equal(out, pool[layer][ids % POOL])
    require(same, "file", path, "one that this program made")
  return file


def with_memory_of(
  model: ModelConfig, gib: float, row_format: RowFormat
) -> ModelConfig:
  """The model with as many rows of the format as `gib` of packed ones are."""
  memory = model.engram
  per_layer = gib * harness.GIB / row_format.bytes_per_row / len(memory.layers)
  rows = int(per_layer / (memory.heads * len(memory.rows_per_head)))
  require(rows >= 1000, "gib", gib, "rows enough: 1,000 or more for a head")
  memory = dataclasses.replace(memory, head_dim=row_format.width)
  return with_rows(dataclasses.replace(model, engram=memory), rows)


def with_rows(model: ModelConfig, rows: int) -> ModelConfig:
  """The model with so many rows for each head."""
  orders = len(model.engram.rows_per_head)
  memory = dataclasses.replace(model.engram, rows_per_head=(rows,) * orders)
  return dataclasses.replace(model, engram=memory)
