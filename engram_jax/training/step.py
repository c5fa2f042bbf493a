"""One training step: rows are read first, and differentiated with the model.

  rows = table[hash(tokens)]                        outside the gradient
  g_theta, g_rows = grad of loss(theta, rows)
  theta <- optax(g_theta),  table[touched] <- row optimizer(g_rows)

So a step costs what it touches. The state is donated: tables and their moments
are written in place. A step whose loss or gradient is not finite changes
nothing but the step count; the caller learns of it from `metrics["finite"]`.

Under a mesh the same function is traced for all devices. Rows then travel
between them (`memory.exchange`), with room for a fixed number; a batch that
needs more changes nothing at all, `metrics["lookup_needed"]` says how much it
needs, and the caller runs it again with that (`setup.LookupCapacity`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.routing import max_violation, updated_bias
from engram_jax.memory.lookup import apply_row_gradients, reduce_row_gradients
from engram_jax.memory.row_sparse import squared_norm
from engram_jax.training.losses import model_loss
from engram_jax.training.setup import Batch, TrainSetup
from engram_jax.training.state import TrainState

Metrics = dict[str, Array]


def _loss(params, rows, balance, batch, targets_in_batch, setup: TrainSetup):
  """Mean loss of the whole batch, as far as this (micro)batch adds to it."""
  model = nnx.merge(setup.graphdef, params, balance)
  total, out = model_loss(model, rows, batch, chunk=setup.train.loss_chunk)
  loss = total / jnp.maximum(targets_in_batch, 1)
  auxiliary = dropped = jnp.zeros(())
  if out.moe is not None:
    auxiliary = jnp.sum(out.moe.balance_loss) / setup.train.accumulation
    dropped = jnp.sum(out.moe.dropped)
  observed = {
    "loss": loss,
    "balance_loss": auxiliary,
    "load": out.moe and out.moe.load,
    "dropped": dropped,
    "gates": {
      layer: jnp.mean(gates, axis=(0, 1)) / setup.train.accumulation
      for layer, gates in out.gates.items()
    },
  }
  return loss + auxiliary, observed


def _gradients(params, rows, balance, batch, setup: TrainSetup):
  """((d params, d rows), observed), summed over the microbatches."""
  targets = jnp.sum(batch["loss_mask"])
  grad = jax.grad(_loss, argnums=(0, 1) if rows else 0, has_aux=True)

  def of(rows, batch):
    gradients, observed = grad(params, rows, balance, batch, targets, setup)
    return (gradients if rows else (gradients, {})), observed

  pieces = setup.train.accumulation
  if pieces == 1:
    return of(rows, batch)

  def split(x):
    # Every device's part of the batch is split, not the devices.
    x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, *x.shape[2:])

  def add(total, piece):
    (by_params, by_rows), observed = of(*piece)
    total = jax.tree.map(jnp.add, total, (by_params, observed))
    return total, by_rows

  piece = jax.tree.map(split, (rows, dict(batch)))
  shapes = jax.eval_shape(of, *jax.tree.map(lambda x: x[0], piece))
  (by_params, _), observed = shapes
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (by_params, observed)
  )
  (by_params, observed), by_rows = jax.lax.scan(add, zeros, piece)
  # Every piece read its own rows: their gradients are laid side by side.
  return (by_params, jax.tree.map(join, by_rows)), observed


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  setup: TrainSetup,
  capacity: int | None = None,
) -> tuple[TrainState, Metrics]:
  """The state after one optimizer step, and what was observed in it.

  Args:
    state: to be donated.
    batch: `inputs`, `targets` int32 [B, L], `breaks` int8 [B, L], `loss_mask`
      bool [B, L].
    setup: static.
    capacity: capacity of the exchange under a mesh; see `LookupCapacity`.

  Returns:
    The next state, and float32 metrics: `loss` (nats per token), `grad_norm`
    (of parameters and rows together, before clipping), `learning_rate`,
    `finite` (bool), `dropped` (assignments), `balance_loss`, `max_violation`
    [MoE blocks], per Engram layer i `gate_mean/i` [G] and `rows_touched/i`
    (distinct rows), and `lookup_needed` where rows are exchanged. If that is
    above the capacity, the state is the one given, and the other metrics mean
    nothing.
  """
  with sharding.use(setup.mesh):
    return _train_step(state, batch, setup, capacity)


def _train_step(state, batch, setup: TrainSetup, capacity):
  train = setup.train
  # Before the model: the exchange may overlap with its first blocks.
  found = setup.lookup(state.tables, batch, capacity=capacity)
  (by_params, by_rows), observed = _gradients(
    state.params, found.rows, state.balance, batch, setup
  )
  row_gradients = reduce_row_gradients(found, by_rows, state.tables)

  # The norm that a dense gradient of the tables would give: one clip for all.
  squares = [squared_norm(g) for g in row_gradients.values()]
  norm = jnp.sqrt(optax.global_norm(by_params) ** 2 + sum(squares))
  finite = jnp.isfinite(norm) & jnp.isfinite(observed["loss"])
  fits = jnp.asarray(found.is_complete)
  clip = jnp.minimum(1.0, train.clip_norm / jnp.maximum(norm, 1e-30))
  rate = setup.schedule(state.step)

  def apply(state: TrainState) -> TrainState:
    updates, opt_state = setup.optimizer.update(
      jax.tree.map(lambda g: g * clip, by_params), state.opt_state, state.params
    )
    updates = jax.tree.map(lambda u: u * rate, updates)
    clipped = {
      layer: gradients._replace(values=gradients.values * clip)
      for layer, gradients in row_gradients.items()
    }
    tables, table_states = apply_row_gradients(
      setup.row_optimizer,
      state.tables,
      state.table_states,
      clipped,
      rate * train.table_learning_rate_multiplier,
    )
    return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      balance=_rebalance(state.balance, observed["load"], setup),
      opt_state=opt_state,
      tables=tables,
      table_states=table_states,
    )

  def skip(state: TrainState) -> TrainState:
    # A batch that did not fit is still to be taken.
    return dataclasses.replace(state, step=state.step + fits)

  # A conditional, not a choice between two results: XLA writes the tables in
  # place in one branch and passes them on in the other.
  new_state = jax.lax.cond(finite & fits, apply, skip, state)
  if setup.mesh is not None:
    # Said, and not found out by XLA: only what lies as its input can be written
    # in place.
    shardings = sharding.state_shardings(new_state, setup.mesh)
    new_state = jax.lax.with_sharding_constraint(new_state, shardings)

  metrics = {
    "loss": observed["loss"],
    "grad_norm": norm,
    "learning_rate": jnp.asarray(rate, jnp.float32),
    "finite": finite,
  }
  if observed["load"] is not None:
    metrics["balance_loss"] = observed["balance_loss"]
    metrics["dropped"] = observed["dropped"]
    metrics["max_violation"] = max_violation(observed["load"])
  for layer, gradients in row_gradients.items():
    metrics[f"gate_mean/{layer}"] = observed["gates"][layer]
    here = state.tables[layer].shape[0] // sharding.size(setup.mesh)
    in_table = gradients.row_ids < here
    metrics[f"rows_touched/{layer}"] = jnp.sum(in_table, dtype=jnp.float32)
  if found.capacity is not None:
    metrics["lookup_needed"] = found.capacity_needed
  return new_state, metrics


def _rebalance(balance: nnx.State, load: Any, setup: TrainSetup) -> nnx.State:
  """The balancing biases moved by one step of loss-free balancing."""
  if load is None:
    return balance
  rate = setup.model.moe.balance_rate
  return jax.tree.map(lambda b: updated_bias(b, load, rate=rate), balance)


def make_train_step(
  setup: TrainSetup, *, capacity: int | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """`train_step` of `setup`, jitted, with the state donated.

  Args:
    setup: what `train_step` computes.
    capacity: capacity of the exchange under a mesh; see `LookupCapacity`.
  """

  def step(state, batch):
    return train_step(state, batch, setup=setup, capacity=capacity)

  return jax.jit(step, donate_argnums=0)
