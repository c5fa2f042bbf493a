"""A step with pinned tables: run on the CPU, compiled for a TPU."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.decoding.decoders import Decoder
from engram_jax.decoding.state import init_state
from engram_jax.decoding.weights import for_decoding
from engram_jax.stores.open_store import pack_tables
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.quantization import unpack_rows
from experiments.benchmarks import pinned_tpu
from experiments.benchmarks.models import make_setup
from tests.experiments.micro import experiment
from tests.libtpu import needs_libtpu

SIZES = dict(batch=2, capacity=16, row_format="fp8")


def micro(width=32):
  """The smallest model, with rows that every format takes."""
  config = experiment()
  memory = dataclasses.replace(config.model.engram, head_dim=width)
  model = dataclasses.replace(config.model, engram=memory)
  return dataclasses.replace(config, model=model)


def micro_setup():
  config = micro()
  return make_setup(config.model, config.train)


@pytest.fixture(scope="module")
def tiny():
  """Model, memory and tables [R, d]; drawn by NumPy."""
  setup, random = micro_setup(), np.random.default_rng(0)

  def drawn(path, leaf):
    value = 0.3 * random.normal(size=leaf.shape) + ("scale" in str(path))
    return jnp.asarray(value, leaf.dtype)

  state = setup.abstract_state()
  params, balance = jax.tree.map_with_path(drawn, (state.params, state.balance))
  tables = {
    layer: jnp.asarray(random.normal(size=(rows, 32)), jnp.float32)
    for layer, rows in setup.memory.num_rows.items()
  }
  return nnx.merge(setup.graphdef, params, balance), setup.memory, tables


def steps_of(tiny, location, name):
  """Logits of a prompt's chunk and two tokens, in one program each."""
  model, memory, tables = tiny
  packed, row_format = pack_tables(tables, memory.hashing, name)
  store = pinned_tpu.STORES[location](packed, row_format)
  model = for_decoding(model)
  state = init_state(model, memory, batch=2, capacity=16)
  logits = []
  for tokens, lengths in CHUNKS:
    found, state = pinned_tpu.step(model, memory, store, state, tokens, lengths)
    logits.append(np.asarray(found))
  return logits


ONE = np.ones(2, np.int32)
CHUNKS = (
  (np.array([[5, 6, 7, 8], [9, 5, 0, 0]], np.int32), np.array([4, 2])),
  (np.array([[11], [6]], np.int32), ONE),
  (np.array([[12], [7]], np.int32), ONE),
)


@pytest.mark.parametrize("name", ["float32", "fp8"])
def test_the_steps_are_those_of_a_table_decoder(tiny, name):
  model, memory, tables = tiny
  packed, row_format = pack_tables(tables, memory.hashing, name)
  kept = {i: jnp.asarray(unpack_rows(x, row_format)) for i, x in packed.items()}
  decoder = Decoder(model, memory, TableStore(kept))
  state, expected = decoder.init_state(2, 16), []
  for chunk in CHUNKS:
    logits, state = decoder.start(state, *chunk)()
    expected.append(np.asarray(logits))
  pinned = steps_of(tiny, "pinned", name)
  for found, logits in zip(pinned, expected):
    np.testing.assert_array_equal(found, logits)
  if name == "fp8":
    for found, logits in zip(steps_of(tiny, "device", name), pinned):
      np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize("location", list(pinned_tpu.STORES))
def test_compiles_from_shapes_alone(location):
  record = pinned_tpu.compile_step(
    micro(), device=jax.local_devices()[0], location=location, tokens=3, **SIZES
  )
  assert json.loads(json.dumps(record)) == record
  rows = sum(micro_setup().memory.num_rows.values())
  assert record["tables_bytes"] == 33 * rows
  assert record["fits"] and record["copies_of_tables"] == 0
  assert record["host_memory"].keys() == {"argument", "output", "alias", "temp"}
  arguments = record["memory"]["argument"] + record["host_memory"]["argument"]
  sizes = [record[f"{x}_bytes"] for x in ("tables", "model", "state")]
  assert arguments == pytest.approx(sum(sizes), abs=100)


def record(location, **more):
  """Of 4 GiB of tables, on a chip of 2."""
  chip = {"topology": "v5e:2x2", "hbm_gib": 2}
  sizes = dict(tables_bytes=2**32, model_bytes=2**30, state_bytes=2**20)
  sizes["tables"] = 1
  return {
    "preset": "p",
    **chip,
    "location": location,
    "tokens": 1,
    **sizes,
    **more,
  }


def test_says_what_fits_and_where_the_tables_are():
  pinned = record(
    "pinned",
    fits=True,
    compile_seconds=1.0,
    copies_of_tables=0,
    memory={"argument": 2**30, "temp": 2**29},
    host_memory={"argument": 2**32 + 512, "temp": 0},
  )
  records = [record("device", fits=False, refusal="Ran out of HBM"), pinned]
  table, reason = pinned_tpu.tables({"records": records})
  refused, fitting = table.splitlines()[3:]
  assert "NO, 2" in refused and "yes, 2" in fitting
  assert ["1", "0.5", "4", "0"] == fitting.split()[-6:-2]
  assert reason == "p on v5e:2x2, 1 tokens, device: Ran out of HBM"
  assert reached(records) == [True, True, True]
  for wrong in (-1025, 1025):
    host = {"argument": 2**32 + wrong, "temp": 0}
    assert reached([{**pinned, "host_memory": host}]) == [True, False, True]
  assert reached([{**pinned, "copies_of_tables": 1}]) == [True, True, False]
  records.append(record("pinned", fits=False, refusal="no"))
  assert reached(records) == [False, True, True]


def reached(records):
  return [one["reached"] for one in pinned_tpu.targets(records).values()]


@needs_libtpu
def test_compiles_for_a_tpu():
  # In a process of its own: libtpu, once loaded, stays. Rows of 33, 132 and 512
  # bytes: in a TPU's own layout the last ends the process.
  code = """
from experiments.benchmarks import pinned_tpu
from experiments.compile_for_pod import devices_of
from tests.experiments.test_pinned_tpu import micro
device = devices_of("v5e:2x2")[0]
for width, name in ((32, "fp8"), (128, "int8"), (128, "float32")):
  record = pinned_tpu.compile_step(
    micro(width), device=device, location="pinned", tokens=1, batch=2,
    capacity=16, row_format=name)
  assert record["fits"] and record["copies_of_tables"] == 0, record
  assert pinned_tpu.host_bytes_besides(record) < pinned_tpu.ROUNDED, record
"""
  subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
