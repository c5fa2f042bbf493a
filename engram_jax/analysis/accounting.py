"""Where a model's parameters are, and which of them are sparse.

All by formula from the config: nothing is allocated, so that a model of any
size can be counted. The router's balancing bias is no parameter: no gradient
reaches it. Axes as in `types.py`; F is the hidden width of an expert.

The paper's sizes (arXiv 2601.07372), in billions, next to those of the models
in `presets.py` with one vocabulary matrix, which is what a tied embedding has
and what the published totals fit:

                 published   here    without hyper-connections
  dense_4b          4.1       4.13     4.12
  moe_27b          26.7      26.72    26.70
  engram_27b       26.7      26.73    26.71
  engram_40b       39.5      39.47    39.45
  activated         3.8       3.80 to 3.84     3.79 to 3.82

The paper does not say whether it counts the hyper-connections, 0.015 billion;
its one decimal is met either way. "Activated" is without the vocabulary.
"""

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
  "hyper_connections",
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
      `norms`, all gains, the memory's included; `hyper_connections`, two in
      every block if there is more than one stream: a kernel [G D, G (G + 2)], a
      bias [G (G + 2)] and 3 scales each; `engram_projections`, keys and values
      with their biases; `engram_conv`; `tables`.
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
  if config.streams > 1:
    mixes = config.streams * (config.streams + 2)
    one = (config.streams * size + 1) * mixes + 3
    parts["hyper_connections"] = 2 * config.num_layers * one
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
    parts["engram_projections"] = layers * shared * memory.outputs * size
    gains = 2 * memory.has_gates
    if memory.short_conv:
      taps = memory.conv_kernel_size
      parts["engram_conv"] = layers * taps * memory.streams * size
      gains += 1
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


def sparsity(config: ModelConfig, hashing: NgramHash | None) -> dict:
  """What of a model is sparse, and how experts and memory share it (Eq. 7).

  Args:
    config: the model.
    hashing: its hash; None for a model without memory.

  Returns:
    Without embedding and head, P_tot as `total`, P_act as `activated`, and
    P_sparse = P_tot - P_act as `sparse`. `memory_share`, 1 - rho: the table
    entries that a token does not read, over P_sparse. `rho`: the same of the
    routed experts. The two add up to 1; both are 0 where nothing is sparse.
    `total_with_vocabulary`: `total` with one vocabulary matrix, tied or not:
    the published totals.

  Raises:
    InputError: as `count_parameters_by_part`.
  """
  counts = count_parameters_by_part(config, hashing)
  total = counts["total_without_embedding"]
  sparse = total - counts["activated_without_embedding"]
  memory, read = config.engram, 0
  if memory is not None:
    read = len(memory.layers) * memory.memory_width
  share = (counts["tables"] - read) / sparse if sparse else 0.0
  return {
    "total": total,
    "total_with_vocabulary": total + counts["embedding"],
    "activated": counts["activated_without_embedding"],
    "sparse": sparse,
    "memory_share": share,
    "rho": 1.0 - share if sparse else 0.0,
  }


def counting_hash(config: ModelConfig) -> NgramHash | None:
  """A hash with the primes of a run's own, of raw token ids: enough to count.

  The primes, and so the sizes of the tables, do not depend on the vocabulary:
  no tokenizer is needed. None for a model without memory.
  """
  memory = config.engram
  if memory is None:
    return None
  return NgramHash.create(
    vocab_size=config.vocab_size,
    rows_per_head=memory.rows_per_head,
    heads=memory.heads,
    layers=memory.layers,
    pad_id=memory.pad_id,
    seed=memory.seed,
    smallest_order=memory.smallest_order,
  )


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
