"""Conditional memory for JAX and Flax: hashed n-gram tables, and a gate.

What is named here is where to begin. It takes jax, flax, numpy and jaxtyping.
All else is imported by its own name, e.g. `engram_jax.stores.store`;
training, data, decoding, interop and analysis need the other dependencies.
"""

from engram_jax.backbone.attention import LatentAttention
from engram_jax.backbone.moe import MoE
from engram_jax.backbone.transformer import ModelOutput, Transformer
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
  YarnConfig,
)
from engram_jax.errors import InputError
from engram_jax.fusion import linen
from engram_jax.fusion.engram import Engram, EngramParams, Fusion, fuse
from engram_jax.fusion.gating import gate_scores, gate_values
from engram_jax.fusion.short_conv import short_conv
from engram_jax.memory.breaks import breaks_from_segments
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import Lookup
from engram_jax.memory.memory import Memory
from engram_jax.memory.row_sparse import RowOptimizer, dense, row_sparse
from engram_jax.memory.row_transformations import (
  scale_by_adam_per_row,
  scale_by_rowwise_adagrad,
)
from engram_jax.memory.sinkhorn import sinkhorn
from engram_jax.memory.table import init_table, lookup
from engram_jax.presets import Preset, preset
from engram_jax.run_config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  TrainConfig,
)
from engram_jax.types import Break

__version__ = "0.1.0"

__all__ = [
  "AttentionConfig",
  "Break",
  "DataConfig",
  "Engram",
  "EngramConfig",
  "EngramParams",
  "ExperimentConfig",
  "Fusion",
  "InputError",
  "LatentAttention",
  "Lookup",
  "Memory",
  "MeshConfig",
  "MoE",
  "MoEConfig",
  "ModelConfig",
  "ModelOutput",
  "NgramHash",
  "Preset",
  "RowOptimizer",
  "TokenCompression",
  "TrainConfig",
  "Transformer",
  "YarnConfig",
  "breaks_from_segments",
  "dense",
  "fuse",
  "gate_scores",
  "gate_values",
  "init_table",
  "linen",
  "lookup",
  "preset",
  "row_sparse",
  "scale_by_adam_per_row",
  "scale_by_rowwise_adagrad",
  "short_conv",
  "sinkhorn",
]
