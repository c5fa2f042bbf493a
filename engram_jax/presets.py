"""Models by name: the published ones, and three for one machine.

  preset("engram_27b").model       `python -m experiments.count --preset=...`

`PRESETS` holds functions, so that importing this file makes nothing. Each gives
a `Preset`: model, training and devices, where the numbers come from, and what
those sources leave open, with what stands here in its place. The sources:

  2601.07372  Engram: sizes and schedule of the 27B family
  2512.24880  hyper-connections (mHC); its 27B model has the same depth, width,
              steps and batch, and the widths that Engram's paper omits
  2502.16982  Moonlight: Muon at scale

The counts of these models are in `analysis/accounting.py`.

Rows of the 27B and 40B are 80 wide, as in the paper. A TPU has 128 lanes: of a
narrower table XLA:TPU makes a padded copy at every step. `memory_100b` has rows
128 wide.
"""

import dataclasses
import difflib
from collections.abc import Callable

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.run_config import DEFAULT_MESH, MeshConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model with the run that belongs to it.

  Attributes:
    model: the model.
    train: its training.
    mesh: the devices.
    source: where the numbers come from.
    assumptions: what the source leaves open and what was chosen, an item each.
  """

  model: ModelConfig
  train: TrainConfig
  mesh: MeshConfig
  source: str
  assumptions: tuple[str, ...]


def preset(name: str) -> Preset:
  """The preset `name`.

  Raises:
    InputError: there is none; the message names those that are spelt alike.
  """
  if name not in PRESETS:
    close = difflib.get_close_matches(name, PRESETS, n=3)
    valid = f"one of {', '.join(PRESETS)}"
    if close:
      valid = f"did you mean {' or '.join(close)}?"
    raise InputError("preset", name or "no name", valid)
  return PRESETS[name]()


# --- the 27B family ---

_FAMILY = "arXiv 2601.07372 (sizes, schedule, memory) and 2512.24880 (widths)"
_FAMILY_ASSUMPTIONS = (
  "Embeddings: the published totals fit one vocabulary matrix; tied here.",
  "Attention's widths, the experts' 1536, the RMSNorm eps 1e-20, warm-up, "
  "decay and Adam's constants: not given for Engram; those of the 27B model of "
  "2512.24880. The same eps in Engram's norms.",
  "Width of the dense blocks: 12,288 = (6 + 2) * 1536, what a token uses in "
  "the others; with it the totals come out.",
  "Muon's momentum 0.95 and update size 0.2: 2502.16982.",
  "Initialisation: no standard deviation is given; 0.02, tables included.",
  "Gradient clipping at 1: not given.",
  "The balance loss of 1e-4, the capacity 1.5 of a bucket: not given.",
)
_MEMORY_ASSUMPTIONS = (
  "d_mem = 1280 is the whole width of a layer's rows, 2 orders * 8 heads * "
  "80, and the table sizes are rows of each head: so read, the memory holds "
  "the published 5.7 and 18.5 billion (here 5.79 and 18.53).",
  "The signed square root in the gate, not in the paper, is the demo's and "
  "V4.1's; biases in the projections, which only the demo has, are left out.",
  "pad_id 2 and hash seed 0: the demo's.",
  "55 experts divide no power of two: the mesh's expert axis stays 1, and "
  "the experts' widths are split over 32 devices, copies over the others: of "
  "2560 and 1536 a TPU wants multiples of 8 on each.",
)


def _family(
  experts: int | None, rows: int | None, *, head_dim: int = 80
) -> Preset:
  size, streams, dtype, eps = 2560, 4, "bfloat16", 1e-20
  moe = memory = None
  if experts is not None:
    moe = MoEConfig(num_experts=experts, top_k=6, expert_size=1536)
  if rows is not None:
    memory = EngramConfig(
      hidden_size=size,
      layers=(1, 14),
      rows_per_head=(rows, rows),
      head_dim=head_dim,
      streams=streams,
      query_norm_eps=eps,
      key_norm_eps=eps,
      conv_norm_eps=eps,
      dtype=dtype,
    )
  model = ModelConfig(
    vocab_size=129_280,
    hidden_size=size,
    num_layers=30,
    attention=AttentionConfig(block_size=512),
    dense_size=12_288,
    moe=moe,
    engram=memory,
    streams=streams,
    scan_blocks=True,
    remat="block",
    norm_eps=eps,
    dtype=dtype,
  )
  train = TrainConfig(
    steps=50_000,
    batch_size=1280,
    seq_len=4096,
    optimizer="muon",
    adam_eps=eps,
    loss_chunk=1024,
    eval_every=1000,
    checkpoint_every=1000,
    log_every=10,
  )
  assumptions = _FAMILY_ASSUMPTIONS + (_MEMORY_ASSUMPTIONS if memory else ())
  mesh = MeshConfig(data=32, replica=0)
  return Preset(model, train, mesh, _FAMILY, assumptions)


def dense_4b() -> Preset:
  """The family's dense model: 4.1 billion, all activated."""
  return _family(None, None)


def moe_27b() -> Preset:
  """72 routed experts, no memory: 26.7 billion, 3.8 activated."""
  return _family(72, None)


def engram_27b() -> Preset:
  """55 routed experts and 5.8 billion of memory: 26.7 billion."""
  return _family(55, 2_262_400)


def engram_40b() -> Preset:
  """Engram-27B with 18.5 billion of memory: 39.5 billion."""
  return _family(55, 7_239_680)


def memory_100b() -> Preset:
  """Engram-27B's backbone with a memory of 100 billion, rows 128 wide."""
  family = _family(55, 24_414_063, head_dim=128)
  return dataclasses.replace(
    family,
    source=f"{_FAMILY}; the memory's size is that of the paper's offload test",
    assumptions=(
      *family.assumptions,
      "The paper's memory of 100 billion is described by its size alone: the "
      "two layers and 16 heads of Engram-27B, with rows as wide as a TPU's "
      "lanes. Nobody has trained it.",
    ),
  )


def ablation_3b() -> Preset:
  """The base of the paper's ablations, with its 1.6 billion of memory."""
  base = engram_27b()
  size = 1280
  model = dataclasses.replace(
    base.model,
    hidden_size=size,
    num_layers=12,
    attention=dataclasses.replace(base.model.attention, num_heads=16),
    dense_size=7168,
    moe=MoEConfig(num_experts=64, top_k=6, expert_size=896),
    engram=dataclasses.replace(
      base.model.engram,
      hidden_size=size,
      layers=(1, 5),
      rows_per_head=(1_292_800, 1_292_800),
      head_dim=40,
    ),
  )
  train = dataclasses.replace(
    base.train, steps=76_294, batch_size=320, learning_rate=8.6e-4
  )
  return Preset(
    model,
    train,
    DEFAULT_MESH,
    "arXiv 2601.07372 (12 blocks, 3B of which 0.56B activated, 100 billion "
    "tokens, memory at its blocks 2 and 6) and 2512.24880, its 3B model (all "
    "other sizes, batch, learning rate)",
    (
      "The widths are not given. Those of the 3B model of 2512.24880 stand "
      "here. Without memory they hold 2.8B with one vocabulary matrix (3.0B "
      "with two), and activate 0.45B without the vocabulary instead of 0.56B.",
      "Width of the dense block: 7168 = (6 + 2) * 896, as in the 27B family.",
      "Shape of the 1.6 billion: 10 * 129,280 rows of each head and, since two "
      "layers halve d_mem, 8 heads * 40 per order. 5 * 129,280 rows of width "
      "80 hold as much.",
      "Steps: 100 billion tokens over the batch.",
      *_FAMILY_ASSUMPTIONS[:2],
      *_FAMILY_ASSUMPTIONS[3:],
      *_MEMORY_ASSUMPTIONS[1:3],
    ),
  )


def v41_memory() -> Preset:
  """The memory of DeepSeek-V4.1-Flash, 196.6 billion, on a stand-in backbone.

  Its blocks are dense and only as many as reach the second memory layer.
  """
  base = engram_27b()
  size, layers = 5120, (1, 14)
  model = dataclasses.replace(
    base.model,
    hidden_size=size,
    num_layers=16,
    moe=None,
    engram=EngramConfig(
      hidden_size=size,
      layers=layers,
      rows_per_head=(16_000_000,) * 3,
      head_dim=256,
      streams=base.model.streams,
      short_conv=False,
      query_norm_eps=1e-6,
      key_norm_eps=1e-6,
      dtype=base.model.dtype,
    ),
    norm_eps=1e-6,
  )
  train = dataclasses.replace(base.train, table_optimizer="sinkhorn")
  return Preset(
    model,
    train,
    DEFAULT_MESH,
    "DeepSeek-V4.1-Flash: its public config and report (the memory, width "
    "5120, 4 streams, the tables' optimizer)",
    (
      "The backbone is not DeepSeek's, which has 40 blocks and 552 billion "
      "parameters: 16 dense blocks with the attention of the 27B family.",
      "The published tables are 8-bit, 264 bytes a row; here they are float32.",
      "The published map of tokens has 99,092 ids. The primes do not depend on "
      "it, the multipliers do.",
      "RMSNorm eps 1e-6: not known. Batch and schedule: the 27B family's.",
    ),
  )


# --- for one machine ---

_OWN = "this project"
#: Balance ten and a hundred times as eager as the paper's, for short runs: its
#: 0.001 moves a bias by 0.4 in 400 steps, too little to undo a collapse of the
#: first steps (MaxVio stayed above 9 for 60 steps).
_EAGER = dict(balance_rate=0.01, balance_loss=0.01)


def tiny() -> Preset:
  """Minutes on two cores: the model of README.md."""
  size = 128
  model = ModelConfig(
    vocab_size=4096,
    hidden_size=size,
    num_layers=4,
    # Keys are as wide as values (32 + 16), so that attention goes through
    # jax.nn.dot_product_attention.
    attention=AttentionConfig(
      num_heads=4, nope_dim=32, rope_dim=16, value_dim=48, kv_rank=64
    ),
    dense_size=384,
    moe=MoEConfig(
      num_experts=32, top_k=2, expert_size=64, num_shared=1, **_EAGER
    ),
    # The second block and the middle, as in the paper; both n-gram orders.
    engram=EngramConfig(
      hidden_size=size,
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
    # The best of 1e-3, 2e-3 and 4e-3 for the same model without memory
    # (experiments/results/compare.json).
    learning_rate=2e-3,
    warmup_steps=30,
    eval_every=100,
    eval_batches=10,
    checkpoint_every=100,
  )
  return Preset(model, train, DEFAULT_MESH, _OWN, ())


def small() -> Preset:
  """Hours on two cores, with the parts that the 27B family has."""
  size, streams = 384, 4
  model = ModelConfig(
    vocab_size=8192,
    hidden_size=size,
    num_layers=8,
    attention=AttentionConfig(
      num_heads=6, nope_dim=48, rope_dim=16, value_dim=64, kv_rank=128
    ),
    dense_size=1024,
    moe=MoEConfig(
      num_experts=32, top_k=4, expert_size=192, num_shared=1, **_EAGER
    ),
    engram=EngramConfig(
      hidden_size=size,
      layers=(1, 4),
      rows_per_head=(65_536, 65_536),
      head_dim=32,
      streams=streams,
      pad_id=0,
    ),
    streams=streams,
    scan_blocks=True,
  )
  train = TrainConfig(
    steps=2000,
    batch_size=8,
    seq_len=512,
    learning_rate=1e-3,
    warmup_steps=100,
    eval_every=250,
    checkpoint_every=250,
  )
  return Preset(
    model, train, DEFAULT_MESH, _OWN, ("The learning rate is not tuned.",)
  )


def medium() -> Preset:
  """One accelerator of 80 GB: 1.6 billion; a quarter of P_sparse is memory."""
  size, streams, dtype = 1024, 4, "bfloat16"
  model = ModelConfig(
    vocab_size=32_768,
    hidden_size=size,
    num_layers=16,
    attention=AttentionConfig(
      num_heads=16,
      nope_dim=64,
      rope_dim=32,
      value_dim=64,
      kv_rank=256,
      block_size=512,
    ),
    dense_size=3072,
    moe=MoEConfig(num_experts=64, top_k=6, expert_size=384),
    engram=EngramConfig(
      hidden_size=size,
      layers=(1, 7),
      rows_per_head=(163_840, 163_840),
      head_dim=64,
      streams=streams,
      pad_id=0,
      dtype=dtype,
    ),
    streams=streams,
    scan_blocks=True,
    remat="block",
    dtype=dtype,
  )
  train = TrainConfig(
    steps=20_000,
    batch_size=64,
    seq_len=2048,
    accumulation=4,
    learning_rate=8e-4,
    warmup_steps=1000,
    optimizer="muon",
    loss_chunk=2048,
    eval_every=500,
    checkpoint_every=500,
  )
  return Preset(
    model, train, DEFAULT_MESH, _OWN, ("The learning rate is not tuned.",)
  )


#: Every preset by its name.
PRESETS: dict[str, Callable[[], Preset]] = {
  make.__name__: make
  for make in (
    dense_4b,
    moe_27b,
    engram_27b,
    engram_40b,
    memory_100b,
    ablation_3b,
    v41_memory,
    tiny,
    small,
    medium,
  )
}
