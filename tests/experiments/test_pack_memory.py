"""Packing a trained memory: its rows come back, to the format's error."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.memory import Memory
from engram_jax.memory.table import lookup
from engram_jax.stores.host_stores import FileStore
from engram_jax.stores.quantization import unpack_rows
from engram_jax.stores.row_files import RowFile
from engram_jax.stores.store import unpack
from experiments import pack_memory as program_module
from experiments.pack_memory import pack_memory


def model(width=32, layers=(1, 3), padding=5):
  """What `pack_memory` asks of a trained model."""
  config = EngramConfig(
    hidden_size=8,
    layers=layers,
    rows_per_head=(60,),
    heads=2,
    head_dim=width,
    pad_id=2,
  )
  memory = Memory.create(config, vocab_size=50)
  random = np.random.default_rng(0)
  tables = {
    layer: jnp.asarray(random.normal(size=(rows + padding, width)), jnp.float32)
    for layer, rows in memory.num_rows.items()
  }
  return types.SimpleNamespace(
    tables=tables,
    memory=memory,
    identity=WeightsIdentity("ab" * 32, 4, "cd" * 32),
  )


@pytest.mark.parametrize(
  "name, bound",
  [("float32", 0), ("bfloat16", 2e-3), ("fp8", 0.03), ("int8", 0.008)],
)
def test_the_model_reads_its_rows_from_the_file(
  tmp_path, monkeypatch, name, bound
):
  monkeypatch.setattr(program_module, "CHUNK", 50)  # several, the last short
  trained = model()
  errors = pack_memory(trained, tmp_path / "rows", name)
  hashing, digest = trained.memory.hashing, trained.memory.compression.digest
  file = RowFile(tmp_path / "rows", hashing=hashing, compression_digest=digest)
  file.verify()
  assert file.header.made_from == trained.identity
  canonical = jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, 7)))
  ids = hashing.hash(canonical)
  found = unpack(FileStore(file).read(ids), file.header.row_format)
  for layer, rows in found.items():
    expected = np.asarray(lookup(trained.tables[layer], ids[layer]))
    squares = np.square(rows - expected).mean(), np.square(expected).mean()
    error = np.sqrt(squares[0] / squares[1])
    assert (error > 0) == (bound > 0) and error <= bound
    every = np.arange(hashing.num_rows[layer])
    packed = np.empty((len(every), file.header.row_format.bytes_per_row), "u1")
    file.read(layer, every, packed)
    table = np.asarray(trained.tables[layer])[: len(every)]
    difference = unpack_rows(packed, file.header.row_format) - table
    rms = np.sqrt(np.square(difference).sum() / np.square(table).sum())
    np.testing.assert_allclose(errors[layer], rms, rtol=1e-5)


def test_what_cannot_be_packed_is_refused_by_name(tmp_path):
  path = tmp_path / "rows"
  with pytest.raises(InputError, match=r"width: 24; valid: .*32 for fp8"):
    pack_memory(model(width=24), path, "fp8")
  bad = model()
  bad.tables[3] = bad.tables[3].at[7, 0].set(jnp.nan)
  with pytest.raises(InputError, match=r"tables\[3\]: .*rows 0 to .*; valid:"):
    pack_memory(bad, path, "int8")
  none = types.SimpleNamespace(tables={}, memory=None)
  with pytest.raises(InputError, match="workdir: no memory; valid: a run of"):
    pack_memory(none, path, "fp8")
  assert not list(tmp_path.iterdir())


def test_the_program_packs_a_run(program, tmp_path):
  run, path = tmp_path / "run", tmp_path / "memory.rows"
  trained = program("pretrain", f"--workdir={run}", "--config.train.steps=4")
  assert trained.returncode == 0, trained.stderr
  packed = program(
    "pack_memory",
    f"--workdir={run}",
    f"--output={path}",
    "--format=int8",
    configured=False,
  )
  assert packed.returncode == 0, packed.stderr
  assert "step 4" in packed.stdout and "int8, 8 bytes a row" in packed.stdout
  assert "relative error 0.00" in packed.stdout
  RowFile(path).verify()
