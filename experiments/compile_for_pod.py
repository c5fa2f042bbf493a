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
fits and what is to blame if not, what travels between chips, how long XLA
thinks the step takes, and which operations take most of it.

What the estimates are not: measurements. The first is the sum over operations
of their time at the chip's peak rates; the second that of the cycles that the
compiler reckoned with. Links between chips are in neither: the bytes that they
carry are given beside them. `engram_jax/analysis/estimates.py` says more.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from engram_jax import progress, sharding
from engram_jax.analysis import compiled as analysis
from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.analysis.estimates import RATES
from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError, require
from engram_jax.run_config import ExperimentConfig, MeshConfig
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import flatten
from engram_jax.training.step import make_train_step
from experiments import cli, pod_report
from experiments.benchmarks import models
from experiments.configs.preset import chosen, experiment_of
from experiments.results import require_place, write_result

_FLAGS = cli.flag_values(__name__)
_CONFIG = cli.define_config(_FLAGS)
_PRESET = flags.DEFINE_string(
  "preset",
  None,
  "Instead of --config: a model of engram_jax/presets.py.",
  flag_values=_FLAGS,
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "A TPU slice, e.g. v5p:4x4x8 or v6e:16x16; or cpu:N.",
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  "out", None, "JSON file for the result.", flag_values=_FLAGS
)
_WITHOUT = flags.DEFINE_bool(
  "without_memory",
  False,
  "Compile the same model without a memory too.",
  flag_values=_FLAGS,
)
_COMPARE = flags.DEFINE_string(
  "compare_with",
  None,
  "Compile this preset too, at equal chips and batch.",
  flag_values=_FLAGS,
)
_PER_CHIP = flags.DEFINE_integer(
  "batch_per_chip",
  None,
  "Sequences of one step on one chip.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_ACCUMULATION = flags.DEFINE_integer(
  "accumulation",
  None,
  "Microbatches of one step; 1 with --batch_per_chip, else the config's.",
  lower_bound=1,
  flag_values=_FLAGS,
)
flags.mark_flag_as_required("topology", flag_values=_FLAGS)

#: Memory of one chip in GiB, by Google's pages of the TPU generations. The
#: compiler itself leaves some hundred MiB of it to the runtime.
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}

#: For libtpu where there is no TPU: not to look for one, and not to complain
#: that it knows of none; several processes may compile at a time; and errors
#: are logged, for the list of what fills a memory that is too small. The
#: topology compiled for is an argument, and does not come from here.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_STDERR_LOG_LEVEL": "2",
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
  generation, _, size = topology.partition(":")
  known = [f"{name}:SHAPE" for name in HBM_GIB]
  valid = f"cpu:N, or one of {', '.join(known)}, e.g. v5p:4x4x8"
  require(generation in ("cpu", *HBM_GIB) and size, "topology", topology, valid)
  if generation == "cpu":
    # More than four digits: threads and memory of a machine run out before.
    ok = size.isdecimal() and len(size) < 5 and int(size) > 1
    require(ok, "topology", topology, "cpu:N with N of 2 to 9999")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices("cpu")
  try:
    importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    valid = "cpu:N; for a TPU `pip install libtpu`, which compiles for it"
    raise InputError("topology", f"{topology} without libtpu", valid) from None
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except jax.errors.JaxRuntimeError as error:
    valid = f"a whole slice of {generation} ({_first_line(error)})"
    raise InputError("topology", topology, valid) from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
  """`sharding.make_mesh` for two devices or more."""
  mesh = sharding.make_mesh(config, devices=devices)
  require(mesh is not None, "topology", "one device", "two devices or more")
  return mesh


# --- the step ---


def make_setup(config: ExperimentConfig, mesh: Mesh | None) -> TrainSetup:
  """The training program; its hash is over raw token ids, without tokenizer."""
  return models.make_setup(
    config.model, config.train, mesh=mesh, mesh_config=config.mesh
  )


def abstract_batch(config: ExperimentConfig, mesh: Mesh) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a batch."""
  return models.abstract_batch(
    config.train.batch_size,
    config.train.seq_len,
    placed=sharding.batch_sharding(mesh),
  )


def bytes_per_device(leaf: Any) -> int:
  """Bytes of an array's part on one device, before any padding in memory."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def compile_step(
  config: ExperimentConfig, mesh: Mesh, *, generation: str
) -> dict[str, Any]:
  """Compiles the step and reads off what it says.

  Args:
    config: the run.
    mesh: mesh of the devices to compile for.
    generation: TPU generation, a key of `HBM_GIB`, or `cpu`.

  Returns:
    The figures, ready for JSON. `fits` is the compiler's own word, with
    `refusal` in its words; a program that it refuses has no figures beyond the
    arguments and its `largest_temporaries`.
  """
  platform = "cpu" if generation == "cpu" else "tpu"
  setup = make_setup(config, mesh)
  state, batch = setup.abstract_state(), abstract_batch(config, mesh)
  capacity = setup.lookup_capacity(batch).rows
  leaves = {
    name: bytes_per_device(leaf)
    for name, leaf in flatten(state).items()
    if leaf.size
  }
  parts: dict[str, int] = {}
  for name, size in leaves.items():
    part = name.split("/")[0]
    parts[part] = parts.get(part, 0) + size
  parameters = count_parameters_by_part(
    config.model, setup.memory and setup.memory.hashing
  )
  sequences = config.train.batch_size / mesh.size
  result = {
    "sequences": sequences,
    "tokens": sequences * config.train.seq_len,
    "accumulation": config.train.accumulation,
    "parameters": {
      name: parameters[name] for name in ("total", "tables", "activated")
    },
    "state_bytes": parts,
    "largest_arrays": dict(
      sorted(leaves.items(), key=lambda item: -item[1])[:LISTED]
    ),
    "lookup_capacity": capacity,
  }

  held = progress.size(sum(leaves.values()))
  progress.say(
    f"{parameters['total']:,} parameters, {held} of state on each device"
  )
  step = make_train_step(setup, capacity=capacity)
  lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
  start = time.perf_counter()
  try:
    with _log() as log:
      executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      print("".join(log), file=sys.stderr)
      raise
    buffers = analysis.largest_temporaries("".join(log))
    return {
      **result,
      "fits": False,
      "refusal": _first_line(error),
      "largest_temporaries": buffers[:LISTED],
    }
  seconds = time.perf_counter() - start
  listing = executable.as_text()
  sent, rates = analysis.collectives(listing), RATES.get(generation)
  turns = attention_turns(config)

  def of_tables(records):
    tables = [table.shape for table in state.tables.values()]
    return [
      _named(record)
      for rows, width in dict.fromkeys(tables)
      for record in analysis.of_table(
        records, rows=rows, width=width, devices=mesh.size
      )
    ]

  return {
    **result,
    "fits": True,
    "compile_seconds": seconds,
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
      "largest": [_named(record) for record in sent[:LISTED]],
      "of_tables": of_tables(sent),
    },
    "copies_of_tables": of_tables(analysis.copies(listing)),
  }


def attention_turns(config: ExperimentConfig) -> int:
  """Blocks of keys that a block of queries sees, in the mean, rounded up.

  How often the loops turn whose end depends on the data: attention's alone.
  """
  block = config.model.attention.block_size
  if not block:
    return 1
  blocks = -(-config.train.seq_len // block)
  return (blocks + 2) // 2


def _named(record: analysis.Movement) -> dict[str, Any]:
  """For JSON; of the arrays that XLA joined, the largest and their number."""
  record = record._asdict()
  return {**record, "arrays": len(record["arrays"])}


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
  """Collects what the compiler writes to standard error meanwhile.

  libtpu lists what fills a memory in its log alone.
  """
  lines: list[str] = []
  with tempfile.TemporaryFile() as file:
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    finally:
      os.dup2(saved, 2)
      os.close(saved)
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines(keepends=True)


@contextlib.contextmanager
def _own_stderr() -> Iterator[None]:
  """Standard error, which stays it while `_log` collects the compiler's."""
  with open(os.dup(2), "w") as out, contextlib.redirect_stderr(out):
    yield


def _first_line(error: Exception) -> str:
  return " ".join(str(error).split("\n", 1)[0].split())


# --- the programs ---


def with_batch(
  config: ExperimentConfig,
  devices: int,
  *,
  per_chip: int | None = None,
  accumulation: int | None = None,
) -> ExperimentConfig:
  """The run with another batch.

  Args:
    config: the run.
    devices: chips that share a batch.
    per_chip: sequences of one chip in one step; None for the config's batch.
    accumulation: microbatches; None for 1 if `per_chip` is given, else the
      config's.
  """
  changes = {}
  if per_chip is not None:
    changes = {"batch_size": per_chip * devices, "accumulation": 1}
  if accumulation is not None:
    changes["accumulation"] = accumulation
  train = dataclasses.replace(config.train, **changes)
  return dataclasses.replace(config, train=train)


def without_memory(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
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


def measure(
  configs: Mapping[str, ExperimentConfig],
  topology: str,
  devices: Sequence[jax.Device],
) -> dict[str, Any]:
  """Compiles each run for `topology`; of two, how they compare."""
  generation = topology.partition(":")[0]
  meshes = {n: make_mesh(c.mesh, devices) for n, c in configs.items()}
  for name, config in configs.items():
    sharding.require_fit(config, meshes[name])
  programs = {}
  for name, config in configs.items():
    mesh = meshes[name]
    what = f"compiling {name} for {len(devices)} devices of {topology}"
    with _own_stderr(), progress.waiting(what):
      compiled = compile_step(config, mesh, generation=generation)
    programs[name] = {"mesh": dict(mesh.shape)} | compiled
  result = {
    "topology": topology,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "hbm_gib": HBM_GIB.get(generation),
    "libtpu": generation != "cpu" and importlib.metadata.version("libtpu"),
    "configs": {name: to_dict(config) for name, config in configs.items()},
    "programs": programs,
  }
  for key in ("optimal_seconds", "compiler_seconds"):
    seconds = [p["cost"][key] for p in programs.values() if p["fits"]]
    if len(seconds) == 2 and all(seconds):
      result[f"{key}_ratio"] = seconds[0] / seconds[1]
  return result


def main(argv: Sequence[str]) -> None:
  del argv
  if not jax.config.jax_platforms:
    # The device compiled for is not one that runs here.
    jax.config.update("jax_platforms", "cpu")
  config, name = _CONFIG.value, _PRESET.value
  valid = "one of --compare_with and --without_memory, or neither"
  both = _WITHOUT.value and _COMPARE.value
  require(not both, "compare_with", _COMPARE.value, valid)
  if _OUT.value:
    require_place(_OUT.value)
  devices = devices_of(_TOPOLOGY.value)
  config = chosen(name, config)
  config = with_batch(
    config,
    len(devices),
    per_chip=_PER_CHIP.value,
    accumulation=_ACCUMULATION.value,
  )
  name = name or "as configured"
  if _WITHOUT.value:
    configs = without_memory(config)
  elif _COMPARE.value:
    configs = compared_with(config, name, _COMPARE.value)
  else:
    configs = {name: config}
  result = measure(configs, _TOPOLOGY.value, devices)
  print(f"\n{pod_report.text(result)}")
  if _OUT.value:
    write_result(_OUT.value, result)
    print(f"written to {_OUT.value}")


if __name__ == "__main__":
  cli.run(main)
