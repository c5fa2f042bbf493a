"""One training step: rows are read first, and differentiated with the model.

  rows = table[hash(tokens)]                        outside the gradient
  g_theta, g_rows = grad of loss(theta, rows)
  theta <- optax(g_theta),  table[touched] <- row optimizer(g_rows)

So a step costs what it touches. The state is donated: tables and their moments
are written in place. A step whose loss or gradient is not finite changes
nothing but the step count; the caller learns of it from `metrics["finite"]`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from engram_jax.backbone.moe import max_violation, updated_bias
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig, TrainConfig
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.retrieval import retrieve
from engram_jax.memory.row_optimizers import (
  RowOptimizer,
  squared_norm,
  sum_duplicates,
)
from engram_jax.training.optimizers import backbone_optimizer, table_optimizer
from engram_jax.training.schedules import warmup_step_decay
from engram_jax.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """What stays the same from step to step; closed over, never traced.

  Attributes:
    model: sizes of the model.
    train: of the run.
    graph: the model's structure, from `state.abstract_model`.
    hashing: None without a memory.
    compression: None without a memory.
    optimizer: of the parameters, for a learning rate of 1.
    row_optimizer: of the tables.
    schedule: learning rate of the backbone by step.
  """

  model: ModelConfig
  train: TrainConfig
  graph: nnx.GraphDef
  hashing: NgramHash | None
  compression: TokenCompression | None
  optimizer: optax.GradientTransformation
  row_optimizer: RowOptimizer
  schedule: optax.Schedule

  @classmethod
  def create(
    cls,
    model: ModelConfig,
    train: TrainConfig,
    graph: nnx.GraphDef,
    *,
    hashing: NgramHash | None,
    compression: TokenCompression | None,
    row_optimizer: RowOptimizer | None = None,
  ) -> "Program":
    """The program that the two configs describe."""
    return cls(
      model=model,
      train=train,
      graph=graph,
      hashing=hashing,
      compression=compression,
      optimizer=backbone_optimizer(train),
      row_optimizer=row_optimizer or table_optimizer(train),
      schedule=warmup_step_decay(train),
    )

  def model_of(self, state: TrainState) -> Transformer:
    """The transformer with the state's weights."""
    return nnx.merge(self.graph, state.params, state.balance)

  def read(
    self, tables: Mapping[int, Array], batch: Batch
  ) -> tuple[dict[int, Array] | None, dict[int, Array]]:
    """Rows and row ids of a batch, per Engram layer."""
    if self.hashing is None:
      return None, {}
    canonical = self.compression(batch["inputs"])
    return retrieve(tables, self.hashing, canonical, breaks=batch["breaks"])


def cross_entropy(
  logits: Float[Array, "B L V"], targets: Array, mask: Array
) -> Float[Array, ""]:
  """Sum of -log p(target) over the positions where `mask` is True, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(jnp.where(mask, losses, 0))


def _loss(params, rows, balance, batch, targets_in_batch, program: Program):
  """Mean loss of the whole batch, as far as this (micro)batch adds to it."""
  model = nnx.merge(program.graph, params, balance)
  out = model(batch["inputs"], rows, breaks=batch["breaks"])
  total = cross_entropy(out.logits, batch["targets"], batch["loss_mask"])
  loss = total / jnp.maximum(targets_in_batch, 1)
  auxiliary = jnp.zeros(())
  for metrics in out.moe:
    auxiliary = auxiliary + metrics.balance_loss / program.train.accumulation
  observed = {
    "loss": loss,
    "balance_loss": auxiliary,
    "load": jnp.stack([m.load for m in out.moe]) if out.moe else None,
    "dropped": sum((m.dropped for m in out.moe), jnp.zeros(())),
    "gates": {
      layer: jnp.mean(gates, axis=(0, 1)) / program.train.accumulation
      for layer, gates in out.gates.items()
    },
  }
  return loss + auxiliary, observed


def _gradients(params, rows, balance, batch, program: Program):
  """((d params, d rows), observed), summed over the microbatches."""
  targets = jnp.sum(batch["loss_mask"])
  grad = jax.grad(_loss, argnums=(0, 1) if rows else 0, has_aux=True)

  def of(rows, batch):
    gradients, observed = grad(params, rows, balance, batch, targets, program)
    return (gradients if rows else (gradients, {})), observed

  pieces = program.train.accumulation
  if pieces == 1:
    return of(rows, batch)

  def split(x):
    return x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])

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
  by_rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_rows)
  return (by_params, by_rows), observed


def train_step(
  state: TrainState, batch: Batch, *, program: Program
) -> tuple[TrainState, Metrics]:
  """The state after one optimizer step, and what was observed in it.

  Args:
    state: to be donated.
    batch: `inputs`, `targets` int32 [B, L], `breaks` int8 [B, L], `loss_mask`
      bool [B, L].
    program: static.

  Returns:
    The next state, and float32 metrics: `loss` (nats per token), `grad_norm`
    (of parameters and rows together, before clipping), `learning_rate`,
    `finite` (bool), `dropped` (assignments), `balance_loss`, `max_violation`
    [MoE blocks], per Engram layer i `gate_mean/i` [G] and `rows_touched/i`
    (distinct rows).
  """
  train = program.train
  rows, row_ids = program.read(state.tables, batch)
  (by_params, by_rows), observed = _gradients(
    state.params, rows, state.balance, batch, program
  )
  row_gradients = {
    layer: sum_duplicates(
      row_ids[layer], gradients, num_rows=state.tables[layer].shape[0]
    )
    for layer, gradients in by_rows.items()
  }

  # The norm that a dense gradient of the tables would give: one clip for all.
  squares = [squared_norm(g) for g in row_gradients.values()]
  norm = jnp.sqrt(optax.global_norm(by_params) ** 2 + sum(squares))
  finite = jnp.isfinite(norm) & jnp.isfinite(observed["loss"])
  clip = jnp.minimum(1.0, train.clip_norm / jnp.maximum(norm, 1e-30))
  rate = program.schedule(state.step)

  def apply(state: TrainState) -> TrainState:
    updates, opt_state = program.optimizer.update(
      jax.tree.map(lambda g: g * clip, by_params), state.opt_state, state.params
    )
    updates = jax.tree.map(lambda u: u * rate, updates)
    tables, table_states = {}, {}
    for layer, gradients in row_gradients.items():
      tables[layer], table_states[layer] = program.row_optimizer.update(
        state.tables[layer],
        state.table_states[layer],
        gradients._replace(values=gradients.values * clip),
        rate * train.table_learning_rate_multiplier,
      )
    return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      balance=_rebalance(state.balance, observed["load"], program),
      opt_state=opt_state,
      tables=tables,
      table_states=table_states,
    )

  def skip(state: TrainState) -> TrainState:
    return dataclasses.replace(state, step=state.step + 1)

  # A conditional, not a choice between two results: XLA writes the tables in
  # place in one branch and passes them on in the other.
  new_state = jax.lax.cond(finite, apply, skip, state)

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
    in_table = gradients.row_ids < state.tables[layer].shape[0]
    metrics[f"rows_touched/{layer}"] = jnp.sum(in_table, dtype=jnp.float32)

  return new_state, metrics


def _rebalance(balance: nnx.State, load: Any, program: Program) -> nnx.State:
  """The balancing biases moved by one step of loss-free balancing."""
  if load is None:
    return balance
  biases, structure = jax.tree.flatten(balance)
  moved = [
    updated_bias(bias, layer_load, rate=program.model.moe.balance_rate)
    for bias, layer_load in zip(biases, load, strict=True)
  ]
  return jax.tree.unflatten(structure, moved)


def make_train_step(
  program: Program,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """`train_step` of `program`, jitted, with the state donated."""

  def step(state, batch):
    return train_step(state, batch, program=program)

  return jax.jit(step, donate_argnums=0)
