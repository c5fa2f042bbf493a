"""A V4.1 checkpoint of full size, opened and read: time, and what is resident.

  python -m experiments.benchmarks.full_size

The tables' files are as long as the released ones, 203 GB, and sparse: the
system keeps no block for what was never written, and gives zeros for it. In
--rows places of each table there are known bytes. A process of its own opens
the checkpoint, reads these rows as numbers, and compares every one of them.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from engram_jax.errors import require
from engram_jax.interop.deepseek_v41 import open_v41, tensor_shapes
from engram_jax.interop.safetensors_files import encode_header
from engram_jax.interop.v41_config import QUANTIZATION, RELEASED, V41Fields
from engram_jax.stores.store import unpack
from experiments.benchmarks import harness

#: Rows of each table, by Engram layer.
ROWS = dict(
  zip(RELEASED["engram_layer_ids"], RELEASED["engram_num_embeddings"])
)


def choose_ids(count: int) -> dict[int, np.ndarray]:
  """int64 [<= count + 2] per layer, ascending: some, the first and the last."""
  random = np.random.default_rng(1)
  return {
    layer: np.unique(np.r_[0, rows - 1, random.integers(0, rows, count)])
    for layer, rows in ROWS.items()
  }


def known_bytes(
  ids: Mapping[int, np.ndarray],
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """Values, uint8 [U, 256], and scales, uint8 [U, 8], of these rows."""
  random = np.random.default_rng(0)
  return {
    layer: (
      random.integers(0, 127, (len(x), 256), dtype=np.uint8),
      random.integers(100, 140, (len(x), 8), dtype=np.uint8),
    )
    for layer, x in ids.items()
  }


def as_numbers(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """What these bytes stand for, float32 [U, 256], by NumPy's own fp8."""
  numbers = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
  return numbers * np.repeat(factors, 32, axis=1)


def write_sparse(folder: pathlib.Path, ids: Mapping[int, np.ndarray]) -> None:
  """The released checkpoint's memory, with `known_bytes` in rows `ids`."""
  fields = V41Fields(**RELEASED, rms_norm_eps=1e-6)
  written, weight_map = known_bytes(ids), {}
  for shard, layer in enumerate(fields.engram_layer_ids, 47):
    path = folder / f"model-000{shard}-of-00048.safetensors"
    tensors = {
      name: (dtypes[0], shape)
      for name, (dtypes, shape) in tensor_shapes(fields, layer).items()
    }
    weight_map |= dict.fromkeys(tensors, path.name)
    header = encode_header(tensors)
    offsets = {
      name: entry["data_offsets"]
      for name, entry in json.loads(header[8:]).items()
    }
    values, scales = written[layer]
    with open(path, "xb") as file:
      file.write(header)
      file.truncate(len(header) + max(end for _, end in offsets.values()))
      for name, rows in (("weight", values), ("scale", scales)):
        start = offsets[f"layers.{layer}.engram.embed.{name}"][0] + len(header)
        for row, content in zip(ids[layer].tolist(), rows):
          file.seek(start + row * rows.shape[1])
          file.write(content.tobytes())
  config = {
    "text_config": RELEASED | {"rms_norm_eps": 1e-6},
    "quantization_config": QUANTIZATION,
  }
  (folder / "config.json").write_text(json.dumps(config))
  index = {"weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def has_sparse_files(folder: pathlib.Path) -> bool:
  """Whether a file that is long and empty takes no room there."""
  probe = folder / "probe"
  with open(probe, "wb") as file:
    file.truncate(2**26)
  try:
    return os.stat(probe).st_blocks * 512 <= 2**20
  finally:
    probe.unlink()


def open_and_read(*, folder: str, rows: int, repeats: int) -> harness.Figures:
  """In a child: opens, reads, compares."""
  before = harness.peak_memory()
  opening = [harness.seconds(lambda: open_v41(folder)) for _ in range(repeats)]
  checkpoint = open_v41(folder)
  opened = harness.peak_memory()
  store, ids = checkpoint.store, choose_ids(rows)
  start = time.perf_counter()
  packed = store.read(ids)
  reading = time.perf_counter() - start
  found = jax.jit(unpack, static_argnums=1)(packed, store.row_format)
  for layer, parts in known_bytes(ids).items():
    same = np.array_equal(found[layer], as_numbers(*parts))
    if not same:
      raise RuntimeError(f"layer {layer}: other rows than were written")
  return {
    "open_first_ms": 1e3 * opening[0],
    "open_median_ms": 1e3 * statistics.median(opening),
    "read_ms": 1e3 * reading,
    "rows_compared": sum(map(len, ids.values())),
    "before_mib": before / harness.MIB,
    "opened_mib": opened / harness.MIB,
  }


def measure(*, folder: str | None, rows: int, repeats: int) -> harness.Figures:
  """Writes the files and reads them in a child; arguments as the flags."""
  with tempfile.TemporaryDirectory(dir=folder) as name:
    path = pathlib.Path(name)
    valid = "one on a file system with sparse files"
    require(has_sparse_files(path), "folder", path.parent, valid)
    write_sparse(path, choose_ids(rows))
    sizes = [os.stat(file) for file in path.iterdir()]
    found = harness.in_child(
      open_and_read, folder=name, rows=rows, repeats=repeats
    )
  return {
    "files_gb": sum(status.st_size for status in sizes) / 1e9,
    "on_disk_mb": sum(status.st_blocks * 512 for status in sizes) / 1e6,
    **found,
  }


def tables(result: harness.Figures) -> list[str]:
  names = "before_mib opened_mib peak_mib files_gb on_disk_mb".split()
  columns = dict(zip(names, names))
  times = "open_first_ms open_median_ms read_ms rows_compared".split()
  return [
    harness.table(columns, [result]),
    harness.table(dict(zip(times, times)), [result]),
  ]


FLAGS = {
  "rows": (4000, "Known ones of each table, besides its first and last."),
  "folder": (None, "Where sparse files take no room; None for the system's."),
  "repeats": (9, "Times it is opened."),
}
BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
