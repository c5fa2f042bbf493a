"""A store in each of the locations."""

import jax.numpy as jnp
import pytest

from engram_jax.stores.host_stores import FileStore, HostStore
from engram_jax.stores.program_stores import DeviceStore, PinnedStore
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file
from tests.stores.micro import ROWS, packed_tables


@pytest.fixture
def make(tmp_path):
  """Makes a store of the packed tables in one of the locations."""

  def make_store(location, name="fp8"):
    packed, row_format = packed_tables(name)
    if location == "device":
      arrays = {layer: jnp.asarray(x) for layer, x in packed.items()}
      return DeviceStore(arrays, row_format)
    if location == "pinned":
      return PinnedStore(packed, row_format)
    if location == "host":
      return HostStore(packed, row_format)
    header = Header(row_format, ROWS)
    chunks = {layer: [x] for layer, x in packed.items()}
    write_row_file(tmp_path / "rows", chunks, header)
    return FileStore(RowFile(tmp_path / "rows"))

  return make_store
