"""The smallest config that exercises everything: seconds on one core."""

import ml_collections

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.run_config import DataConfig, ExperimentConfig, TrainConfig
from experiments.cli import as_config_dict


def experiment() -> ExperimentConfig:
  memory = EngramConfig(
    hidden_size=16,
    layers=(1,),
    rows_per_head=(101, 103),
    heads=2,
    head_dim=4,
    pad_id=0,
  )
  model = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_layers=2,
    attention=AttentionConfig(
      num_heads=2, nope_dim=4, rope_dim=4, value_dim=8, kv_rank=8
    ),
    dense_size=32,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=8, num_shared=1),
    engram=memory,
  )
  train = TrainConfig(
    steps=12,
    batch_size=4,
    seq_len=16,
    learning_rate=1e-2,
    warmup_steps=2,
    eval_every=4,
    eval_batches=2,
    checkpoint_every=4,
  )
  data = DataConfig(vocab_size=280, glob="*.txt")
  return ExperimentConfig(model=model, data=data, train=train)


def get_config() -> ml_collections.ConfigDict:
  return as_config_dict(experiment())
