"""Training of rows alone: the backbone and the fusion stay as they are.

A fact is taught by moving the rows that its text reads, and forgotten by laying
the old tables back: a step changes no weight, and no row that was not read.

  row_tx = row_sparse(optax.scale_by_adam())
  state = RowsState.create(memory, tables, row_tx)
  step = make_rows_only_step(memory, row_tx, learning_rate=1e-2)
  for batch in batches:
    state, loss = step(state, model, batch)

`training/lora.py` is the other way to add few numbers to a frozen model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import require
from engram_jax.memory.lookup import Tables
from engram_jax.memory.memory import Memory
from engram_jax.memory.row_sparse import RowOptimizer
from engram_jax.training.losses import mean_model_loss
from engram_jax.training.setup import Batch


class RowsState(NamedTuple):
  """What a step of rows alone changes.

  Attributes:
    tables: [R, d] per Engram layer.
    states: the row optimizer's, per Engram layer.
  """

  tables: dict[int, Array]
  states: dict[int, Any]

  @classmethod
  def create(
    cls, memory: Memory, tables: Tables, row_optimizer: RowOptimizer
  ) -> "RowsState":
    """A copy of the tables, to be donated, and a new optimizer state.

    Args:
      memory: whose tables they are.
      tables: [R, d] per Engram layer; they stay as they are.
      row_optimizer: from `row_sparse` or `sinkhorn`.
    """
    tables = {layer: jnp.array(table) for layer, table in tables.items()}
    return cls(tables, memory.init_optimizer(row_optimizer, tables))


def rows_only_step(
  state: RowsState,
  model: Transformer,
  batch: Batch,
  *,
  memory: Memory,
  row_optimizer: RowOptimizer,
  learning_rate: Float[Array, ""] | float,
  columns: Sequence[bool] | None = None,
) -> tuple[RowsState, Float[Array, ""]]:
  """One optimizer step on the rows that a batch reads, and on nothing else.

  Args:
    state: to be donated.
    model: the transformer; it stays as it is.
    batch: `inputs`, `targets`, `breaks` and `loss_mask`, [B, L]; and, if only
      the rows of some positions are to move, their bool `row_mask`.
    memory: static; the model's.
    row_optimizer: static. A row without a gradient stays as it is with one that
      has no momentum of before: those of `row_sparse`.
    learning_rate: learning rate of the rows.
    columns: static, one bool per hash column: whether its rows may move, e.g.
      those of new orders alone; None for all.

  Returns:
    The next state, and the mean loss over the targets before the step, nats.

  Raises:
    InputError: another number of columns than the memory has.
  """
  found = memory.lookup(state.tables, batch["inputs"], breaks=batch["breaks"])

  of_rows = jax.value_and_grad(mean_model_loss, argnums=1)
  loss, gradients = of_rows(model, found.rows, batch)
  moves = _trainable(memory, batch, columns)
  gradients = {
    layer: jnp.where(moves[..., None], gradient, 0)
    for layer, gradient in gradients.items()
  }
  tables, states = memory.update(
    row_optimizer,
    state.tables,
    state.states,
    found,
    gradients,
    learning_rate=learning_rate,
  )
  return RowsState(tables, states), loss


def make_rows_only_step(
  memory: Memory,
  row_optimizer: RowOptimizer,
  *,
  learning_rate: float,
  columns: Sequence[bool] | None = None,
) -> Callable[
  [RowsState, Transformer, Batch], tuple[RowsState, Float[Array, ""]]
]:
  """`rows_only_step`, jitted, with the state donated.

  Args:
    memory: the model's.
    row_optimizer: from `row_sparse` or `sinkhorn`.
    learning_rate: learning rate of the rows.
    columns: see `rows_only_step`.
  """

  def step(state, model, batch):
    return rows_only_step(
      state,
      model,
      batch,
      memory=memory,
      row_optimizer=row_optimizer,
      learning_rate=learning_rate,
      columns=columns,
    )

  return jax.jit(step, donate_argnums=0)


def touched_rows(
  memory: Memory,
  batches: Sequence[Mapping[str, Any]],
  *,
  columns: Sequence[bool] | None = None,
) -> dict[int, np.ndarray]:
  """The distinct rows that such steps may move: an edit's whole size.

  Args:
    memory: the model's.
    batches: as `rows_only_step` takes them.
    columns: see `rows_only_step`.

  Returns:
    Ascending row ids per Engram layer. An edit is as many rows of `head_dim`
    numbers each.
  """
  found: dict[int, list] = {layer: [] for layer in memory.layers}
  for batch in batches:
    moves = np.asarray(_trainable(memory, batch, columns))
    ids = memory.row_ids_numpy(batch["inputs"], breaks=batch["breaks"])
    for layer, of_layer in ids.items():
      found[layer].append(of_layer[np.broadcast_to(moves, of_layer.shape)])
  return {i: np.unique(np.concatenate(ids)) for i, ids in found.items()}


def _trainable(memory, batch, columns):
  """bool [B or 1, L or 1, K], which rows of a batch may move."""
  count = memory.config.columns
  moves = np.ones(count, bool) if columns is None else np.array(columns, bool)
  valid = f"{count} bools, one per hash column"
  require(moves.shape == (count,), "columns", moves.shape, valid)
  moves = moves[None, None]
  if "row_mask" in batch:
    moves = batch["row_mask"][..., None] & moves
  return jnp.asarray(moves)
