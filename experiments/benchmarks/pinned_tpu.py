"""The inference step with its tables in a TPU's host memory, compiled.

  python -m experiments.benchmarks.pinned_tpu
  python -m experiments.benchmarks.pinned_tpu --presets=medium \
    --topologies=v6e:2x2

One program is a whole step of decoding, of a chunk of a prompt or of one token
each, on one chip of the topology:

  hash, gather of packed rows, unpack, model

The packed tables are its arguments, in one of two locations: the chip's memory,
or pinned host memory, where the host's processor gathers the rows in the midst
of the program. Nothing runs and nothing is allocated; libtpu (`pip install
libtpu`) compiles on any Linux machine. The figures are the compiler's: what the
program's arguments and temporaries take on the chip and on the host.

To reach: with pinned tables every step compiles, the arguments on the host are
the tables' bytes, and no table is copied. Whether tables in the chip's memory
fit is told beside it. Weights are as decoders have them
(`decoding/weights.py`).
"""

import functools
import importlib.metadata
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding

from engram_jax.analysis import compiled as analysis
from engram_jax.analysis.ahead_of_time import compile_for, hbm_gib
from engram_jax.decoding.decoders import Decoded, lookup_chunk
from engram_jax.decoding.forward import lower_blocks, upper_blocks
from engram_jax.decoding.state import DecodeState, init_state
from engram_jax.decoding.weights import DecodingModel, for_decoding
from engram_jax.memory.memory import Memory
from engram_jax.presets import Preset
from engram_jax.presets import preset as find_preset
from engram_jax.stores.pinned import pinned_format
from engram_jax.stores.program_stores import (
  DeviceStore,
  PinnedStore,
  ProgramStore,
)
from engram_jax.stores.quantization import RowFormat
from engram_jax.training.setup import TrainSetup
from experiments.benchmarks import harness, models
from experiments.compile_for_pod import devices_of

#: The stores by location of the tables.
STORES = {"device": DeviceStore, "pinned": PinnedStore}
#: An untiled table is rounded up to so many bytes.
ROUNDED = 1024
FLAGS = {
  "presets": (["medium", "v41_memory"], "Models with a memory."),
  "topologies": (["v5p:2x2x1", "v6e:2x2"], "TPU slices; a chip of each."),
  "row_format": ("fp8", "Of the packed rows."),
  "batch": (8, "Sequences."),
  "chunk": (256, "Tokens of a chunk."),
  "capacity": (4096, "Tokens of a sequence in the cache."),
}


@functools.partial(jax.jit, static_argnames="memory", donate_argnames="state")
def step(
  model: DecodingModel,
  memory: Memory,
  store: ProgramStore,
  state: DecodeState,
  token_ids: jax.Array,
  lengths: jax.Array,
) -> Decoded:
  """A whole step of decoding as one program; token ids [B, L], lengths [B]."""
  rows, history = lookup_chunk(store, memory, state.history, token_ids, lengths)
  streams, cache = lower_blocks(model, state.cache, token_ids)
  logits, cache = upper_blocks(model, streams, cache, rows, lengths)
  return logits, DecodeState(cache, history)


def abstract_store(
  memory: Memory,
  row_format: RowFormat,
  *,
  location: str,
  place: Format | Sharding,
) -> ProgramStore:
  """A store of shapes, of the memory's size and in this place."""
  size = row_format.bytes_per_row
  one = np.zeros((1, size), np.uint8)
  store = STORES[location](dict.fromkeys(memory.layers, one), row_format)
  shapes = {
    layer: jax.ShapeDtypeStruct((rows, size), jnp.uint8, sharding=place)
    for layer, rows in memory.num_rows.items()
  }
  return jax.tree.unflatten(jax.tree.structure(store), jax.tree.leaves(shapes))


def abstract_arguments(
  setup: TrainSetup,
  row_format: RowFormat,
  *,
  location: str,
  device: jax.Device,
  batch: int,
  tokens: int,
  capacity: int,
) -> tuple[Any, ...]:
  """Shapes, dtypes and places of a step's arguments on one device."""
  memory, there = setup.memory, pinned_format(device)
  here = there.sharding.with_memory_kind("device")
  model = jax.eval_shape(
    for_decoding, setup.merge_model(setup.abstract_state())
  )
  state = jax.eval_shape(
    lambda model: init_state(model, memory, batch=batch, capacity=capacity),
    model,
  )
  ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  model, state, ids, lengths = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    (model, state, ids, lengths),
  )
  place = there if location == "pinned" else here
  store = abstract_store(memory, row_format, location=location, place=place)
  return model, memory, store, state, ids, lengths


def bytes_of(tree: Any) -> int:
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def compile_step(
  config: Preset,
  *,
  device: jax.Device,
  location: str,
  row_format: str,
  tokens: int,
  **sizes: int,
) -> harness.Figures:
  """Compiles one step, and reads off what it takes.

  Args:
    config: a model with a memory, and its training.
    device: device to compile for.
    location: where the tables lie and are gathered, one of `STORES`.
    row_format: format of the packed rows.
    tokens: L.
    **sizes: `batch` and `capacity`, as the flags.

  Returns:
    `model_bytes`, `tables_bytes` and `state_bytes` as they are; what
    `compile_for` says; and if it fits `memory` on the device (its `peak` with
    the host's arguments) and `host_memory`, in bytes, and how many
    `copies_of_tables` on the device each step makes.
  """
  setup = models.make_setup(config.model, config.train)
  row_format = RowFormat(row_format, config.model.engram.head_dim)
  options = dict(location=location, device=device, tokens=tokens, **sizes)
  arguments = abstract_arguments(setup, row_format, **options)
  model, _, store, state, *_ = arguments
  executable, about = compile_for(device.platform, step, *arguments)
  found = {
    "location": location,
    "tokens": tokens,
    "model_bytes": bytes_of(model),
    "state_bytes": bytes_of(state),
    "tables": len(store.tables),
    "tables_bytes": bytes_of(store),
    **about,
  }
  if executable is None:
    return found
  memory, copies = executable.memory_analysis(), analysis.copies(executable)
  host = ("argument", "output", "alias", "temp")
  return {
    **found,
    "memory": analysis.memory_report(executable),
    "host_memory": {
      name: int(getattr(memory, f"host_{name}_size_in_bytes")) for name in host
    },
    "copies_of_tables": sum(
      len(analysis.of_table(copies, rows=rows, width=width, devices=1))
      for rows, width in {table.shape for table in store.tables.values()}
    ),
  }


def host_bytes_besides(record: Mapping[str, Any]) -> float:
  """How far the arguments on the host are from the tables' bytes, a table."""
  more = record["host_memory"]["argument"] - record["tables_bytes"]
  return abs(more) / record["tables"]


def measure(
  *, presets: Sequence[str], topologies: Sequence[str], chunk: int, **options
) -> harness.Figures:
  """Both stores, a chunk and a token, on one chip; arguments as the flags."""
  records = []
  for preset, topology in itertools.product(presets, topologies):
    device, config = devices_of(topology)[0], find_preset(preset)
    about = {"preset": preset, "topology": topology}
    about |= {"hbm_gib": hbm_gib(topology), "device_kind": device.device_kind}
    for tokens, location in itertools.product((chunk, 1), STORES):
      what = f"{topology}, {preset}, {location}, {tokens} tokens ..."
      print(what, file=sys.stderr, flush=True)
      case = dict(device=device, location=location, tokens=tokens)
      records.append(about | compile_step(config, **case, **options))
  version = importlib.metadata.version("libtpu")
  return {"libtpu": version, "targets": targets(records), "records": records}


def targets(records: Sequence[Mapping[str, Any]]) -> harness.Figures:
  """Whether the aims are reached."""
  pinned = [r for r in records if r["location"] == "pinned"]
  fitting = [r for r in pinned if r["fits"]]
  copied = sum(r["copies_of_tables"] for r in fitting)
  besides = max(map(host_bytes_besides, fitting), default=0)
  return {
    "pinned steps that compile": harness.target(
      len(fitting), at_least=len(pinned)
    ),
    "host bytes besides a table's": harness.target(besides, at_most=ROUNDED),
    "tables copied": harness.target(copied, at_most=0),
  }


def tables(result: harness.Figures) -> list[str]:
  records = result["records"]
  columns = {
    "model": "preset",
    "chip": lambda r: r["topology"].partition(":")[0],
    "tokens": "tokens",
    "tables in": "location",
    "fits": lambda r: f"{'yes' if r['fits'] else 'NO'}, {r['hbm_gib']}",
  }
  for header, path in {
    "tables": "tables_bytes",
    "weights": "model_bytes",
    "cache": "state_bytes",
    "arguments": "memory.argument",
    "temp": "memory.temp",
    "host arguments": "host_memory.argument",
    "host temp": "host_memory.temp",
  }.items():
    columns[header] = harness.scaled(path, harness.GIB)
  columns |= {"copied": "copies_of_tables", "compile s": "compile_seconds"}
  refused = [
    f"{r['preset']} on {r['topology']}, {r['tokens']} tokens, {r['location']}: "
    f"{r['refusal']}"
    for r in records
    if not r["fits"]
  ]
  return [harness.table(columns, records, title="GiB"), *refused]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
