"""Tests of the parameter counts, against the models themselves."""

import dataclasses
import re

import pytest

from engram_jax.analysis.accounting import (
  PARTS,
  count_parameters_by_part,
  counting_hash,
  sparsity,
)
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.presets import preset
from engram_jax.training.state import (
  abstract_model,
  count_parameters,
  flatten,
)

ATTENTION = AttentionConfig(
  num_heads=3, nope_dim=5, rope_dim=4, value_dim=7, kv_rank=11
)
MOE = MoEConfig(num_experts=6, top_k=2, expert_size=10, num_shared=2)
MEMORY = EngramConfig(
  hidden_size=16,
  layers=(3, 1),
  rows_per_head=(50, 90),
  heads=2,
  head_dim=3,
  conv_kernel_size=5,
)
CONFIG = ModelConfig(
  vocab_size=40,
  hidden_size=16,
  num_layers=4,
  attention=ATTENTION,
  dense_size=24,
  moe=MOE,
  engram=MEMORY,
)

# Which part a parameter of the model belongs to, by its path.
BLOCKS = "(dense|moe)_blocks"
PATHS = {
  "embedding": r"embedding/table",
  "head": r"head",
  "attention": rf"{BLOCKS}/attention/(?!kv_norm).*",
  "dense_ffn": r"dense_blocks/ffn/(gate|up|down)",
  "routed_experts": r"moe_blocks/ffn/(gate|up|down)",
  "shared_experts": r"moe_blocks/ffn/shared/.*",
  "router": r"moe_blocks/ffn/router",
  "norms": rf"norm/scale|{BLOCKS}/.*_norm/scale|engrams/\d+/.*_scale",
  "hyper_connections": rf"{BLOCKS}/(attention|ffn)_streams/.*",
  "engram_projections": r"engrams/\d+/projection(_bias)?",
  "engram_conv": r"engrams/\d+/conv_kernel",
}


def replace(config, **changes):
  """`config` with changes; those named moe_x and engram_x go one deeper."""
  for group in ("moe", "engram"):
    inner = {
      name.removeprefix(f"{group}_"): changes.pop(name)
      for name in list(changes)
      if name.startswith(f"{group}_")
    }
    if inner:
      changes[group] = dataclasses.replace(getattr(config, group), **inner)
  return dataclasses.replace(config, **changes)


CASES = {
  "all": {},
  "untied": {"tie_embeddings": False},
  "no memory": {"engram": None},
  "no experts": {"moe": None},
  "neither": {"moe": None, "engram": None},
  "only experts": {"num_dense_layers": 0},
  "no shared experts": {"moe_num_shared": 0},
  "one block of experts": {"num_dense_layers": 3},
  "biases": {"engram_projection_bias": True},
  "no convolution": {"engram_short_conv": False},
  "biases, no convolution, untied": {
    "engram_projection_bias": True,
    "engram_short_conv": False,
    "tie_embeddings": False,
  },
  "three streams": {"streams": 3, "engram_streams": 3},
  "three streams, no memory": {"streams": 3, "engram": None},
  "three streams, no experts": {"streams": 3, "moe": None, "engram": None},
  "one order, one layer": {
    "engram_rows_per_head": (30,),
    "engram_layers": (0,),
  },
  "unigrams too": {
    "engram_rows_per_head": (20, 30, 40),
    "engram_smallest_order": 1,
  },
  "no gate, biases": {"engram_gate": False, "engram_projection_bias": True},
  "one key": {
    "engram_per_stream_keys": False,
    "streams": 3,
    "engram_streams": 3,
  },
  "input average": {
    "engram": dataclasses.replace(
      MEMORY, fusion="input_average", layers=(0,), short_conv=False
    ),
  },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_every_part_is_what_the_model_has(changes):
  config = replace(CONFIG, **changes)
  hashing = counting_hash(config)
  counts = count_parameters_by_part(config, hashing)
  _, params, _ = abstract_model(config)

  real = dict.fromkeys(PARTS, 0)
  for path, leaf in flatten(params).items():
    parts = [
      part for part, pattern in PATHS.items() if re.fullmatch(pattern, path)
    ]
    assert len(parts) == 1, path
    real[parts[0]] += leaf.size
  if hashing is not None:
    rows = sum(hashing.num_rows.values())
    real["tables"] = rows * config.engram.head_dim

  assert {part: counts[part] for part in PARTS} == real
  assert counts["total"] == count_parameters(params) + real["tables"]
  body = counts["total"] - real["embedding"] - real["head"]
  assert counts["total_without_embedding"] == body


def test_a_token_activates_its_experts_and_its_rows_alone():
  counts = count_parameters_by_part(CONFIG, counting_hash(CONFIG))
  idle = (MOE.num_experts - MOE.top_k) * 3 * (3 * 16 * 10)  # of 3 blocks
  unread = counts["tables"] - 2 * (2 * 2) * 3  # layers, columns, width
  assert counts["activated"] == counts["total"] - idle - unread
  without = counts["activated"] - 40 * 16
  assert counts["activated_without_embedding"] == without

  untied = replace(CONFIG, tie_embeddings=False)
  changed = count_parameters_by_part(untied, counting_hash(untied))
  assert changed["activated"] == counts["activated"] + 16  # one row
  assert changed["activated_without_embedding"] == without


def billions(number):
  return round(number / 1e9, 2)


# The published totals; all parameters with one vocabulary matrix; those
# without hyper-connections; and P_act of both countings.
PUBLISHED = {
  "dense_4b": (4.1, 4.13, 4.12, 3.80, 3.79),
  "moe_27b": (26.7, 26.72, 26.70, 3.81, 3.79),
  "engram_27b": (26.7, 26.73, 26.71, 3.84, 3.82),
  "engram_40b": (39.5, 39.47, 39.45, 3.84, 3.82),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_have_the_papers_sizes(name):
  published, total, plain_total, activated, plain_activated = PUBLISHED[name]
  config = preset(name).model
  hashing = counting_hash(config)
  mixing = count_parameters_by_part(config, hashing)["hyper_connections"]
  # 30 blocks of two: a kernel, 24 biases and 3 scales.
  assert mixing == 60 * (4 * 2560 * 24 + 24 + 3)

  found = sparsity(config, hashing)
  assert round(found["total_with_vocabulary"] / 1e9, 1) == published
  assert round(found["activated"] / 1e9, 1) == 3.8
  assert billions(found["total_with_vocabulary"]) == total
  assert billions(found["total_with_vocabulary"] - mixing) == plain_total
  assert billions(found["activated"]) == activated
  assert billions(found["activated"] - mixing) == plain_activated


def test_the_papers_models_have_the_papers_sparsity():
  def of(name):
    config = preset(name).model
    return sparsity(config, counting_hash(config))

  engram = of("engram_27b")
  assert round(100 * engram["rho"], 1) == 74.3
  assert engram["rho"] + engram["memory_share"] == 1
  assert of("moe_27b")["rho"] == 1
  dense = of("dense_4b")
  assert dense["sparse"] == dense["rho"] == dense["memory_share"] == 0
  tables = count_parameters_by_part(
    preset("engram_27b").model, counting_hash(preset("engram_27b").model)
  )["tables"]
  # Next to the paper's own: all of the table, read or not.
  assert engram["memory_share"] == pytest.approx(tables / engram["sparse"])


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_what_is_sparse_are_unread_experts_and_rows(changes):
  config = replace(CONFIG, **changes)
  hashing = counting_hash(config)
  found = sparsity(config, hashing)
  counts = count_parameters_by_part(config, hashing)
  experts = counts["routed_experts"]
  if config.moe is not None:
    experts -= experts * config.moe.top_k // config.moe.num_experts
  entries = counts["tables"]
  if config.engram is not None:
    entries -= len(config.engram.layers) * config.engram.memory_width
  assert found["sparse"] == found["total"] - found["activated"]
  assert found["sparse"] == experts + entries
  if found["sparse"]:
    assert found["rho"] == pytest.approx(experts / found["sparse"])
    assert found["memory_share"] == pytest.approx(entries / found["sparse"])
  vocabulary = config.vocab_size * config.hidden_size
  assert found["total_with_vocabulary"] == found["total"] + vocabulary


def test_tables_have_the_sizes_of_the_published_config():
  """DeepSeek-V4.1's own row counts, from the primes alone."""
  hashing = counting_hash(preset("v41_memory").model)
  assert hashing.num_rows == {1: 384_006_168, 14: 384_016_682}


def test_what_does_not_fit_together_is_refused():
  hashing = counting_hash(CONFIG)
  plain = replace(CONFIG, engram=None)
  for config, its_hash, match in (
    (plain, hashing, "hashing: a hash; valid: None"),
    (CONFIG, None, "hashing: None; valid: a hash of the layers"),
    (replace(CONFIG, engram_layers=(1, 2)), hashing, r"hashing\.layers"),
    (replace(CONFIG, engram_heads=3), hashing, r"hashing\.columns"),
  ):
    with pytest.raises(InputError, match=match):
      count_parameters_by_part(config, its_hash)
