"""Tests of the parameter counts, against the models themselves."""

import dataclasses
import re

import jax
import pytest

from engram_jax.analysis.accounting import (
  PARTS,
  count_parameters_by_part,
  swap_memory_for_experts,
  swap_remainder,
)
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.training.state import abstract_model, count_parameters

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
PATHS = {
  "embedding": r"embedding/table",
  "head": r"head",
  "attention": r"blocks/\d+/attention/(?!kv_norm).*",
  "dense_ffn": r"blocks/\d+/ffn/(gate|up|down):2",
  "routed_experts": r"blocks/\d+/ffn/(gate|up|down):3",
  "shared_experts": r"blocks/\d+/ffn/shared/.*",
  "router": r"blocks/\d+/ffn/router",
  "norms": r"norm/scale|blocks/\d+/(.*_norm|engram)/(.*_)?scale",
  "engram_projections": r"blocks/\d+/engram/(key|value)_(kernel|bias)",
  "engram_conv": r"blocks/\d+/engram/conv_kernel",
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


def make_hash(config):
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
  )


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
  "one order, one layer": {
    "engram_rows_per_head": (30,),
    "engram_layers": (0,),
  },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_every_part_is_what_the_model_has(changes):
  config = replace(CONFIG, **changes)
  hashing = make_hash(config)
  counts = count_parameters_by_part(config, hashing)
  _, params, _ = abstract_model(config)

  real = dict.fromkeys(PARTS, 0)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    path = path.removesuffix("/value")
    # The experts' kernels have the dense ones' names and an axis more.
    names = (path, f"{path}:{leaf.ndim}")
    parts = [
      part
      for part, pattern in PATHS.items()
      if any(re.fullmatch(pattern, name) for name in names)
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
  counts = count_parameters_by_part(CONFIG, make_hash(CONFIG))
  idle = (MOE.num_experts - MOE.top_k) * 3 * (3 * 16 * 10)  # of 3 blocks
  unread = counts["tables"] - 2 * (2 * 2) * 3  # layers, columns, width
  assert counts["activated"] == counts["total"] - idle - unread
  without = counts["activated"] - 40 * 16
  assert counts["activated_without_embedding"] == without

  untied = replace(CONFIG, tie_embeddings=False)
  changed = count_parameters_by_part(untied, make_hash(untied))
  assert changed["activated"] == counts["activated"] + 16  # one row
  assert changed["activated_without_embedding"] == without


PAPER = ModelConfig(
  vocab_size=129_280,
  hidden_size=2560,
  num_layers=30,
  attention=AttentionConfig(),
  dense_size=12_288,
  moe=MoEConfig(num_experts=55, top_k=6, expert_size=1536, num_shared=2),
  engram=EngramConfig(
    hidden_size=2560, layers=(1, 14), rows_per_head=(2_262_400,) * 2
  ),
)


def test_the_papers_models_have_the_papers_sizes():
  """26.7B and 3.8B, with 72 experts or with 55 and 5.7B rows."""
  hashing = make_hash(PAPER)
  swapped = swap_memory_for_experts(PAPER, hashing)
  assert swapped == replace(PAPER, engram=None, moe_num_experts=72)
  for config, its_hash in ((PAPER, hashing), (swapped, None)):
    counts = count_parameters_by_part(config, its_hash)
    assert counts["total"] == pytest.approx(26.7e9, rel=2e-3)
    active = counts["activated_without_embedding"]
    assert active == pytest.approx(3.8e9, rel=5e-3)


@pytest.mark.parametrize("rows", [(50, 90), (300, 500), (2000, 2000)])
@pytest.mark.parametrize("dense", [0, 1, 3])
def test_the_swap_is_as_near_as_a_whole_expert_allows(rows, dense):
  config = replace(CONFIG, engram_rows_per_head=rows, num_dense_layers=dense)
  hashing = make_hash(config)
  swapped = swap_memory_for_experts(config, hashing)
  assert swapped.engram is None
  experts = swapped.moe.num_experts
  assert experts > config.moe.num_experts
  # Nothing else has changed.
  same = replace(config, engram=None, moe_num_experts=experts)
  assert swapped == same

  report = swap_remainder(config, hashing)
  counts = count_parameters_by_part(swapped, None)
  mine = count_parameters_by_part(config, hashing)
  assert report["total_experts"] == counts["total"]
  assert report["activated_experts"] == counts["activated"]
  assert report["total_memory"] == mine["total"]
  assert report["activated_memory"] == mine["activated"]
  assert report["remainder"] == mine["total"] - counts["total"]
  for other in (experts - 1, experts + 1):
    neighbour = replace(swapped, moe_num_experts=other)
    total = count_parameters_by_part(neighbour, None)["total"]
    assert abs(report["remainder"]) <= abs(mine["total"] - total)


def test_what_does_not_fit_together_is_refused():
  hashing = make_hash(CONFIG)
  plain = replace(CONFIG, engram=None)
  for config, its_hash, match in (
    (plain, hashing, "hashing: a hash; valid: None"),
    (CONFIG, None, "hashing: None; valid: a hash of the layers"),
    (replace(CONFIG, engram_layers=(1, 2)), hashing, r"hashing\.layers"),
    (replace(CONFIG, engram_heads=3), hashing, r"hashing\.columns"),
  ):
    with pytest.raises(InputError, match=match):
      count_parameters_by_part(config, its_hash)
  for config, match in (
    (plain, "engram: None"),
    (replace(CONFIG, moe=None), "moe: None"),
  ):
    with pytest.raises(InputError, match=match):
      swap_memory_for_experts(config, hashing)


def test_the_swap_can_make_the_activated_parameters_equal_too():
  hashing = make_hash(CONFIG)
  mine = count_parameters_by_part(CONFIG, hashing)
  swapped = swap_memory_for_experts(CONFIG, hashing, equal_activated=True)
  theirs = count_parameters_by_part(swapped, None)
  # As near as one unit of the dense block's width, and the new experts' router
  # columns, which every token reads.
  blocks = sum(CONFIG.is_moe(i) for i in range(CONFIG.num_layers))
  columns = swapped.moe.num_experts - CONFIG.moe.num_experts
  unit = 3 * CONFIG.hidden_size
  slack = unit + blocks * columns * CONFIG.hidden_size
  assert abs(theirs["activated"] - mine["activated"]) <= slack
  price = blocks * (3 * CONFIG.moe.expert_size + 1) * CONFIG.hidden_size
  assert abs(theirs["total"] - mine["total"]) <= price / 2
  all_moe = replace(CONFIG, num_dense_layers=0)
  with pytest.raises(InputError, match="num_dense_layers: 0"):
    swap_memory_for_experts(all_moe, hashing, equal_activated=True)
