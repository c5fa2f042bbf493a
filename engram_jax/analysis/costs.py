"""What a model costs: operations per token, and bytes.

By formula, as `accounting.py`. Operations are those of matrix products, two per
multiply-add: with weights, of queries with keys and of weights with values, and
of the mixing of residual streams. Norms, gates, the softmax, Sinkhorn's
normalisations and the memory's convolution are left out, well under a percent
at the published sizes; so are what a dispatch computes in vain (buckets filled
up to their capacity, `dense`), and what attention in blocks or a loss in
chunks computes twice. A table's rows are read, not multiplied.
"""

import dataclasses

from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.row_sparse import state_bytes_per_row
from engram_jax.run_config import TrainConfig
from engram_jax.training.optimizers import table_optimizer

#: The parts of `flops_per_token` that add up to `forward`.
PRODUCTS = (
  "attention",
  "attention_scores",
  "dense_ffn",
  "experts",
  "router",
  "hyper_connections",
  "engram",
  "head",
)
WIDTHS = {"float32": 4, "bfloat16": 2}


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, int]:
  """Floating-point operations per token of a sequence.

  Args:
    config: the model.
    seq_len: L; a token looks at (L + 1) / 2 others in the mean, itself
      included.

  Returns:
    The `PRODUCTS`:
      `attention`, its weights; `attention_scores`, the part that grows with L;
      `dense_ffn`; `experts`, shared and chosen; `router`;
      `hyper_connections`, weights and mixing; `engram`, its projections;
      `head`.
    And `forward`, their sum; `recomputed`, what `remat` makes the backward pass
    compute again: nothing, with `dots` the scores, with `block` all but the
    head and the memory; `training`, 3 * `forward` + `recomputed`.

  Raises:
    InputError: a length below 1.
  """
  require(seq_len >= 1, "seq_len", seq_len, "an integer >= 1")
  parts = count_parameters_by_part(_without_memory(config), None)
  attention, moe, memory = config.attention, config.moe, config.engram
  size, streams = config.hidden_size, config.streams
  width = attention.nope_dim + attention.rope_dim + attention.value_dim
  heads = config.num_layers * attention.num_heads
  experts = parts["shared_experts"]
  if moe is not None:
    experts += parts["routed_experts"] // moe.num_experts * moe.top_k
  mixes = streams * (streams + 2)

  flops = dict.fromkeys(PRODUCTS, 0)
  flops["attention"] = 2 * parts["attention"]
  flops["attention_scores"] = heads * width * (seq_len + 1)
  flops["dense_ffn"] = 2 * parts["dense_ffn"]
  flops["experts"] = 2 * experts
  flops["router"] = 2 * parts["router"]
  if streams > 1:
    # The kernel [G D, G (G + 2)]; then each of these factors meets a D.
    once = 2 * streams * size * mixes + 2 * size * mixes
    flops["hyper_connections"] = 2 * config.num_layers * once
  if memory is not None:
    kernel = memory.memory_width * memory.outputs * size
    flops["engram"] = 2 * len(memory.layers) * kernel
  flops["head"] = 2 * config.vocab_size * size

  forward = sum(flops.values())
  scores = flops["attention_scores"]
  again = {"none": 0, "dots": scores, "block": forward - flops["head"]}
  recomputed = again[config.remat]
  return {
    **flops,
    "forward": forward,
    "recomputed": recomputed,
    "training": 3 * forward + recomputed,
  }


def bytes_of(
  config: ModelConfig, hashing: NgramHash | None, train: TrainConfig
) -> dict[str, int]:
  """Bytes of a run's state over all its devices, without activations.

  Parameters, tables and all state are float32. AdamW keeps two moments, 8 bytes
  a parameter; Muon one, 4 bytes, for the matrices inside the blocks and the
  memory's projections, and AdamW's two for all else. Padding rows of a sharded
  table and step counts are not counted.

  Args:
    config: the model.
    hashing: its hash; None for a model without memory.
    train: for the optimizers, and the tokens of a step.

  Returns:
    `parameters`, `optimizer` and `gradients` of the backbone and the fusion;
    `tables` and `table_state`; `row_gradients`, one per row that a step reads,
    duplicates included, and the table's whole gradient with `dense_adam`;
    `training`, the sum of all; `serving`, parameters and tables in the compute
    dtype.

  Raises:
    InputError: as `accounting.count_parameters_by_part`.
  """
  parts = count_parameters_by_part(config, hashing)
  memory = config.engram
  backbone = parts["total"] - parts["tables"]
  moments = 8 * backbone
  if train.optimizer == "muon":
    moments -= 4 * _muon_parameters(config, parts)
  found = {
    "parameters": 4 * backbone,
    "optimizer": moments,
    "gradients": 4 * backbone,
    "tables": 4 * parts["tables"],
    "table_state": 0,
    "row_gradients": 0,
  }
  if memory is not None:
    row = state_bytes_per_row(table_optimizer(train), memory.head_dim)
    found["table_state"] = row * sum(hashing.num_rows.values())
    tokens = train.batch_size * train.seq_len
    entries = tokens * len(memory.layers) * memory.memory_width
    if train.table_optimizer == "dense_adam":
      entries += parts["tables"]
    found["row_gradients"] = 4 * entries
  found["training"] = sum(found.values())
  found["serving"] = WIDTHS[config.dtype] * parts["total"]
  return found


def _muon_parameters(config: ModelConfig, parts: dict[str, int]) -> int:
  """Entries of the matrices inside the blocks, and of the projections."""
  names = "attention dense_ffn routed_experts shared_experts router"
  matrices = sum(parts[name] for name in names.split())
  streams, memory = config.streams, config.engram
  if streams > 1:
    kernel = streams * config.hidden_size * streams * (streams + 2)
    matrices += 2 * config.num_layers * kernel
  if memory is not None:
    kernel = memory.memory_width * memory.outputs * config.hidden_size
    matrices += len(memory.layers) * kernel
  return matrices


def _without_memory(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, engram=None)
