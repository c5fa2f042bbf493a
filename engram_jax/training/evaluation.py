"""The loss of a text, with the memory on, off, or reading the wrong rows.

The rows come from a store. Those of the tables are read in the program that
computes the loss, and under a mesh exchanged there between devices. Those of
any other store are fetched while the batch before is computed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import NonFiniteError, require, require_finite
from engram_jax.memory.lookup import (
  lookup_rows,
  require_tables,
  shuffle_row_ids,
)
from engram_jax.stores.prefetch import (
  Prefetcher,
  prefetched,
  read_to_device,
  require_rows,
)
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.store import PackedRows, RowStore, unpack
from engram_jax.training.losses import model_loss
from engram_jax.training.setup import Batch, TrainSetup

#: How an evaluation uses the memory.
MEMORY_MODES = ("on", "off", "shuffled")


def losses_by_memory(
  setup: TrainSetup,
  model: Transformer,
  store: RowStore | None,
  batches: Callable[[], Iterable[Batch]],
  *,
  prefetch: bool = True,
) -> dict[str, float]:
  """`mean_loss` with the memory used in each of `MEMORY_MODES`.

  Args:
    setup: what was trained; one without a memory has the mode "on" alone.
    model: the transformer.
    store: where the rows live; None without a memory.
    batches: gives the same batches at each call.
    prefetch: see `batch_losses`.

  Raises:
    InputError: as `mean_loss`.
    NonFiniteError: a loss is not finite; the message has mode and batch.
  """
  losses = {}
  for memory in MEMORY_MODES if setup.memory else ("on",):
    try:
      losses[memory] = mean_loss(
        setup, model, store, batches(), memory=memory, prefetch=prefetch
      )
    except NonFiniteError as error:
      line = f"evaluation with the memory {memory}: {error}"
      raise NonFiniteError(line) from None
  return losses


def mean_loss(
  setup: TrainSetup,
  model: Transformer,
  store: RowStore | None,
  batches: Iterable[Batch],
  *,
  memory: str = "on",
  prefetch: bool = True,
) -> float:
  """Nats per token over batches, every target counted once.

  Args:
    setup: see `batch_losses`, as for all that follow.
    model: the transformer.
    store: where the rows live.
    batches: with masked padding or without.
    memory: how it is used.
    prefetch: whether a thread reads ahead.

  Raises:
    InputError: no target in any batch; what `batch_losses` refuses.
    NonFiniteError: a batch's loss is not finite.
  """
  total, targets = 0.0, 0
  losses = batch_losses(
    setup, model, store, batches, memory=memory, prefetch=prefetch
  )
  for i, pair in enumerate(losses):
    loss, count = jax.device_get(pair)
    require_finite(f"loss of batch {i}", loss)
    total, targets = total + float(loss), targets + int(count)
  require(targets > 0, "batches", "no target", "at least one target")
  return total / targets


def batch_losses(
  setup: TrainSetup,
  model: Transformer,
  store: RowStore | None,
  batches: Iterable[Batch],
  *,
  memory: str = "on",
  prefetch: bool = True,
) -> Iterator[tuple[Array, Array]]:
  """The sum of losses and the number of targets of each batch.

  Args:
    setup: whose hash and compression name the rows.
    model: the transformer; nothing is donated.
    store: where the rows live; under a mesh a `TableStore`. None without a
      memory.
    batches: with masked padding or without.
    memory: "on"; "off", no Engram layer adds anything; "shuffled", every
      position reads the rows of another one, so that they are real rows that
      mean nothing here.
    prefetch: read a batch's rows on a thread while the one before is computed.
      Of no use to a `TableStore`.

  Returns:
    An iterator; bad arguments are refused at the call.

  Raises:
    InputError: an unknown use of the memory, a store that is missing, that has
      other rows than the hash's, or that no mesh can read.
  """
  valid = f"one of {', '.join(MEMORY_MODES)}"
  require(memory in MEMORY_MODES, "memory", memory, valid)
  name = "None" if store is None else type(store).__name__
  if setup.memory is None:
    require(store is None, "store", name, "None without a memory")
  elif memory != "off":
    require(store is not None, "store", name, "the memory's rows")
  if store is not None:
    valid = "a TableStore on a mesh: its tables lie on all devices"
    ok = setup.mesh is None or isinstance(store, TableStore)
    require(ok, "store", name, valid)
    require_rows(store, setup.memory.hashing)
  if memory == "off":
    store = None
  if store is None or isinstance(store, TableStore):
    return _losses_of_tables(setup, model, store, batches, memory)
  return _losses_of_rows(setup, model, store, batches, memory, prefetch)


def batch_row_ids(setup: TrainSetup, batch: Batch) -> dict[int, np.ndarray]:
  """int64 [B, L, K] per Engram layer, what a batch reads; on the host.

  Args:
    setup: the setup of a model with a memory.
    batch: int32 `inputs` and int8 `breaks`, [B, L].
  """
  return setup.memory.row_ids_numpy(batch["inputs"], breaks=batch["breaks"])


def _losses_of_tables(setup, model, store, batches, memory):
  """Of rows that are read in the program of the loss; or of none."""
  tables, room = {} if store is None else store.tables, None
  for batch in batches:
    batch = sharding.place_batch(batch, setup.mesh)
    room = room or setup.lookup_capacity(batch)
    while True:
      *result, needed = _table_loss(
        setup, model, tables, batch, memory=memory, capacity=room.rows
      )
      needed = jax.device_get(needed)
      if room.suffices(needed):
        break
      room = room.grown(needed)
    yield tuple(result)


def _losses_of_rows(setup, model, store, batches, memory, prefetch):
  """Of rows that are fetched before."""

  def row_ids(batch: Batch):
    found = batch_row_ids(setup, batch)
    if memory == "on":
      return found
    return shuffle_row_ids(jax.random.key(0), found)

  with contextlib.ExitStack() as threads:
    if prefetch:
      prefetcher = threads.enter_context(Prefetcher(store))
      pairs = prefetched(
        batches, lambda batch: prefetcher.submit(lambda: row_ids(batch))
      )
    else:
      pairs = ((x, read_to_device(store, row_ids(x))) for x in batches)
    for batch, packed in pairs:
      yield _row_loss(setup, model, packed, batch, row_format=store.row_format)


# Static by identity: a later evaluation of the same run compiles nothing.
@functools.partial(jax.jit, static_argnames=("setup", "memory", "capacity"))
def _table_loss(setup, model, tables, batch, *, memory, capacity):
  with sharding.use(setup.mesh):
    if setup.memory is None or memory == "off":
      return *_loss(setup, model, None, batch), 0
    require_tables(tables, setup.memory.num_rows)
    row_ids = setup.memory.row_ids(batch["inputs"], breaks=batch["breaks"])
    if memory == "shuffled":
      row_ids = shuffle_row_ids(jax.random.key(0), row_ids)
    strategy = setup.lookup_strategy(batch)
    found = lookup_rows(tables, row_ids, strategy=strategy, capacity=capacity)
    needed = 0 if found.capacity is None else found.capacity_needed
    return *_loss(setup, model, found.rows, batch), needed


@functools.partial(jax.jit, static_argnames=("setup", "row_format"))
def _row_loss(setup, model, packed: PackedRows, batch, *, row_format):
  return _loss(setup, model, unpack(packed, row_format), batch)


def _loss(setup, model, rows, batch):
  loss, _ = model_loss(
    model,
    rows,
    batch,
    chunk=setup.train.loss_chunk,
    dispatch=setup.model.exact_dispatch,
  )
  return loss, jnp.sum(batch["loss_mask"])
