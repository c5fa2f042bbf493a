"""Compiles the training step for devices that are not here.

  python -m experiments.compile_for_pod --preset=engram_27b \
    --compare_with=moe_27b --topology=v5p:4x4x8 --batch_per_chip=1 \
    --out=experiments/results/pod_engram_27b_v5p.json
  python -m experiments.compile_for_pod --without_memory \
    --config=experiments/configs/memory_100b.py --topology=v6e:16x16

The whole step: sharded state, optimizers, donated buffers, rows exchanged
between chips. Nothing runs and nothing is allocated. libtpu (`pip install
libtpu`) compiles for TPUs on any Linux machine; `--topology=cpu:8` is for as
many simulated CPU devices. The program says what each chip holds, whether that
fits and what is to blame if not, what travels between chips, how long it took
to compile, how long XLA thinks the step takes, and which operations take most
of it.

What the estimates are not: measurements. The first is the sum over operations
of their time at the chip's peak rates; the second that of the cycles that the
compiler reckoned with. Links between chips are in neither: the bytes that they
carry are given beside them. `engram_jax/analysis/estimates.py` says more.
"""

import collections
import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from engram_jax import progress, sharding
from engram_jax.analysis import compiled as analysis
from engram_jax.analysis import hlo
from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.analysis.ahead_of_time import compile_for, hbm_gib, tpu_devices
from engram_jax.analysis.estimates import RATES
from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError, require
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.state import flatten
from engram_jax.training.step import make_train_step
from experiments import pod_report
from experiments.benchmarks import harness, models
from experiments.configs.preset import chosen, experiment_of

FLAGS = {
  "topology": (None, "A TPU slice, e.g. v5p:4x4x8 or v6e:16x16; or cpu:N."),
  "preset": (None, "Instead of --config: a model of engram_jax/presets.py."),
  "without_memory": (False, "Compile the same model without a memory too."),
  "compare_with": (None, "Compile this preset too, at equal chips and batch."),
  "batch_per_chip": (0, "Sequences of a step on a chip; 0: as configured."),
  "accumulation": (
    0,
    "Microbatches; 0 for 1 with --batch_per_chip, else as configured.",
  ),
}
#: Arrays and collectives named one by one.
LISTED = 5
#: Operations named one by one.
TOP = 12


# --- devices ---


def devices_of(topology: str) -> Sequence[jax.Device]:
  """The devices of `--topology`.

  Raises:
    InputError: a topology that there is not, or libtpu is missing.
  """
  if not jax.config.jax_platforms:
    # The device compiled for is not one that runs here.
    jax.config.update("jax_platforms", "cpu")
  generation, _, size = topology.partition(":")
  if generation != "cpu":
    try:
      return tpu_devices(topology)
    except InputError as error:
      valid = f"cpu:N, or {error.valid}"
      raise InputError(error.field, error.value, valid) from None
  # More than four digits: threads and memory of a machine run out before.
  ok = size.isdecimal() and len(size) < 5 and int(size) > 1
  require(ok, "topology", topology, "cpu:N with N of 2 to 9999")
  jax.config.update("jax_num_cpu_devices", int(size))
  return jax.devices("cpu")


def make_mesh(config: ExperimentConfig, devices: Sequence[jax.Device]) -> Mesh:
  """The run's mesh over two devices or more."""
  mesh = sharding.make_mesh(config.mesh, devices=devices)
  require(mesh is not None, "topology", "one device", "two devices or more")
  sharding.require_fit(config, mesh)
  return mesh


# --- the step ---


def bytes_per_device(leaf: Any) -> int:
  """Bytes of an array's part on one device, before any padding in memory."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def compile_step(
  config: ExperimentConfig, mesh: Mesh, *, generation: str
) -> harness.Figures:
  """Compiles the step and reads off what it says.

  Args:
    config: the run.
    mesh: mesh of the devices to compile for.
    generation: TPU generation, or `cpu`.

  Returns:
    The figures, ready for JSON. `fits` is the compiler's own word, with
    `refusal` in its words; a program that it refuses has no figures beyond the
    arguments and its `largest_temporaries`.
  """
  model, train = config.model, config.train
  # The hash is over raw token ids, without a tokenizer.
  setup = models.make_setup(model, train, mesh=mesh, mesh_config=config.mesh)
  state = setup.abstract_state()
  batch = models.abstract_batch(
    train.batch_size, train.seq_len, placed=sharding.batch_sharding(mesh)
  )
  capacity = setup.lookup_capacity(batch).rows
  arrays = flatten(state).items()
  leaves = {name: bytes_per_device(leaf) for name, leaf in arrays if leaf.size}
  parts: collections.Counter[str] = collections.Counter()
  for name, size in leaves.items():
    parts[name.split("/")[0]] += size
  largest = sorted(leaves.items(), key=lambda item: -item[1])[:LISTED]
  hashing = setup.memory and setup.memory.hashing
  parameters = count_parameters_by_part(model, hashing)
  sequences = train.batch_size / mesh.size
  result = {
    "mesh": dict(mesh.shape),
    "sequences": sequences,
    "tokens": sequences * train.seq_len,
    "accumulation": train.accumulation,
    "parameters": {k: parameters[k] for k in ("total", "tables", "activated")},
    "state_bytes": dict(parts),
    "largest_arrays": dict(largest),
    "lookup_capacity": capacity,
  }
  held = progress.size(sum(leaves.values()))
  progress.say(
    f"{parameters['total']:,} parameters, {held} of state on each device"
  )
  step = make_train_step(setup, capacity=capacity)
  platform = "cpu" if generation == "cpu" else "tpu"
  executable, about = compile_for(platform, step, state, batch)
  result |= about
  if executable is None:
    return result
  shapes = {table.shape for table in state.tables.values()}
  turns = attention_turns(config)
  return result | figures(executable, shapes, mesh.size, generation, turns)


def figures(
  executable: jax.stages.Compiled,
  tables: set[tuple[int, int]],
  devices: int,
  generation: str,
  turns: int,
) -> harness.Figures:
  """What a compiled step holds, computes and sends, ready for JSON.

  Args:
    executable: the compiled step.
    tables: shapes of the tables, shared by so many `devices`.
    generation: TPU generation, or `cpu`.
    turns: from `attention_turns`.
  """
  listing, rates = executable.as_text(), RATES.get(generation)
  sent, copied = analysis.collectives(listing), analysis.copies(listing)

  def named(record: analysis.Movement) -> harness.Figures:
    # Of the arrays that XLA joined, the largest and their number.
    return record._asdict() | {"arrays": len(record.arrays)}

  def of_tables(records: Sequence[analysis.Movement]) -> list[harness.Figures]:
    found = (
      analysis.of_table(records, rows=rows, width=width, devices=devices)
      for rows, width in sorted(tables)
    )
    return [named(record) for of_one in found for record in of_one]

  computations = hlo.parse(listing).computations.values()
  return {
    "instructions": sum(map(len, computations)),
    "memory": analysis.memory_report(executable),
    "cost": analysis.cost(listing, rates, unknown_turns=turns),
    "unknown_turns": turns,
    "top_operations": rates
    and analysis.top_operations(listing, rates, count=TOP, unknown_turns=turns),
    "collectives": {
      "bytes": analysis.collective_bytes(sent),
      "operations": analysis.collective_counts(sent),
      "in_loops": sum(record.count for record in sent if record.in_loop),
      "executions": sum(record.times for record in sent),
      "largest": [named(record) for record in sent[:LISTED]],
      "of_tables": of_tables(sent),
    },
    "copies_of_tables": of_tables(copied),
  }


def attention_turns(config: ExperimentConfig) -> int:
  """Blocks of keys that a block of queries sees, in the mean, rounded up.

  How often the loops turn whose end depends on the data: attention's alone.
  """
  block = config.model.attention.block_size
  blocks = -(-config.train.seq_len // block) if block else 1
  return (blocks + 2) // 2 if block else 1


# --- the runs to compile ---


def with_batch(
  config: ExperimentConfig,
  devices: int,
  *,
  per_chip: int = 0,
  accumulation: int = 0,
) -> ExperimentConfig:
  """The run with another batch; arguments as the flags, on so many devices."""
  changes = {}
  if per_chip:
    changes = {"batch_size": per_chip * devices, "accumulation": 1}
  if accumulation:
    changes["accumulation"] = accumulation
  train = dataclasses.replace(config.train, **changes)
  return dataclasses.replace(config, train=train)


def with_and_without(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
  """The run with and without its memory."""
  valid = "a memory: without_memory compares with and without"
  require(config.model.engram is not None, "model.engram", None, valid)
  model = dataclasses.replace(config.model, engram=None)
  plain = dataclasses.replace(config, model=model)
  return {"with memory": config, "without": plain}


def compared_with(
  config: ExperimentConfig, name: str, other: str
) -> dict[str, ExperimentConfig]:
  """The run, and that of a preset at the same batch."""
  valid = "another model than the first"
  require(name != other, "compare_with", other, valid)
  second = experiment_of(other)
  same = ("batch_size", "seq_len", "accumulation")
  batch = {field: getattr(config.train, field) for field in same}
  train = dataclasses.replace(second.train, **batch)
  return {name: config, other: dataclasses.replace(second, train=train)}


def compile_runs(
  configs: Mapping[str, ExperimentConfig],
  topology: str,
  devices: Sequence[jax.Device],
) -> harness.Figures:
  """Compiles each run for `topology`; of two, how they compare."""
  generation = topology.partition(":")[0]
  meshes = {name: make_mesh(c, devices) for name, c in configs.items()}
  programs = {}
  for name, config in configs.items():
    what = f"compiling {name} for {len(devices)} devices of {topology}"
    with progress.waiting(what):
      programs[name] = compile_step(config, meshes[name], generation=generation)
  result = {
    "topology": topology,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "hbm_gib": hbm_gib(topology),
    "libtpu": generation != "cpu" and importlib.metadata.version("libtpu"),
    "configs": {name: to_dict(config) for name, config in configs.items()},
    "programs": programs,
  }
  for key in ("optimal_seconds", "compiler_seconds"):
    seconds = [p["cost"][key] for p in programs.values() if p["fits"]]
    if len(seconds) == 2 and all(seconds):
      result[f"{key}_ratio"] = seconds[0] / seconds[1]
  return result


def measure(
  *,
  configured: ml_collections.ConfigDict | None,
  topology: str,
  preset: str | None,
  without_memory: bool,
  compare_with: str | None,
  batch_per_chip: int,
  accumulation: int,
) -> harness.Figures:
  """Compiles what is asked for; arguments as the flags."""
  valid = "one of --compare_with and --without_memory, or neither"
  both = without_memory and compare_with
  require(not both, "compare_with", compare_with, valid)
  devices = devices_of(topology)
  config = with_batch(
    chosen(preset, configured),
    len(devices),
    per_chip=batch_per_chip,
    accumulation=accumulation,
  )
  name = preset or "as configured"
  configs = {name: config}
  if without_memory:
    configs = with_and_without(config)
  elif compare_with:
    configs = compared_with(config, name, compare_with)
  return compile_runs(configs, topology, devices)


BENCHMARK = harness.Benchmark(
  measure, pod_report.tables, FLAGS, required=("topology",), configured=True
)

if __name__ == "__main__":
  harness.run(BENCHMARK)
