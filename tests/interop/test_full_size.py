"""The released tables at full size, 203 GB, of which a few MB are there."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.interop.deepseek_v41 import open_v41, tensor_shapes
from engram_jax.interop.safetensors_files import encode_header
from engram_jax.interop.v41_config import QUANTIZATION, RELEASED, V41Fields
from engram_jax.stores.store import unpack

STATM = pathlib.Path("/proc/self/statm")
GIB = 2**30
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


def resident() -> int:
  """Bytes of this process in memory, its pages of mapped files included."""
  return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def sparse(tmp_path):
  """Where a sparse file takes no room; emptied afterwards."""
  if not has_sparse_files(tmp_path):
    pytest.skip("this file system has no sparse files")
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  yield folder
  shutil.rmtree(folder)


@pytest.mark.skipif(not STATM.exists(), reason="asks Linux what is resident")
def test_opens_and_reads_without_loading(sparse):
  ids = choose_ids(1500)
  write_sparse(sparse, ids)
  sizes = [os.stat(path) for path in sparse.iterdir()]
  assert sum(status.st_size for status in sizes) > 202_758_032_400
  assert sum(status.st_blocks * 512 for status in sizes) < GIB // 8

  before = resident()
  checkpoint = open_v41(sparse)
  assert resident() - before < GIB // 8  # nothing but headers
  assert checkpoint.made_from is None
  store = checkpoint.store
  assert store.num_rows == {1: 384_006_168, 14: 384_016_682}
  assert store.row_format.bytes_per_row == 264
  packed = store.read(ids)
  found = jax.jit(unpack, static_argnums=1)(packed, store.row_format)
  assert resident() - before < GIB
  for layer, parts in known_bytes(ids).items():
    expected = as_numbers(*parts)
    np.testing.assert_array_equal(found[layer], expected)
    # What was never written is zeros with scale byte 0, not a neighbour's row.
    between = np.setdiff1d(ids[layer][:-1] + 1, ids[layer])
    assert not store.read({layer: between}).packed[layer].any()
    rows = ROWS[layer]
    with pytest.raises(InputError, match=rf"0 <= id < {rows}"):
      store.read({layer: np.array([rows])})
