"""A small Engram mixture of experts on the Python standard library's sources.

For two cores without an accelerator: 4 to 6 minutes with installation and text.
The command is

  python -m experiments.pretrain --config=experiments/configs/tiny.py \
    --workdir=runs/tiny

Every number is here, to be read and changed. The preset `tiny` of
`engram_jax/presets.py` is the same model; a test compares the two.
"""

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
  """The config, frozen."""
  vocab_size, hidden_size = 4096, 128
  model = ModelConfig(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    num_layers=4,
    # Keys are as wide as values (32 + 16), so that attention goes through
    # jax.nn.dot_product_attention.
    attention=AttentionConfig(
      num_heads=4, nope_dim=32, rope_dim=16, value_dim=48, kv_rank=64
    ),
    dense_size=384,
    moe=MoEConfig(
      num_experts=32,
      top_k=2,
      expert_size=64,
      num_shared=1,
      # 10 and 100 times the paper's: 400 steps are few for its 0.001.
      balance_rate=0.01,
      balance_loss=0.01,
    ),
    # At the second block and the middle, as in the paper; bigrams and trigrams,
    # 4 heads of 8192 rows (or a prime more) for each, rows of 16 numbers.
    engram=EngramConfig(
      hidden_size=hidden_size,
      layers=(1, 2),
      rows_per_head=(8192, 8192),
      heads=4,
      head_dim=16,
      pad_id=0,
    ),
  )
  train = TrainConfig(
    steps=400,
    batch_size=8,
    seq_len=256,
    learning_rate=2e-3,
    warmup_steps=30,
    eval_every=100,
    eval_batches=10,
    checkpoint_every=100,
  )
  data = DataConfig(vocab_size=vocab_size)
  return ExperimentConfig(model=model, data=data, train=train)


def get_config() -> ml_collections.ConfigDict:
  """What `--config` reads."""
  return as_config_dict(experiment())
