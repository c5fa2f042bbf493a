"""A memory of 100 billion parameters on a modest mixture of experts, for pods.

What `experiments/compile_for_pod.py` compiles; nobody has trained it. The
memory is whole: two layers of 2 orders x 8 heads, each head a table of
24,414,063 rows or more of width 128, 1.0e11 parameters. With the two moments of
lazy Adam that is 1.2e12 bytes: 9.4 GB on each of 128 chips.

The backbone is that of the paper's 27B family (hidden 2560, MLA with 32 heads,
experts of width 1536, a first dense block of width 12,288), cut to 4 of its 30
blocks and 32 of its 55 experts, with one residual stream and sequences of 2048
tokens instead of 4096, so that it compiles in minutes.

Rows are 128 wide, not 80 as in the paper: a TPU has 128 lanes. Of a narrower
table XLA:TPU makes a copy, padded to 128, at every step, and copies it back: it
is no longer written in place (`copies_of_tables` of the program's result).
"""

import ml_collections

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.run_config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  TrainConfig,
)
from experiments.cli import as_config_dict


def experiment() -> ExperimentConfig:
  """The config, frozen."""
  hidden_size, vocab_size, dtype = 2560, 129_280, "bfloat16"
  model = ModelConfig(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    num_layers=4,
    attention=AttentionConfig(),
    dense_size=12_288,
    moe=MoEConfig(num_experts=32, top_k=6, expert_size=1536),
    # The second block and the middle, as in the paper.
    engram=EngramConfig(
      hidden_size=hidden_size,
      layers=(1, 2),
      rows_per_head=(24_414_063, 24_414_063),
      head_dim=128,
      dtype=dtype,
    ),
    dtype=dtype,
  )
  return ExperimentConfig(
    model=model,
    data=DataConfig(vocab_size=vocab_size),
    # Two sequences a chip of 128, one a chip of 256.
    train=TrainConfig(steps=50_000, batch_size=256, seq_len=2048),
    # A quarter more than text was seen to need on one device.
    mesh=MeshConfig(expert=4, lookup_capacity=1.25),
  )


def get_config() -> ml_collections.ConfigDict:
  """What `--config` reads."""
  return as_config_dict(experiment())
