"""Tests of the trade of memory against experts."""

import dataclasses

import pytest

from engram_jax.analysis.accounting import (
  count_parameters_by_part,
  counting_hash,
  sparsity,
)
from engram_jax.analysis.allocation import (
  share_remainder,
  swap_experts_for_memory,
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
from engram_jax.presets import preset

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


def total(config):
  return count_parameters_by_part(config, counting_hash(config))["total"]


def test_the_papers_pair_are_each_others_swap():
  """72 experts, or 55 and 2.26 million rows a head."""
  engram, experts = (preset(n).model for n in ("engram_27b", "moe_27b"))
  swapped = swap_memory_for_experts(engram, counting_hash(engram))
  assert swapped == experts

  back = swap_experts_for_memory(experts, 0.257, engram=engram.engram)
  assert back.moe.num_experts == 55
  (rows, same) = back.engram.rows_per_head
  assert rows == same == pytest.approx(2.26e6, rel=1e-3)
  assert back == replace(
    engram, engram_rows_per_head=(rows, rows), moe_num_experts=55
  )
  report = share_remainder(experts, 0.257, engram=engram.engram)
  assert abs(report["remainder"]) < 1e-5 * report["total_experts"]
  assert report["share"] == pytest.approx(0.257, abs=1e-3)


@pytest.mark.parametrize("rows", [(50, 90), (300, 500), (2000, 2000)])
@pytest.mark.parametrize("dense", [0, 1, 3])
def test_the_swap_is_as_near_as_a_whole_expert_allows(rows, dense):
  config = replace(CONFIG, engram_rows_per_head=rows, num_dense_layers=dense)
  hashing = counting_hash(config)
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


# 300 experts, so that one is a small step.
MANY = replace(CONFIG, engram=None, moe_num_experts=300)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_share_is_reached_at_the_same_total(share, streams):
  config = replace(MANY, streams=streams)
  layout = dataclasses.replace(MEMORY, streams=streams)
  swapped = swap_experts_for_memory(config, share, engram=layout)
  # Nothing but the number of experts and the memory has changed.
  experts = swapped.moe.num_experts
  assert replace(config, moe_num_experts=experts) == dataclasses.replace(
    swapped, engram=None
  )
  rows = swapped.engram.rows_per_head
  assert replace(swapped, engram_rows_per_head=(50, 90)).engram == layout
  assert rows[1] / rows[0] == pytest.approx(90 / 50, rel=1 / rows[0])

  report = share_remainder(config, share, engram=layout)
  found = sparsity(swapped, counting_hash(swapped))["memory_share"]
  assert report["share"] == found
  assert report["total_experts"] == total(config)
  assert report["total_memory"] == total(swapped)
  assert report["remainder"] == total(swapped) - total(config)
  # The two sizes, a row more or less.
  sides = [
    abs(total(replace(swapped, engram_rows_per_head=sizes)) - total(config))
    for sizes in (
      tuple(max(2, round((rows[0] + step) * n / 50)) for n in (50, 90))
      for step in (-1, 1)
    )
  ]
  assert abs(report["remainder"]) <= min(sides)
  # An expert more or less is no nearer: the share falls by one part in the
  # number of experts, and primes are a small part of that.
  step = 1 / (300 - MOE.top_k)
  assert abs(found - share) <= 0.6 * step


def test_unigrams_get_their_share_too():
  sizes = dict(smallest_order=1, rows_per_head=(20, 50, 90))
  layout = dataclasses.replace(MEMORY, **sizes)
  swapped = swap_experts_for_memory(MANY, 0.5, engram=layout)
  assert swapped.engram.smallest_order == 1
  unigrams, bigrams, trigrams = swapped.engram.rows_per_head
  assert unigrams < bigrams < trigrams
  found = share_remainder(MANY, 0.5, engram=layout)
  assert abs(found["share"] - 0.5) < 0.02
  assert abs(found["remainder"]) < 0.01 * found["total_experts"]


def test_a_share_is_moved_both_ways():
  """From a model with memory, to less of it and to more."""
  half = swap_experts_for_memory(MANY, 0.5, engram=MEMORY)
  for share in (0.2, 0.8):
    moved = swap_experts_for_memory(half, share)
    direct = swap_experts_for_memory(MANY, share, engram=MEMORY)
    assert moved.moe == direct.moe
    assert (moved.moe.num_experts < half.moe.num_experts) == (share > 0.5)
    assert total(moved) == pytest.approx(total(MANY), rel=1e-3)
  # The way back to experts alone ends where it began.
  assert swap_memory_for_experts(half, counting_hash(half)) == MANY


def test_what_cannot_be_swapped_is_refused():
  plain = replace(CONFIG, engram=None)
  for config, match in (
    (plain, "engram: None"),
    (replace(CONFIG, moe=None), "moe: None"),
  ):
    with pytest.raises(InputError, match=match):
      swap_memory_for_experts(config, counting_hash(CONFIG))
    with pytest.raises(InputError, match=match):
      swap_experts_for_memory(config, 0.5)
  for share in (0.0, -0.1, 1.1):
    with pytest.raises(InputError, match=f"share: {share}; valid: above 0"):
      swap_experts_for_memory(CONFIG, share)
  wide = dataclasses.replace(MEMORY, head_dim=300)
  with pytest.raises(InputError, match=r"moe\.num_experts: 6; valid: a model"):
    swap_experts_for_memory(plain, 0.5, engram=wide)
  other = dataclasses.replace(MEMORY, hidden_size=32)
  with pytest.raises(InputError, match=r"engram\.hidden_size: 32"):
    swap_experts_for_memory(MANY, 0.5, engram=other)


def test_the_swap_can_make_the_activated_parameters_equal_too():
  hashing = counting_hash(CONFIG)
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
