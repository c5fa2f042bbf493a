"""The released tables at full size, 203 GB, of which a few MB are there."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.interop.deepseek_v41 import open_v41
from engram_jax.stores.store import unpack
from experiments.benchmarks import full_size

STATM = pathlib.Path("/proc/self/statm")
GIB = 2**30


def resident() -> int:
  """Bytes of this process in memory, its pages of mapped files included."""
  return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def sparse(tmp_path):
  """Where a sparse file takes no room; emptied afterwards."""
  if not full_size.has_sparse_files(tmp_path):
    pytest.skip("this file system has no sparse files")
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  yield folder
  shutil.rmtree(folder)


@pytest.mark.skipif(not STATM.exists(), reason="asks Linux what is resident")
def test_opens_and_reads_without_loading(sparse):
  ids = full_size.choose_ids(1500)
  full_size.write_sparse(sparse, ids)
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
  for layer, parts in full_size.known_bytes(ids).items():
    expected = full_size.as_numbers(*parts)
    np.testing.assert_array_equal(found[layer], expected)
    # What was never written is zeros with scale byte 0, not a neighbour's row.
    between = np.setdiff1d(ids[layer][:-1] + 1, ids[layer])
    assert not store.read({layer: between}).packed[layer].any()
    rows = full_size.ROWS[layer]
    with pytest.raises(InputError, match=rf"0 <= id < {rows}"):
      store.read({layer: np.array([rows])})
  figures = full_size.open_and_read(folder=str(sparse), rows=1500, repeats=2)
  assert figures["rows_compared"] == sum(map(len, ids.values()))
