"""The loss of a text, with the memory on, off, or reading the wrong rows.

The rows come from the tables, in the program that computes the loss, or from a
store, and are then fetched while the batch before is computed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import NonFiniteError, require, require_finite
from engram_jax.memory.prefetch import (
  Prefetcher,
  prefetched,
  read_to_device,
  require_rows,
  row_ids_on_host,
)
from engram_jax.memory.quantization import RowFormat
from engram_jax.memory.lookup import Tables, shuffle_row_ids
from engram_jax.memory.stores import PackedRows, RowStore, unpack
from engram_jax.training.losses import model_loss
from engram_jax.training.setup import Batch
from engram_jax.training.setup import TrainSetup as Program

#: How an evaluation uses the memory.
MEMORY_MODES = ("on", "off", "shuffled")

EvalStep = Callable[[Transformer, Tables, Batch], tuple[Array, Array]]


def make_eval_step(program: Program, *, memory: str = "on") -> EvalStep:
  """A jitted function of model, tables and batch: (sum of losses, targets).

  Args:
    program: whose hash and compression read the tables.
    memory: "on"; "off", no Engram layer adds anything; "shuffled", every
      position reads the rows of another one, so that they are real rows that
      mean nothing here.

  Raises:
    InputError: an unknown memory mode.
  """
  valid = f"one of {', '.join(MEMORY_MODES)}"
  require(memory in MEMORY_MODES, "memory", memory, valid)

  @functools.partial(jax.jit, static_argnames="capacity")
  def evaluate(model, tables, batch, *, capacity):
    with sharding.use(program.mesh):
      row_ids = {} if memory == "off" else program.row_ids(batch)
      if row_ids and memory == "shuffled":
        row_ids = shuffle_row_ids(jax.random.key(0), row_ids)
      read = program.read(tables, row_ids, capacity=capacity)
      loss, _ = model_loss(
        model,
        read.rows,
        batch,
        chunk=program.train.loss_chunk,
        dispatch=program.model.dropless_dispatch,
      )
      needed = 0 if read.plan is None else read.plan.needed
      return loss, jnp.sum(batch["loss_mask"]), needed

  def step(model: Transformer, tables: Tables, batch: Batch):
    nonlocal room
    batch = sharding.place_batch(batch, program.mesh)
    room = room or program.capacity(batch)
    while True:
      *result, needed = evaluate(model, tables, batch, capacity=room.rows)
      if room.rows is None or room.suffices(jax.device_get(needed)):
        return tuple(result)

  room = None
  return step


def losses_by_memory(
  program: Program,
  model: Transformer,
  tables: Tables,
  batches: Callable[[], Iterable[Batch]],
  *,
  store: RowStore | None = None,
  prefetch: bool = True,
) -> dict[str, float]:
  """`mean_loss` with the memory used in each of `MEMORY_MODES`.

  Args:
    program: what was trained; one without a memory has the mode "on" alone.
    model: the transformer.
    tables: [R, d] per Engram layer; of no use with a store.
    batches: gives the same batches at each call.
    store: where the rows live instead.
    prefetch: see `mean_loss_from_store`.

  Raises:
    InputError: as `mean_loss`.
    NonFiniteError: a loss is not finite; the message has mode and batch.
  """
  losses = {}
  for memory in MEMORY_MODES if program.hashing else ("on",):
    try:
      if store is None or memory == "off":
        step = make_eval_step(program, memory=memory)
        losses[memory] = mean_loss(step, model, tables, batches())
      else:
        losses[memory] = mean_loss_from_store(
          program, model, store, batches(), memory=memory, prefetch=prefetch
        )
    except NonFiniteError as error:
      line = f"evaluation with the memory {memory}: {error}"
      raise NonFiniteError(line) from None
  return losses


def mean_loss(
  eval_step: EvalStep,
  model: Transformer,
  tables: Tables,
  batches: Iterable[Batch],
) -> float:
  """Nats per token over batches, every target counted once.

  Args:
    eval_step: from `make_eval_step`.
    model: the transformer.
    tables: [R, d] per Engram layer.
    batches: with masked padding or without.

  Raises:
    InputError: no target in any batch.
    NonFiniteError: a batch's loss is not finite.
  """
  return _mean(eval_step(model, tables, batch) for batch in batches)


def batch_row_ids(program: Program, batch: Batch) -> dict[int, np.ndarray]:
  """int64 [B, L, K] per Engram layer, what a batch reads; on the host."""
  canonical = program.compression(np.asarray(batch["inputs"]))
  return row_ids_on_host(program.hashing, canonical, breaks=batch["breaks"])


def make_packed_eval_step(
  program: Program, row_format: RowFormat
) -> Callable[[Transformer, PackedRows, Batch], tuple[Array, Array]]:
  """As `make_eval_step`, of a batch's packed rows instead of the tables."""

  @jax.jit
  def evaluate(model, packed, batch):
    loss, _ = model_loss(
      model,
      unpack(packed, row_format),
      batch,
      chunk=program.train.loss_chunk,
      dispatch=program.model.dropless_dispatch,
    )
    return loss, jnp.sum(batch["loss_mask"])

  return evaluate


def mean_loss_from_store(
  program: Program,
  model: Transformer,
  store: RowStore,
  batches: Iterable[Batch],
  *,
  memory: str = "on",
  prefetch: bool = True,
) -> float:
  """As `mean_loss`, with rows of any home.

  Args:
    program: whose hash and compression read the rows; of one device.
    model: the transformer.
    store: the rows' home.
    batches: with masked padding or without.
    memory: "on" or "shuffled"; see `make_eval_step`.
    prefetch: read a batch's rows on a thread while the one before is computed.

  Raises:
    InputError: as `mean_loss`; no such use of the memory, a store of other
      rows than the hash's, or a program of several devices.
  """
  require(memory in ("on", "shuffled"), "memory", memory, "on or shuffled")
  name = type(store).__name__
  require(program.hashing is not None, "store", name, "None without a memory")
  valid = "None on a mesh: its tables lie on all devices"
  require(program.mesh is None, "store", name, valid)
  require_rows(store, program.hashing)

  evaluate = make_packed_eval_step(program, store.row_format)

  def row_ids(batch: Batch):
    found = batch_row_ids(program, batch)
    if memory == "on":
      return found
    return shuffle_row_ids(jax.random.key(0), found)

  with contextlib.ExitStack() as threads:
    if prefetch:
      fetcher = threads.enter_context(Prefetcher(store))
      pairs = prefetched(
        batches, lambda batch: fetcher.fetch(lambda: row_ids(batch))
      )
    else:
      pairs = ((x, read_to_device(store, row_ids(x))) for x in batches)
    return _mean(evaluate(model, rows, batch) for batch, rows in pairs)


def _mean(losses: Iterable[tuple[Array, Array]]) -> float:
  """The mean over targets of (sum of losses, targets)."""
  total, targets = 0.0, 0
  for i, pair in enumerate(losses):
    loss, count = jax.device_get(pair)
    require_finite(f"loss of batch {i}", loss)
    total, targets = total + float(loss), targets + int(count)
  require(targets > 0, "batches", "no target", "at least one target")
  return total / targets
