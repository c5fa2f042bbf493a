"""Several processes, one run: how they start, agree, and notice a loss.

Each process drives its own devices, and all run the same program on the same
global arrays. What only one may do, such as writing a file, process 0 does.
What one finds wrong is raised by all (`on_all_processes`), so that none waits
for a process that has given up. With a single process nothing here does
anything.

A lost process is noticed in one of two ways:
  by a collective    on CPU one fails at once, as the connection is closed, and
                     one line says so: `to_host`, `reporting_lost_processes`.
  by its heartbeat   or rather by none for `lost_after` seconds; if it was
                     process 0, which listens for them, at once. JAX then aborts
                     the others, whatever they wait for, in words of its own.
"""

import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from engram_jax.errors import InputError, require

T = TypeVar("T")

#: Seconds without a sign of life after which a process counts as lost.
LOST_AFTER = 60

# Process 0 may prepare text for hours. Whoever is lost meanwhile is noticed by
# its heartbeat, not by this.
_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000

_THREADS = 64

# How gloo, gRPC and the coordination service speak of a process that is gone.
_LOSS = re.compile(
  r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|"
  r"gloo|nccl|unavailable|heartbeat|coordination ?service|barrier|"
  r"shut ?down|deadline.exceeded",
  re.IGNORECASE,
)

_meetings = 0


class ProcessLostError(RuntimeError):
  """Another process of the run is gone; this one cannot go on."""


# --- starting and ending ---


def initialize(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  detect: bool = False,
  lost_after: int = LOST_AFTER,
) -> None:
  """Joins the processes of a run. Before anything touches a device.

  Without arguments there is one process, and nothing is done.

  Args:
    coordinator: `HOST:PORT` where process 0 can be reached by all.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    detect: leave all three to JAX, which knows Slurm, Open MPI, Kubernetes and
      Cloud TPU.
    lost_after: seconds without a sign of life after which a process counts as
      lost, and the others end.

  Raises:
    InputError: some of the three without the others, a value out of range, a
      port in use, or no cluster. (A process that finds no other within five
      minutes is aborted by JAX.)
  """
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  known = [name for name, value in given.items() if value is not None]
  if not known and not detect:
    return
  if detect:
    valid = "none of them together with distributed, which finds them itself"
    require(not known, ", ".join(known), "given", valid)
  else:
    for name, value in given.items():
      valid = f"a value, as {known[0]} is given: {', '.join(given)} go together"
      require(value is not None, name, value, valid)
    address = re.fullmatch(r"(.+):(\d{1,5})", coordinator)
    ok = address and 0 < int(address[2]) < 2**16
    require(ok, "coordinator", coordinator, "HOST:PORT")
    require(num_processes > 0, "num_processes", num_processes, "at least 1")
    ok = 0 <= process_id < num_processes
    valid = f"0 <= process_id < num_processes = {num_processes}"
    require(ok, "process_id", process_id, valid)
  require(lost_after >= 1, "lost_after", lost_after, "at least 1 second")
  # XLA's thread pool on CPU, which has a thread a core. When several programs
  # with collectives are under way, as when the checksums of a checkpoint are
  # taken, all threads may wait for one that has none left: a deadlock, seen
  # with two devices on two cores.
  os.environ.setdefault("NPROC", str(max(_THREADS, os.cpu_count() or 1)))
  terminated = signal.getsignal(signal.SIGTERM)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      # Detection would look for an address that is given, and take Slurm's
      # word for which devices are this process's.
      cluster_detection_method=None if detect else "deactivate",
      heartbeat_timeout_seconds=lost_after,
      shutdown_timeout_seconds=lost_after,
    )
  except (RuntimeError, ValueError) as error:
    # JAX's own word for a missing cluster or a port in use.
    field, value = "coordinator", f"{coordinator}: {error}"
    valid = "an address of process 0 with a free port, reached by all processes"
    if detect:
      field, value = "distributed", error
      valid = "inside a cluster that JAX detects; or coordinator=HOST:PORT"
    raise InputError(field, value, valid) from None
  # JAX has taken SIGTERM for its own preemption service; the loop has its own
  # way, and before and after it the signal shall end the process.
  with contextlib.suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGTERM, terminated or signal.SIG_DFL)


def shut_down() -> None:
  """Leaves the others, once all have come this far."""
  if jax.distributed.is_initialized():
    # Whoever comes first may wait long for process 0 to draw its pictures; the
    # shutdown itself waits for `lost_after` only.
    barrier("the end")
    jax.distributed.shutdown()


def fail(status: int) -> NoReturn:
  """Ends a process after an error that it has told of.

  Args:
    status: the exit status.
  """
  if not jax.distributed.is_initialized():
    sys.exit(status)
  # Most errors are everyone's. If process 0 went at once, JAX would abort the
  # others before they have told theirs; so all wait a bounded time for all.
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(Exception):
    jax.distributed.shutdown()
  leave(status)


def leave(status: int) -> NoReturn:
  """Ends the process at once and for certain, as after the loss of another.

  Args:
    status: the exit status.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  # Not `sys.exit`: at a normal exit JAX waits for the other processes, Orbax's
  # threads for theirs, and XLA for collectives that will never end.
  os._exit(status)


# --- who does what ---


def count() -> int:
  """Number of processes."""
  return jax.process_count()


def is_main() -> bool:
  """Whether this is the process that writes files and talks: process 0."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when all processes are here.

  Through the coordination service and not a collective, which on CPU fails
  when the processes are too far apart.

  Args:
    name: for messages; may be used again.
  """
  global _meetings
  if count() == 1:
    return
  _meetings += 1
  client = _client()
  client.wait_at_barrier(f"engram_jax/{_meetings}/{name}", _LONGEST_WAIT_MS)


def any_process(flag: Any) -> bool:
  """Whether `flag` is true in any process; all have to ask."""
  if count() == 1:
    return bool(flag)
  split, any_of = _any_of_all()
  mine = np.full(1, bool(flag))
  flags = jax.make_array_from_callback(
    (jax.device_count(),), split, lambda index: mine
  )
  return bool(to_host(any_of(flags)))


@functools.cache
def _any_of_all() -> tuple[NamedSharding, Callable[[Array], Array]]:
  """A sharding of one entry a device, and a function that looks at all."""
  mesh = Mesh(np.asarray(jax.devices()), ("devices",))
  split, whole = (NamedSharding(mesh, spec) for spec in (P("devices"), P()))
  return split, jax.jit(jnp.any, out_shardings=whole)


def to_host(results: Any) -> Any:
  """`jax.device_get` of what one program gave, noticing the loss of a process.

  Args:
    results: a tree of arrays that are whole on each device.
  """
  if count() > 1:
    # A collective fails on the devices that were connected to the lost process.
    # The others wait for those, and `device_get` might for one of the others.
    shards = jax.tree.leaves(results)[0].addressable_shards
    waiting = [shard.data for shard in shards]
    while waiting:
      ready = [x for x in waiting if x.is_ready()]
      jax.block_until_ready(ready)  # raises what the device met with
      waiting = [x for x in waiting if not x.is_ready()]
      if waiting:
        time.sleep(0.0005)
  return jax.device_get(results)


def on_all_processes(action: Callable[[], T], *, main_first: bool = False) -> T:
  """`action()` in every process; what one raises, all raise.

  Args:
    action: what to do; not with collectives in it.
    main_first: the others begin when process 0 is done, and do not if it
      failed: for files that it makes and they find made.

  Raises:
    InputError: that of the first process that has one.
    RuntimeError: another process failed in another way.
  """
  global _meetings
  if count() == 1:
    return action()
  _meetings += 1
  client, me = _client(), jax.process_index()
  folder = f"engram_jax/{_meetings}/outcomes"
  error: Exception | None = None
  result: Any = None
  if main_first and me:
    told = client.blocking_key_value_get(f"{folder}/0", _LONGEST_WAIT_MS)
    _raise_told(0, told)
  try:
    result = action()
  except Exception as raised:
    error = raised
  client.key_value_set(f"{folder}/{me}", _telling(error))
  if main_first and not me and error is not None:
    raise error  # the others know, and will not come
  client.wait_at_barrier(f"{folder}/all", _LONGEST_WAIT_MS)
  if error is not None:
    raise error
  for key, told in sorted(client.key_value_dir_get(folder)):
    _raise_told(int(key.rpartition("/")[2]), told)
  return result


def _telling(error: Exception | None) -> str:
  if error is None:
    return "[]"
  if isinstance(error, InputError):
    return json.dumps([error.field, str(error.value), error.valid])
  return json.dumps([f"{type(error).__name__}: {error}"])


def _raise_told(process: int, told: str) -> None:
  words = json.loads(told)
  if len(words) == 3:
    raise InputError(*words)
  if words:
    raise RuntimeError(f"process {process}: {words[0]}")


def from_main(value: T) -> T:
  """Process 0's value in every process.

  Args:
    value: what JSON can hold; only process 0's counts.
  """
  global _meetings
  if count() == 1:
    return value
  _meetings += 1
  key = f"engram_jax/{_meetings}/value"
  if is_main():
    _client().key_value_set(key, json.dumps(value))
  return json.loads(_client().blocking_key_value_get(key, _LONGEST_WAIT_MS))


def _client() -> Any:
  # JAX has no public name for it; Orbax takes it from here too.
  from jax._src import distributed

  return distributed.global_state.client


# --- losing one ---


@contextlib.contextmanager
def reporting_lost_processes(
  advice: Callable[[], str] = lambda: "start all processes again",
) -> Iterator[None]:
  """Makes a `ProcessLostError` of what the loss of a process raises.

  Args:
    advice: what to do now, asked when it happens.
  """
  try:
    yield
  except (InputError, ProcessLostError):
    raise
  except Exception as error:
    if not jax.distributed.is_initialized() or not _is_loss(error):
      raise
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    line = f"process lost: {reason}; {advice()}"
    raise ProcessLostError(line) from error


def _is_loss(error: BaseException | None) -> bool:
  """Whether it, or what caused it, comes from JAX and speaks of a loss."""
  while error is not None:
    # ValueError: how some collectives' errors arrive.
    kinds = (jax.errors.JaxRuntimeError, ValueError, TimeoutError)
    if isinstance(error, kinds) and _LOSS.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False
