"""What `table_scaling` times: runs of a small model, whose calls are steps."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from engram_jax import sharding
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig
from engram_jax.errors import require
from engram_jax.memory import exchange
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.retrieval import retrieve
from engram_jax.memory.row_optimizers import sum_duplicates
from engram_jax.run_config import MeshConfig, TrainConfig
from engram_jax.training.losses import cross_entropy
from engram_jax.training.program import Program
from engram_jax.training.state import TrainState, abstract_model, init_state
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness

LAYER = 1
#: Forms of a step, by the tables' worth of memory at its peak; the dense
#: one has a gradient and an update besides table and moments.
TABLES = {"sparse": 3, "memory": 3, "dense": 5}
DEFAULTS = dict(
  hidden_size=256,
  num_layers=2,
  heads=8,
  head_dim=64,
  batch=8,
  length=128,
  vocab_size=4096,
)


def make_mesh(devices: int) -> Mesh | None:
  """All of this process's devices, which split the batch; None for one.

  Raises:
    InputError: another number of devices.
  """
  found = jax.device_count()
  valid = f"1, or this process's {found}"
  require(devices in (1, found), "devices", devices, valid)
  # One of several is a run without a mesh, on the first.
  return sharding.make_mesh(MeshConfig()) if devices > 1 else None


def program(
  total_rows: int, sizes: Mapping[str, int], mesh: Mesh | None = None
) -> Program:
  """The training of a small transformer with about `total_rows` rows."""
  heads, width = sizes["heads"], sizes["hidden_size"]
  memory = EngramConfig(
    hidden_size=width,
    layers=(LAYER,),
    rows_per_head=(total_rows // (2 * heads),) * 2,
    heads=heads,
    head_dim=sizes["head_dim"],
    pad_id=0,
    table_init_std=0.0,  # drawing noise would be the peak of memory
  )
  model = ModelConfig(
    vocab_size=sizes["vocab_size"],
    hidden_size=width,
    num_layers=sizes["num_layers"],
    attention=AttentionConfig(
      num_heads=4,
      nope_dim=width // 4,
      rope_dim=16,
      value_dim=width // 4 + 16,
      kv_rank=width // 2,
    ),
    dense_size=3 * width,
    engram=memory,
  )
  train = TrainConfig(
    steps=10_000,
    batch_size=sizes["batch"],
    seq_len=sizes["length"],
    warmup_steps=0,
  )
  hashing = NgramHash.create(
    vocab_size=sizes["vocab_size"],
    rows_per_head=memory.rows_per_head,
    heads=heads,
    layers=memory.layers,
    pad_id=memory.pad_id,
  )
  graph, _, _ = abstract_model(model)
  return Program.create(
    model,
    train,
    graph,
    hashing=hashing,
    compression=TokenCompression.identity(sizes["vocab_size"]),
    mesh=mesh,
  )


def make_dense_step(program: Program) -> Callable:
  """The step without the library's idea: differentiate through the lookup.

  The same loss, clipping and rates; `table_states` are optax's.
  """
  train = program.train
  adam = _table_adam(program)

  def loss(params, tables, balance, batch):
    canonical = program.compression(batch["inputs"])
    rows, _ = retrieve(
      tables, program.hashing, canonical, breaks=batch["breaks"]
    )
    model = nnx.merge(program.graph, params, balance)
    out = model(batch["inputs"], rows, breaks=batch["breaks"])
    mask = batch["loss_mask"]
    total = cross_entropy(out.logits, batch["targets"], mask)
    return total / jnp.maximum(jnp.sum(mask), 1)

  def step(state: TrainState, batch):
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(
      state.params, state.tables, state.balance, batch
    )
    norm = optax.global_norm(gradients)
    clip = jnp.minimum(1.0, train.clip_norm / norm)
    by_params, by_tables = jax.tree.map(lambda g: g * clip, gradients)
    rate = program.schedule(state.step)
    updates, opt_state = program.optimizer.update(
      by_params, state.opt_state, state.params
    )
    updates = jax.tree.map(lambda u: u * rate, updates)
    tables, table_states = {}, {}
    for layer, by_table in by_tables.items():
      table_updates, table_states[layer] = adam.update(
        by_table, state.table_states[layer]
      )
      tables[layer] = optax.apply_updates(
        state.tables[layer],
        table_updates * (rate * train.table_learning_rate_multiplier),
      )
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      tables=tables,
      table_states=table_states,
    )
    return state, {"loss": value, "grad_norm": norm}

  return jax.jit(step, donate_argnums=0)


def make_memory_step(
  program: Program, *, capacity: int | None = None
) -> Callable:
  """The row-sparse step without its transformer: nothing to hide behind."""

  def loss(rows):
    return sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(rows))

  def gradients_of(read, by_rows, tables):
    num_rows = {layer: table.shape[0] for layer, table in tables.items()}
    if read.plan is not None:
      return exchange.send_home(read.plan, by_rows, num_rows=num_rows)
    return {
      layer: sum_duplicates(
        read.row_ids[layer], by_rows[layer], num_rows=num_rows[layer]
      )
      for layer in by_rows
    }

  def updated(state: TrainState, gradients):
    optimizer, tables, table_states = program.row_optimizer, {}, {}
    for layer, table in state.tables.items():
      arguments = (state.table_states[layer], gradients[layer])
      rate = program.schedule(0)
      if program.mesh is None:
        moved = optimizer.update(table, *arguments, rate)
      else:
        moved = exchange.update(optimizer, table, *arguments, rate)
      tables[layer], table_states[layer] = moved
    state = dataclasses.replace(state, tables=tables, table_states=table_states)
    if program.mesh is None:
      return state
    # Only what lies as its input is written in place.
    shardings = sharding.state_shardings(state, program.mesh)
    return jax.lax.with_sharding_constraint(state, shardings)

  def step(state: TrainState, batch):
    with sharding.use(program.mesh):
      read = program.read(
        state.tables, program.row_ids(batch), capacity=capacity
      )
      value, by_rows = jax.value_and_grad(loss)(read.rows)
      gradients = gradients_of(read, by_rows, state.tables)
      metrics = {"loss": value}
      if capacity is not None:
        metrics["lookup_needed"] = read.plan.needed
      return updated(state, gradients), metrics

  return jax.jit(step, donate_argnums=0)


def _table_adam(program: Program) -> optax.GradientTransformation:
  train = program.train
  return optax.adam(1.0, b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps)


def make_state(program: Program, form: str) -> TrainState:
  """The state of a run, every page of it real."""

  def init():
    state = init_state(
      jax.random.key(0),
      program.model,
      program.hashing,
      optimizer=program.optimizer,
      row_optimizer=program.row_optimizer,
      shards=sharding.size(program.mesh),
    )
    if form == "dense":
      adam = _table_adam(program)
      states = {
        layer: adam.init(table) for layer, table in state.tables.items()
      }
      state = dataclasses.replace(state, table_states=states)
    return state

  # Every part is born where it is to lie: no device ever has a whole table.
  placed = sharding.state_shardings(jax.eval_shape(init), program.mesh)
  state = jax.jit(init, out_shardings=placed)()
  tables, states = harness.resident((state.tables, state.table_states))
  return dataclasses.replace(state, tables=tables, table_states=states)


def make_batches(sizes: Mapping[str, int], count: int) -> list[dict]:
  """`count` batches of random tokens, on the device."""
  shape = (sizes["batch"], sizes["length"] + 1)
  draw = np.random.default_rng(0).integers
  tokens = [draw(0, sizes["vocab_size"], shape) for _ in range(count)]
  return [
    {
      "inputs": jnp.asarray(x[:, :-1], jnp.int32),
      "targets": jnp.asarray(x[:, 1:], jnp.int32),
      "breaks": jnp.zeros((shape[0], shape[1] - 1), jnp.int8),
      "loss_mask": jnp.ones((shape[0], shape[1] - 1), bool),
    }
    for x in tokens
  ]


class Run:
  """A run whose every call is one step, on the next of its batches.

  Attributes:
    capacity: of the exchange; None where nothing limits it.
  """

  def __init__(
    self,
    form: str,
    total_rows: int,
    sizes: Mapping[str, int],
    *,
    devices: int = 1,
  ):
    mesh = make_mesh(devices)
    self.program = program(total_rows, sizes, mesh)
    batches = make_batches(sizes, 16)
    batches = [sharding.place_batch(batch, mesh) for batch in batches]
    self.capacity = None
    if mesh is None:
      self.step = _STEPS[form](self.program)
    else:
      self.capacity = _room(self.program, batches)
      self.step = _STEPS[form](self.program, capacity=self.capacity)
    self.state = make_state(self.program, form)
    self.batches = itertools.cycle(batches)

  @property
  def num_rows(self) -> int:
    return self.program.hashing.num_rows[LAYER]

  def __call__(self) -> Any:
    self.state, metrics = self.step(self.state, next(self.batches))
    return self.state, metrics


def _room(program: Program, batches: list[dict]) -> int | None:
  """The capacity that a training run over these batches comes to have."""
  room = program.capacity(batches[0])
  if room.rows is None:
    return None
  devices = sharding.size(program.mesh)
  shard = sharding.padded_rows(program.hashing.num_rows[LAYER], devices)
  shard //= devices
  row_ids = jax.jit(program.row_ids)
  for batch in batches:
    ids = np.asarray(row_ids(batch)[LAYER])
    for part in np.split(ids, devices):
      room.suffices(np.bincount(np.unique(part) // shard).max())
  return room.rows


_STEPS = {
  "sparse": make_train_step,
  "memory": make_memory_step,
  "dense": make_dense_step,
}
