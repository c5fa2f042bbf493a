"""The flags that say where a trained model's rows are read from."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from absl import flags

from engram_jax import progress
from engram_jax.errors import require
from engram_jax.stores.open_store import reads_a_file
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.quantization import FORMATS
from engram_jax.stores.store import RowStore
from engram_jax.training.runs import TrainedModel, load_run


def define_store() -> Callable[[], dict[str, Any]]:
  """Defines the flags; the result gives them as arguments of `load`."""
  store = flags.DEFINE_string(
    "store", "device", "Where rows live: device, pinned, host or file:PATH."
  )
  row_format = flags.DEFINE_enum(
    "row_format", None, FORMATS, "To pack the checkpoint's rows in for it."
  )
  verify = flags.DEFINE_bool(
    "verify", False, "Compare a row file's checksums first: reads all of it."
  )
  cache = flags.DEFINE_float(
    "cache_mib", 0.0, "Rows kept on the device before the store; 0 for none."
  )
  other_step = flags.DEFINE_bool(
    "allow_other_step", False, "Take a row file of another step of the run."
  )
  return lambda: {
    "location": store.value,
    "row_format": row_format.value,
    "verify": verify.value,
    "allow_other_step": other_step.value,
    "cache_mib": cache.value,
  }


def define_prefetch() -> flags.FlagHolder:
  """Whether a thread reads ahead of the model."""
  return flags.DEFINE_bool(
    "prefetch", True, "Read a store's rows while the device computes."
  )


def load(
  workdir: str,
  *,
  step: int | None = None,
  location: str = "device",
  row_format: str | None = None,
  verify: bool = False,
  allow_other_step: bool = False,
  cache_mib: float = 0.0,
) -> tuple[TrainedModel, RowStore | None]:
  """A trained model, and the store of its rows.

  Args:
    workdir: the run's folder.
    step: step of the checkpoint; None for the newest.
    location: see `open_store`. With a file the tables of the checkpoint are
      not read.
    row_format: see `open_store`.
    verify: see `open_store`.
    allow_other_step: see `open_store`.
    cache_mib: MiB of rows kept on the device before the store.

  Returns:
    The model, and the store: where nothing is asked for but the device, its
    tables; without a memory None. What another store replaces is not kept.

  Raises:
    InputError: what `load_run` and `open_store` refuse; a store for a model
      without memory.
  """
  ok = math.isfinite(cache_mib) and cache_mib >= 0
  require(ok, "cache_mib", cache_mib, "0 for none, or a number above it")
  with progress.waiting("reading the checkpoint", announce=False):
    trained = load_run(workdir, step=step, tables=not reads_a_file(location))
  tables_do = location == "device" and row_format is None and not cache_mib
  if tables_do and not verify and not allow_other_step:
    return trained, TableStore(trained.tables) if trained.tables else None
  valid = "device, without row_format and cache_mib: the model has no memory"
  require(trained.memory is not None, "store", location, valid)
  with progress.waiting(f"opening {location}", announce=False):
    store = trained.memory.open_store(
      location,
      trained.tables or None,
      row_format=row_format,
      made_from=trained.identity,
      allow_other_step=allow_other_step,
      verify=verify,
      cache_bytes=math.ceil(cache_mib * 2**20),
    )
  # What the store replaces need not stay on the device.
  return dataclasses.replace(trained, tables={}), store
