"""Frozen dataclasses that say what a model is; checked when they are made.

A config is data: it is saved with every checkpoint and read back
(`config_dicts.py`), which refuses unknown fields by name. The published models
are in `presets.py`; what a run is besides its model, in `run_config.py`.
"""

import dataclasses
import math
from typing import Any

from engram_jax.errors import (
  require,
  require_float32,
  require_integer,
  require_seed,
)

DTYPES = ("float32", "bfloat16")
DISPATCHES = ("dense", "bucketed", "dropless")
REMATS = ("none", "dots", "block")
ADDRESSINGS = ("ngrams", "one_row", "shuffled")
FUSIONS = ("gated", "input_average")


def _later(default: Any) -> Any:
  """A field that came after the first digests of configs were written.

  At its default it is left out of them, so that they stay what they were: see
  `config_dicts.for_digest`.
  """
  return dataclasses.field(default=default, metadata={"later": True})


def require_positive(config: Any, *names: str) -> None:
  """Refuses fields that are not finite numbers above 0.

  Args:
    config: the object whose fields are checked.
    *names: names of the fields.
  """
  for name in names:
    value = getattr(config, name)
    valid = "a finite number above 0"
    require(0 < value < math.inf, name, value, valid)


def require_numbers(config: Any) -> None:
  """Refuses numbers that the arrays and programs made of them cannot hold.

  A float where an integer is annotated, and an integer beyond int32, would be
  rounded or cut off; a float beyond float32 would become infinite, and one too
  small for it 0. Seeds have a range of their own.
  """
  for field in dataclasses.fields(config):
    hint, value = str(field.type), getattr(config, field.name)
    hint = field.type.__name__ if isinstance(field.type, type) else hint
    if hint.startswith("tuple[") and isinstance(value, (tuple, list)):
      require_item = require_integer if "[int" in hint else require_float32
      for i, item in enumerate(value):
        require_item(f"{field.name}[{i}]", item)
    elif hint == "float":
      require_float32(field.name, value)
    elif field.name == "seed":
      require_seed(field.name, value)
    elif hint == "int" or (hint == "int | None" and value is not None):
      require_integer(field.name, value, high=2**31)


def require_one_of(config: Any, name: str, choices: tuple[str, ...]) -> None:
  """Refuses a field that is none of `choices`.

  Args:
    config: the object whose field is checked.
    name: name of the field.
    choices: values that it may have.
  """
  value = getattr(config, name)
  require(value in choices, name, value, f"one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class EngramConfig:
  """The memory of a model: its hash, its tables and its fusion.

  Attributes:
    hidden_size: D, width of one residual stream.
    layers: zero-based blocks that read the memory, in the order in which the
      hash takes its primes.
    rows_per_head: smallest table size of a head, one entry per n-gram order
      from `smallest_order` on; the true sizes are the next unused primes.
    heads: H, hash heads per order.
    head_dim: d, width of one row; a token reads `heads * orders` rows.
    streams: G, residual streams.
    pad_id: raw token id that stands before a document's first token.
    seed: seed of the hash multipliers.
    table_init_std: standard deviation of new rows; see `init_table`.
    signed_sqrt: pass the gate's score through sign(s) * sqrt(|s|), as
      DeepSeek's demo and V4.1 do; False is Eq. 4 to the letter.
    projection_bias: biases in the key and value projections (the demo has
      them, V4.1 has not).
    short_conv: Eq. 5's convolution (V4.1 dropped it).
    conv_kernel_size: taps of the convolution.
    conv_dilation: positions between taps; None is the largest n-gram order.
    query_norm_eps: epsilon of the gate's RMSNorm of the hidden state.
    key_norm_eps: epsilon of the gate's RMSNorm of the key.
    conv_norm_eps: epsilon of the RMSNorm before the convolution.
    dtype: compute dtype; parameters are float32.
    smallest_order: the first n-gram order that is looked up; 1 adds unigrams.
    addressing: which rows a position reads: `ngrams`, those of its n-grams; or
      a control, in training as in evaluation: `one_row`, the first row of each
      head, whatever the text; `shuffled`, those of another position of its
      batch (`shuffle_row_ids` with a fixed key), which no decoding can do.
    compress: map token ids of equal text to one canonical id; False leaves
      every token id its own.
    gate: let the hidden state decide how much of the value to add; False adds
      all of it (the gate is 1), and there are no keys.
    per_stream_keys: a key projection for each stream's gate; False shares one.
      The paper's ablation of the same purpose goes further: it applies a single
      fusion to what the hyper-connections read from the streams. Here queries,
      gains and gates stay the streams' own.
    fusion: `gated`, Eq. 3 to 6; or `input_average`, OverEncoding's
      (arXiv 2501.16975), a baseline: the vectors of all orders are averaged
      with the input embedding (`fusion/over_encoding.py`). That takes block 0
      alone, no convolution and no bias, and has neither gates nor keys.
  """

  hidden_size: int
  layers: tuple[int, ...]
  rows_per_head: tuple[int, ...]
  heads: int = 8
  head_dim: int = 80
  streams: int = 1
  pad_id: int = 2
  seed: int = 0
  table_init_std: float = 0.02
  signed_sqrt: bool = True
  projection_bias: bool = False
  short_conv: bool = True
  conv_kernel_size: int = 4
  conv_dilation: int | None = None
  query_norm_eps: float = 1e-6
  key_norm_eps: float = 1e-6
  conv_norm_eps: float = 1e-5
  dtype: str = "float32"
  smallest_order: int = _later(2)
  addressing: str = _later("ngrams")
  compress: bool = _later(True)
  gate: bool = _later(True)
  per_stream_keys: bool = _later(True)
  fusion: str = _later("gated")

  def __post_init__(self):
    require_numbers(self)
    require_positive(self, "hidden_size", "heads", "head_dim", "streams")
    require_positive(self, "smallest_order")
    require_one_of(self, "addressing", ADDRESSINGS)
    require_one_of(self, "fusion", FUSIONS)
    if self.fusion == "input_average":
      needed = {"layers": (0,), "short_conv": False, "projection_bias": False}
      for name, value in needed.items():
        valid = f"{value} with fusion = input_average"
        require(getattr(self, name) == value, name, getattr(self, name), valid)
    require_positive(self, "conv_kernel_size")
    require_positive(self, "query_norm_eps", "key_norm_eps", "conv_norm_eps")
    require_one_of(self, "dtype", DTYPES)
    unique = len(set(self.layers)) == len(self.layers)
    require(
      self.layers and unique and min(self.layers) >= 0,
      "layers",
      self.layers,
      "one or more different block ids from 0 on",
    )
    require(
      len(self.rows_per_head) >= 1 and min(self.rows_per_head) >= 2,
      "rows_per_head",
      self.rows_per_head,
      f"one entry >= 2 per n-gram order from {self.smallest_order} on",
    )
    require(
      self.conv_dilation is None or self.conv_dilation > 0,
      "conv_dilation",
      self.conv_dilation,
      "a positive integer, or None for the largest n-gram order",
    )
    require(
      0 <= self.table_init_std < math.inf,
      "table_init_std",
      self.table_init_std,
      "a number >= 0",
    )

  @property
  def max_order(self) -> int:
    """N, the largest n-gram order."""
    return self.smallest_order + len(self.rows_per_head) - 1

  @property
  def columns(self) -> int:
    """K, hash columns: rows that one token reads in one layer."""
    return self.heads * len(self.rows_per_head)

  @property
  def memory_width(self) -> int:
    """K * d, width of the concatenated rows (the paper's d_mem)."""
    return self.columns * self.head_dim

  @property
  def has_gates(self) -> bool:
    """Whether the hidden state decides how much of the memory is added."""
    return self.gate and self.fusion == "gated"

  @property
  def outputs(self) -> int:
    """Vectors of width D projected from the rows: keys, if any, and a value."""
    keys = self.streams if self.per_stream_keys else 1
    return 1 + keys * self.has_gates

  @property
  def dilation(self) -> int:
    """Positions between the convolution's taps."""
    return self.conv_dilation or self.max_order


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN (arXiv 2309.00071): rotary positions stretched for longer sequences.

  The defaults are the paper's, for 32,768 tokens after training on 4,096.

  Attributes:
    scale: s, longest new length over the original one.
    original_length: tokens of the sequences that the model was trained on.
    slow_turns: α: a pair that turns at most so often over the original length
      is interpolated.
    fast_turns: β: one that turns at least so often is kept.
    temperature: f in m = 0.1 f ln(s) + 1, by whose square the softmax's scale
      is multiplied.
  """

  scale: float = 10.0
  original_length: int = 4096
  slow_turns: float = 1.0
  fast_turns: float = 32.0
  temperature: float = 0.707

  def __post_init__(self):
    require_numbers(self)
    require_positive(self, *(f.name for f in dataclasses.fields(self)))
    require(self.scale >= 1, "scale", self.scale, "a number >= 1")
    ok = self.slow_turns < self.fast_turns
    valid = f"less than fast_turns = {self.fast_turns}"
    require(ok, "slow_turns", self.slow_turns, valid)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Multi-head latent attention (DeepSeek-V2 §2.1).

  Attributes:
    num_heads: attention heads.
    nope_dim: width of a head's query and key without position.
    rope_dim: width of the rotary part, even; its key is shared by all heads.
    value_dim: width of a head's value.
    kv_rank: width of the latent from which keys and values are made.
    rope_theta: base of the rotary frequencies.
    yarn: stretches the positions of a trained model; None leaves them.
    block_size: queries and keys that are compared at a time, so that memory
      grows with the length and not with its square; 0 compares all at once.
      The length is padded to whole blocks.
  """

  num_heads: int = 32
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  kv_rank: int = 512
  rope_theta: float = 10_000.0
  yarn: YarnConfig | None = None
  block_size: int = 0

  def __post_init__(self):
    require_numbers(self)
    require_positive(self, "num_heads", "nope_dim", "rope_dim", "value_dim")
    require_positive(self, "kv_rank", "rope_theta")
    require(self.block_size >= 0, "block_size", self.block_size, ">= 0")
    require(self.rope_dim % 2 == 0, "rope_dim", self.rope_dim, "an even number")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Shared and routed experts with loss-free balancing.

  Attributes:
    num_experts: E, routed experts.
    top_k: routed experts that a token uses.
    num_shared: experts that every token uses.
    expert_size: hidden width of one expert's SwiGLU.
    dispatch: `dense` (plain: every expert sees every token; the oracle),
      `bucketed` (each expert takes at most a capacity; what is over is dropped
      and counted), `dropless` (each expert sees its own tokens, all of them, in
      sorted blocks on CPU, by `jax.lax.ragged_dot` elsewhere).
    capacity_factor: capacity of a bucket over the mean load; on a mesh both
      are of one device's tokens.
    balance_rate: γ, step of the loss-free balancing bias (arXiv 2408.15664).
    balance_loss: weight of the sequence-wise balance loss (V3 §2.1.2).
  """

  num_experts: int
  top_k: int
  expert_size: int
  num_shared: int = 2
  dispatch: str = "bucketed"
  capacity_factor: float = 1.5
  balance_rate: float = 1e-3
  balance_loss: float = 1e-4

  def __post_init__(self):
    require_numbers(self)
    require_positive(
      self, "num_experts", "top_k", "expert_size", "capacity_factor"
    )
    require_one_of(self, "dispatch", DISPATCHES)
    require(
      self.top_k <= self.num_experts,
      "top_k",
      self.top_k,
      f"at most num_experts = {self.num_experts}",
    )
    for name in ("num_shared", "balance_rate", "balance_loss"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer with or without a memory.

  Attributes:
    vocab_size: V, raw token ids.
    hidden_size: D.
    num_layers: blocks.
    attention: see `AttentionConfig`.
    dense_size: hidden width of the SwiGLU in the leading dense blocks.
    moe: experts of the other blocks; None makes every block dense.
    num_dense_layers: leading blocks without experts.
    engram: the memory; None for a plain transformer.
    streams: G, residual streams; more than 1 are mixed by hyper-connections.
    sinkhorn_iterations: turns in which the hyper-connections normalise the
      rows and then the columns of their mixing matrix.
    scan_blocks: compile blocks of one kind once and loop over them, instead of
      each by itself: the same function, sooner compiled. Parameters are the
      same arrays either way.
    remat: what of a block is kept for the gradient, the rest being computed
      again: `none` keeps everything, `dots` the products with weights, `block`
      the residual streams alone.
    tie_embeddings: use the token embedding as output head.
    norm_eps: epsilon of every RMSNorm of the backbone.
    init_std: standard deviation of new weight matrices.
    dtype: compute dtype; parameters are float32.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  attention: AttentionConfig
  dense_size: int
  moe: MoEConfig | None = None
  num_dense_layers: int = 1
  engram: EngramConfig | None = None
  streams: int = 1
  sinkhorn_iterations: int = 20
  scan_blocks: bool = False
  remat: str = "none"
  tie_embeddings: bool = True
  norm_eps: float = 1e-6
  init_std: float = 0.02
  dtype: str = "float32"

  def __post_init__(self):
    require_numbers(self)
    require_positive(
      self, "vocab_size", "hidden_size", "num_layers", "dense_size"
    )
    require_positive(self, "norm_eps", "init_std")
    require_one_of(self, "dtype", DTYPES)
    last = self.num_layers if self.moe is None else self.num_layers - 1
    require(
      0 <= self.num_dense_layers <= last,
      "num_dense_layers",
      self.num_dense_layers,
      f"0 to {last}" + (", to leave a block with experts" if self.moe else ""),
    )
    require_positive(self, "streams", "sinkhorn_iterations")
    require_one_of(self, "remat", REMATS)
    if self.engram is not None:
      for name in ("hidden_size", "streams", "dtype"):
        mine, its = getattr(self, name), getattr(self.engram, name)
        require(
          mine == its, f"engram.{name}", its, f"the model's {name}, {mine}"
        )
      require(
        max(self.engram.layers) < self.num_layers,
        "engram.layers",
        self.engram.layers,
        f"block ids below num_layers = {self.num_layers}",
      )
      require(
        0 <= self.engram.pad_id < self.vocab_size,
        "engram.pad_id",
        self.engram.pad_id,
        f"a token id below vocab_size = {self.vocab_size}",
      )

  def is_moe(self, layer: int) -> bool:
    """Whether block `layer` has experts."""
    return self.moe is not None and layer >= self.num_dense_layers

  @property
  def exact_dispatch(self) -> str | None:
    """How experts take every token, so that none depends on its neighbours.

    A bucket that is full drops tokens by their place in the batch: `bucketed`
    is for training. None for a model of dense blocks only.
    """
    if self.moe is None:
      return None
    return "dropless" if self.moe.dispatch == "dropless" else "dense"
