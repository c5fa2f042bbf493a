"""What stays the same from step to step, and how much room its rows have."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.memory import exchange
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.retrieval import read_rows, require_tables
from engram_jax.memory.row_optimizers import RowOptimizer
from engram_jax.run_config import DEFAULT_MESH, MeshConfig, TrainConfig
from engram_jax.training.optimizers import backbone_optimizer, table_optimizer
from engram_jax.training.schedules import warmup_step_decay
from engram_jax.training.state import TrainState

Batch = Mapping[str, Array | np.ndarray]


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
    mesh: the devices of a run on several; None on one.
    mesh_config: how rows travel between them.
  """

  model: ModelConfig
  train: TrainConfig
  graph: nnx.GraphDef
  hashing: NgramHash | None
  compression: TokenCompression | None
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
    graph: nnx.GraphDef,
    *,
    hashing: NgramHash | None,
    compression: TokenCompression | None,
    row_optimizer: RowOptimizer | None = None,
    mesh: Mesh | None = None,
    mesh_config: MeshConfig = DEFAULT_MESH,
  ) -> "Program":
    """The program that the configs describe."""
    return cls(
      model=model,
      train=train,
      graph=graph,
      hashing=hashing,
      compression=compression,
      optimizer=backbone_optimizer(train),
      row_optimizer=row_optimizer or table_optimizer(train),
      schedule=warmup_step_decay(train),
      mesh=mesh,
      mesh_config=mesh_config,
    )

  def model_of(self, state: TrainState) -> Transformer:
    """The transformer with the state's weights."""
    return nnx.merge(self.graph, state.params, state.balance)

  def row_ids(self, batch: Batch) -> dict[int, Array]:
    """Row ids [B, L, K] of a batch per Engram layer; none without a memory."""
    if self.hashing is None:
      return {}
    canonical = self.compression(batch["inputs"])
    return self.hashing.hash(canonical, breaks=batch["breaks"])

  def read(
    self,
    tables: Mapping[int, Array],
    row_ids: Mapping[int, Array],
    *,
    capacity: int | None = None,
  ) -> "Reading":
    """The rows of all layers, from this device's tables or from all devices'.

    Args:
      tables: [R, d] per Engram layer.
      row_ids: from `row_ids`.
      capacity: of the exchange under a mesh; None for one that suffices.
    """
    if not row_ids:
      return Reading(None, {}, None)
    require_tables(tables, self.hashing)
    if self.mesh is None:
      return Reading(read_rows(tables, row_ids), row_ids, None)
    rows, plan = exchange.fetch(
      tables, row_ids, strategy=self._strategy(row_ids), capacity=capacity
    )
    return Reading(rows, row_ids, plan)

  def _strategy(self, row_ids: Mapping[int, Any]) -> str:
    wanted = self.mesh_config.lookup
    ids = exchange.ids_per_device(row_ids, sharding.size(self.mesh))
    return exchange.choose_strategy(ids) if wanted == "auto" else wanted

  def capacity(self, batch: Mapping[str, Any]) -> "Capacity":
    """Room for the rows of such batches, by the config's factor to begin with.

    Args:
      batch: arrays [B, L] of all devices, or their shapes.
    """
    if self.mesh is None or self.hashing is None:
      return Capacity(None, None)
    row_ids = jax.eval_shape(self.row_ids, dict(batch))
    if self._strategy(row_ids) == "gather":
      return Capacity(None, None)
    devices = sharding.size(self.mesh)
    factor = self.mesh_config.lookup_capacity
    first = exchange.mean_capacity(row_ids, devices, factor=factor)
    return Capacity(first, exchange.ids_per_device(row_ids, devices))


class Reading(NamedTuple):
  """What a step read.

  Attributes:
    rows: [B, L, K, d] per Engram layer; None without a memory.
    row_ids: int32 [B, L, K] per Engram layer.
    plan: of the exchange between devices; None on one device.
  """

  rows: dict[int, Array] | None
  row_ids: dict[int, Array]
  plan: exchange.Plan | None


@dataclasses.dataclass
class Capacity:
  """How many rows one device may ask of another; grows, and never shrinks.

  Attributes:
    rows: the capacity; None where nothing limits it.
    most: more than any batch needs.
  """

  rows: int | None
  most: int | None

  def suffices(self, needed: Any) -> bool:
    """Whether a batch that needed so much was computed; else makes room."""
    if self.rows is None or needed <= self.rows:
      return True
    # An eighth on top: the next batch is about as large as this one.
    self.rows = min(self.most, int(needed) + int(needed) // 8)
    return False
