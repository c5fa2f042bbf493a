"""Programs compiled ahead of time, for devices that are not here.

  (device, *_) = tpu_devices("v5p:4x4x8")
  there = SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=there)
  executable, about = compile_for("tpu", jax.jit(jnp.tanh), x)

Nothing runs and nothing is allocated. What the executable holds, computes and
sends is read by `analysis.compiled`.
"""

import contextlib
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from engram_jax.analysis.compiled import largest_temporaries
from engram_jax.errors import InputError, first_line, require

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

#: Temporaries named one by one.
LISTED = 5


def hbm_gib(topology: str) -> int | None:
  """Memory of one chip of a topology in GiB; None where it is not known."""
  return HBM_GIB.get(topology.partition(":")[0])


def tpu_devices(topology: str) -> Sequence[jax.Device]:
  """Chips of a TPU slice, to compile for; libtpu does it on any Linux machine.

  Args:
    topology: generation and shape of the slice, as in "v5p:4x4x8".

  Raises:
    InputError: a slice that there is not, or libtpu is missing.
  """
  generation, _, shape = topology.partition(":")
  valid = f"one of {', '.join(f'{x}:SHAPE' for x in HBM_GIB)}, e.g. v5p:4x4x8"
  require(generation in HBM_GIB and shape, "topology", topology, valid)
  try:
    importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    valid = "installed: `pip install libtpu` on Linux, without a TPU"
    raise InputError("topology", f"{topology} without libtpu", valid) from None
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except jax.errors.JaxRuntimeError as error:
    valid = f"a whole slice of {generation} ({first_line(error)})"
    raise InputError("topology", topology, valid) from None


def compile_for(
  platform: str, function: Any, *arguments: Any
) -> tuple[jax.stages.Compiled | None, dict[str, Any]]:
  """Compiles a function from the shapes of its arguments.

  Args:
    platform: "tpu", "cuda" or "cpu".
    function: a function that `jax.jit` gave.
    *arguments: its arguments; arrays may be `jax.ShapeDtypeStruct`, with a
      sharding that says which devices are meant.

  Returns:
    The executable, or None if it takes more memory than a device has; and
    what is known of it, ready for JSON: whether it `fits`, `trace_seconds`,
    `lower_seconds`, and either `compile_seconds` or the compiler's `refusal`
    and the `largest_temporaries`.
  """
  times = [time.perf_counter()]
  traced = function.trace(*arguments)
  times.append(time.perf_counter())
  lowered = traced.lower(lowering_platforms=(platform,))
  times.append(time.perf_counter())
  seconds = {
    "trace_seconds": times[1] - times[0],
    "lower_seconds": times[2] - times[1],
  }
  log: list[str] = []
  try:
    with _collecting(log):
      executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      print("".join(log), file=sys.stderr)
      raise
    return None, {
      "fits": False,
      "refusal": first_line(error),
      "largest_temporaries": largest_temporaries("".join(log))[:LISTED],
      **seconds,
    }
  seconds["compile_seconds"] = time.perf_counter() - times[2]
  return executable, {"fits": True, **seconds}


@contextlib.contextmanager
def _collecting(lines: list[str]) -> Iterator[None]:
  """Collects what the compiler writes to standard error meanwhile.

  libtpu lists what fills a memory in its log alone. What Python writes to
  `sys.stderr`, which may tell how long it takes, still goes where it went.
  """
  with tempfile.TemporaryFile() as file, open(os.dup(2), "w") as own:
    sys.stderr.flush()
    os.dup2(file.fileno(), 2)
    try:
      with contextlib.redirect_stderr(own):
        yield
    finally:
      os.dup2(own.fileno(), 2)
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines(keepends=True)
