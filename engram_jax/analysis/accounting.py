"""Where a model's parameters are, and the trade of memory against experts.

All by formula from the config: nothing is allocated, so that a model of any
size can be counted. The router's balancing bias is no parameter: no gradient
reaches it. Axes as in `types.py`; F is the hidden width of an expert.
"""

import dataclasses

from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash

#: The parts that add up to `total`.
PARTS = (
  "embedding",
  "head",
  "attention",
  "dense_ffn",
  "routed_experts",
  "shared_experts",
  "router",
  "norms",
  "engram_projections",
  "engram_conv",
  "tables",
)


def count_parameters_by_part(
  config: ModelConfig, hashing: NgramHash | None
) -> dict[str, int]:
  """Number of parameters by part, in all, and per token.

  Args:
    config: the model.
    hashing: its hash, whose primes are the tables' true sizes; None for a
      model without memory. Padding rows of a sharded table are not counted.

  Returns:
    The `PARTS`:
      `embedding`, V * D, which serves as head too when they are tied; `head`,
      when they are not; `attention`, without its norm; `dense_ffn`, of the
      blocks without experts; `routed_experts`; `shared_experts`; `router`;
      `norms`, all gains, the memory's included; `engram_projections`, keys and
      values with their biases; `engram_conv`; `tables`.
    And what follows from them:
      `total`, their sum;
      `total_without_embedding`, without `embedding` and `head`;
      `activated`, what the forward pass of one token reads: `top_k` of the
      routed experts, K * d table entries per Engram layer, the head, one row
      of an untied embedding, and all of the other parts;
      `activated_without_embedding`, without head and embedding, which is what
      the paper's "activated" counts.

  Raises:
    InputError: a hash without a memory, a memory without its hash, or a hash
      of other layers or columns.
  """
  _check_hash(config, hashing)
  size, moe, memory = config.hidden_size, config.moe, config.engram
  attention = config.attention
  vocabulary = config.vocab_size * size
  moe_blocks = sum(config.is_moe(i) for i in range(config.num_layers))
  dense_blocks = config.num_layers - moe_blocks
  query_width = attention.nope_dim + attention.rope_dim

  parts = dict.fromkeys(PARTS, 0)
  parts["embedding"] = vocabulary
  parts["head"] = 0 if config.tie_embeddings else vocabulary
  parts["attention"] = config.num_layers * (
    size * (attention.kv_rank + attention.rope_dim)
    + attention.num_heads * size * (query_width + attention.value_dim)
    + attention.num_heads
    * attention.kv_rank
    * (attention.nope_dim + attention.value_dim)
  )
  parts["dense_ffn"] = dense_blocks * 3 * size * config.dense_size
  parts["norms"] = (2 * size + attention.kv_rank) * config.num_layers + size
  experts_activated = 0
  if moe is not None:
    expert = 3 * size * moe.expert_size * moe_blocks  # one in every block
    parts["routed_experts"] = moe.num_experts * expert
    parts["shared_experts"] = moe.num_shared * expert
    parts["router"] = moe.num_experts * size * moe_blocks
    experts_activated = moe.top_k * expert
  rows_activated = 0
  if memory is not None:
    layers = len(memory.layers)
    shared = memory.memory_width + memory.projection_bias
    parts["engram_projections"] = layers * shared * (memory.streams + 1) * size
    gains = 2
    if memory.short_conv:
      taps = memory.conv_kernel_size
      parts["engram_conv"] = layers * taps * memory.streams * size
      gains = 3
    parts["norms"] += layers * gains * memory.streams * size
    parts["tables"] = sum(hashing.num_rows.values()) * memory.head_dim
    rows_activated = layers * memory.memory_width

  total = sum(parts.values())
  body = total - parts["embedding"] - parts["head"]
  active_body = body - parts["routed_experts"] - parts["tables"]
  active_body += experts_activated + rows_activated
  lookup = 0 if config.tie_embeddings else size
  return {
    **parts,
    "total": total,
    "total_without_embedding": body,
    "activated": active_body + vocabulary + lookup,
    "activated_without_embedding": active_body,
  }


def swap_memory_for_experts(
  config: ModelConfig, hashing: NgramHash, *, equal_activated: bool = False
) -> ModelConfig:
  """The model whose routed experts take over the memory's parameters.

  The control of the paper's §3: equal total parameters, as near as a whole
  number of experts per block allows, with the size, the choice and the shared
  experts unchanged. `swap_remainder` tells what is left over.

  What a token activates then stays equal in the experts. It differs by what
  the memory itself activates, projections above all: nothing at the paper's
  size, some percent in a small model. `equal_activated` gives the leading
  dense blocks as much more width, so that the rival has the same work to do
  with.

  Args:
    config: a model with a memory and with experts.
    hashing: its hash.
    equal_activated: widen the dense blocks as said.

  Returns:
    The config without memory and with more experts.

  Raises:
    InputError: no memory, no block with experts, or no dense block to widen.
  """
  require(config.engram is not None, "engram", None, "a memory to swap")
  blocks = sum(config.is_moe(i) for i in range(config.num_layers))
  require(blocks > 0, "moe", config.moe, "one or more blocks with experts")
  size = config.hidden_size
  whole = count_parameters_by_part(config, hashing)
  plain = dataclasses.replace(config, engram=None)
  if equal_activated:
    dense = config.num_layers - blocks
    valid = "one or more dense blocks to widen"
    require(dense > 0, "num_dense_layers", config.num_dense_layers, valid)
    more = (
      whole["activated"] - count_parameters_by_part(plain, None)["activated"]
    )
    width = config.dense_size + round(more / (3 * size * dense))
    plain = dataclasses.replace(plain, dense_size=width)
  freed = whole["total"] - count_parameters_by_part(plain, None)["total"]
  # An expert in every block, with its columns of the routers.
  price = blocks * size * (3 * config.moe.expert_size + 1)
  added = (2 * freed + price) // (2 * price)  # the nearest whole number
  experts = config.moe.num_experts + added
  moe = dataclasses.replace(config.moe, num_experts=experts)
  return dataclasses.replace(plain, moe=moe)


def swap_remainder(config: ModelConfig, hashing: NgramHash) -> dict[str, int]:
  """Both sides of `swap_memory_for_experts`, and how far apart they are.

  Args:
    config: a model with a memory and with experts.
    hashing: its hash.

  Returns:
    `total_memory`, `total_experts`, `activated_memory`, `activated_experts`,
    and `remainder`, the parameters that the side with the memory has more (or,
    negative, fewer); at most half an expert in every block.

  Raises:
    InputError: as `swap_memory_for_experts`.
  """
  swapped = swap_memory_for_experts(config, hashing)
  memory = count_parameters_by_part(config, hashing)
  experts = count_parameters_by_part(swapped, None)
  return {
    "total_memory": memory["total"],
    "total_experts": experts["total"],
    "activated_memory": memory["activated"],
    "activated_experts": experts["activated"],
    "remainder": memory["total"] - experts["total"],
  }


def _check_hash(config: ModelConfig, hashing: NgramHash | None) -> None:
  if config.engram is None:
    require(hashing is None, "hashing", "a hash", "None: no memory to address")
    return
  valid = f"a hash of the layers {config.engram.layers}"
  require(hashing is not None, "hashing", None, valid)
  same = set(hashing.layers) == set(config.engram.layers)
  require(same, "hashing.layers", hashing.layers, valid)
  require(
    hashing.columns == config.engram.columns,
    "hashing.columns",
    hashing.columns,
    f"the config's heads * orders = {config.engram.columns}",
  )
