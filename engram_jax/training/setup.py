"""The setup of a run: what stays the same from step to step.

A `TrainSetup` is made of configs alone; states are made from it, as shapes or
as arrays, each born where it is to lie. Its `lookup` says how a batch's rows
are read; `LookupCapacity` how many of them may travel between devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from engram_jax import sharding
from engram_jax.backbone.moe import BalancingBias
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.memory import exchange
from engram_jax.memory.lookup import Lookup
from engram_jax.memory.memory import Memory
from engram_jax.memory.row_sparse import RowOptimizer
from engram_jax.run_config import DEFAULT_MESH, MeshConfig, TrainConfig
from engram_jax.training.optimizers import backbone_optimizer, table_optimizer
from engram_jax.training.schedules import warmup_step_decay
from engram_jax.training.state import TrainState, abstract_model

Batch = Mapping[str, Array | np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainSetup:
  """What stays the same from step to step; closed over, never traced.

  Attributes:
    model: sizes of the model.
    train: fields of the run.
    graphdef: the model's structure, without its arrays.
    memory: None without a memory.
    optimizer: optimizer of the parameters, for a learning rate of 1.
    row_optimizer: optimizer of the tables.
    schedule: learning rate of the backbone by step.
    mesh: the devices of a run on several; None on one.
    mesh_config: how rows travel between them.
  """

  model: ModelConfig
  train: TrainConfig
  graphdef: nnx.GraphDef
  memory: Memory | None
  optimizer: optax.GradientTransformation
  row_optimizer: RowOptimizer
  schedule: optax.Schedule
  mesh: Mesh | None = None
  mesh_config: MeshConfig = DEFAULT_MESH

  @classmethod
  def create(
    cls,
    model: ModelConfig,
    train: TrainConfig,
    memory: Memory | None,
    *,
    row_optimizer: RowOptimizer | None = None,
    mesh: Mesh | None = None,
    mesh_config: MeshConfig = DEFAULT_MESH,
  ) -> "TrainSetup":
    """The setup that the configs describe; allocates nothing.

    Args:
      model: sizes of the model.
      train: fields of the run, which name its optimizers and schedule.
      memory: None for a model without one.
      row_optimizer: in place of the one that `train` names.
      mesh: the devices of a run on several; None on one.
      mesh_config: how rows travel between them.
    """
    graphdef, _, _ = abstract_model(model)
    return cls(
      model=model,
      train=train,
      graphdef=graphdef,
      memory=memory,
      optimizer=backbone_optimizer(train),
      row_optimizer=row_optimizer or table_optimizer(train),
      schedule=warmup_step_decay(train),
      mesh=mesh,
      mesh_config=mesh_config,
    )

  # --- states ---

  def initial_state(self, key: PRNGKeyArray | Array) -> TrainState:
    """The state at the start of a run, without its placing. Pure: jit it.

    The backbone's weights depend on the key alone, so that a model with and one
    without a memory start alike where they are alike.

    Args:
      key: `jax.random.key(train.seed)`; an argument, so that runs of other
        seeds are compiled once.
    """
    model_key, table_key = jax.random.split(key)
    model = Transformer(self.model, rngs=nnx.Rngs(params=model_key))
    _, params, balance = nnx.split(model, nnx.Param, BalancingBias)
    tables, table_states = {}, {}
    if self.memory is not None:
      with sharding.use(self.mesh):
        tables = self.memory.init_tables(table_key)
        table_states = self.memory.init_optimizer(self.row_optimizer, tables)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      balance=balance,
      opt_state=self.optimizer.init(params),
      tables=tables,
      table_states=table_states,
    )

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of a state; allocates nothing."""
    shapes = jax.eval_shape(self.initial_state, self._key())
    if self.mesh is None:
      return shapes
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.state_shardings(shapes, self.mesh),
    )

  def init_state(self) -> TrainState:
    """The state at the start of a run.

    Every array is born where it is to lie: a table that no single device could
    hold is never in one piece.
    """
    if self.mesh is None:
      return jax.jit(self.initial_state)(self._key())
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
    return jax.jit(self.initial_state, out_shardings=shardings)(self._key())

  def _key(self) -> PRNGKeyArray:
    return jax.random.key(self.train.seed)

  def merge_model(self, state: TrainState) -> Transformer:
    """The transformer with the state's weights."""
    return nnx.merge(self.graphdef, state.params, state.balance)

  # --- rows ---

  def lookup(
    self,
    tables: Mapping[int, Array],
    batch: Batch,
    *,
    capacity: int | None = None,
  ) -> Lookup:
    """The rows that a batch reads; of no layer without a memory.

    Args:
      tables: [R, d] per Engram layer.
      batch: `inputs` and `breaks`, [B, L].
      capacity: see `LookupCapacity`; None for any number.
    """
    if self.memory is None:
      return Lookup({}, {})
    return self.memory.lookup(
      tables,
      batch["inputs"],
      breaks=batch["breaks"],
      strategy=self.lookup_strategy(batch),
      capacity=capacity,
    )

  def lookup_strategy(self, batch: Mapping[str, Any]) -> str | None:
    """How rows of such batches travel between devices; None on one device."""
    if self.mesh is None or self.memory is None:
      return None
    if self.mesh_config.lookup != "auto":
      return self.mesh_config.lookup
    return exchange.choose_strategy(self._ids_per_device(batch))

  def lookup_capacity(self, batch: Mapping[str, Any]) -> "LookupCapacity":
    """Room for the rows of such batches, by the config's factor to begin with.

    Args:
      batch: arrays [B, L] of all devices, or their shapes.
    """
    if self.lookup_strategy(batch) != "exchange":
      return LookupCapacity(None, None)
    most = self._ids_per_device(batch)
    first = exchange.mean_capacity(
      most, sharding.size(self.mesh), factor=self.mesh_config.lookup_capacity
    )
    return LookupCapacity(first, most)

  def _ids_per_device(self, batch: Mapping[str, Any]) -> int:
    """Row ids of one layer on one device."""
    ids = batch["inputs"].size * self.memory.hashing.columns
    return ids // sharding.size(self.mesh)


@dataclasses.dataclass(frozen=True)
class LookupCapacity:
  """How many distinct rows one device may ask of another.

  Attributes:
    rows: the capacity; None where nothing limits it.
    most: more than any batch needs.
  """

  rows: int | None
  most: int | None

  def suffices(self, needed: Any) -> bool:
    """Whether a batch that needed so many rows has been computed."""
    return self.rows is None or bool(needed <= self.rows)

  def grown(self, needed: Any) -> "LookupCapacity":
    """Room for a batch that needs so many rows, and for the next ones."""
    # An eighth on top: the next batch is about as large as this one.
    rows = min(self.most, int(needed) + int(needed) // 8)
    return LookupCapacity(rows, self.most)
