"""Operations against the model's own matrix products, bytes against its state.

The products are counted in the jaxpr of a real forward pass: each
`dot_general`, two operations per multiply-add, as often as a loop runs.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from engram_jax.analysis.accounting import counting_hash
from engram_jax.analysis.costs import PRODUCTS, bytes_of, flops_per_token
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.memory.memory import Memory
from engram_jax.presets import PRESETS, preset
from engram_jax.run_config import OPTIMIZERS, TABLE_OPTIMIZERS, TrainConfig
from engram_jax.training.setup import TrainSetup

LENGTH = 8
MEMORY = EngramConfig(
  hidden_size=16, layers=(1, 2), rows_per_head=(11, 13), heads=2, head_dim=3
)
# Every expert is chosen, so that the oracle, which asks all, wastes nothing.
CONFIG = ModelConfig(
  vocab_size=40,
  hidden_size=16,
  num_layers=4,
  attention=AttentionConfig(
    num_heads=3, nope_dim=5, rope_dim=4, value_dim=7, kv_rank=11
  ),
  dense_size=24,
  moe=MoEConfig(
    num_experts=3, top_k=3, expert_size=10, num_shared=2, dispatch="dense"
  ),
  engram=MEMORY,
)
TRAIN = TrainConfig(steps=4, batch_size=6, seq_len=LENGTH)


def products(jaxpr) -> int:
  """Operations of all `dot_general`s in a jaxpr, and in those inside it."""
  total = 0
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      inner = math.prod(shape[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    times = params["length"] if equation.primitive.name == "scan" else 1
    for inside in jax.tree.leaves(list(params.values())):
      inside = getattr(inside, "jaxpr", inside)
      if hasattr(inside, "eqns"):
        total += times * products(inside)
  return total


def forward_products(config) -> int:
  """Those of one forward pass over a sequence of `LENGTH` tokens."""

  def forward(key):
    model = Transformer(config, rngs=nnx.Rngs(params=key))
    rows = None
    if config.engram is not None:
      shape = (1, LENGTH, config.engram.columns, config.engram.head_dim)
      rows = {layer: jnp.zeros(shape) for layer in config.engram.layers}
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    return model(tokens, rows).logits

  return products(jax.make_jaxpr(forward)(jax.random.key(0)).jaxpr)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"engram": None},
    {"moe": None},
    {"moe": None, "engram": None, "tie_embeddings": False},
    {"scan_blocks": True},
    {"streams": 3, "engram": dataclasses.replace(MEMORY, streams=3)},
    {"engram": dataclasses.replace(MEMORY, gate=False)},
  ],
  ids=lambda changes: ", ".join(changes) or "all",
)
def test_operations_are_the_models_matrix_products(changes):
  config = dataclasses.replace(CONFIG, **changes)
  flops = flops_per_token(config, LENGTH)
  assert flops["forward"] == sum(flops[name] for name in PRODUCTS)
  # The model computes masked scores too: L for each token, not (L + 1) / 2.
  scores = flops["attention_scores"]
  masked = scores * 2 * LENGTH // (LENGTH + 1) - scores
  # And the oracle's dispatch is a product too: the sum of experts' outputs.
  blocks = sum(config.is_moe(i) for i in range(config.num_layers))
  combined = blocks * 2 * 3 * 16
  expected = LENGTH * (flops["forward"] + masked + combined)
  # Streams may be mixed with or without a `dot_general`.
  streams = config.streams
  mixing = 2 * 4 * 2 * 16 * streams * (streams + 2) if streams > 1 else 0
  found = forward_products(config)
  assert expected - LENGTH * mixing <= found <= expected


def test_hyper_connections_cost_their_kernels_and_the_mixing():
  """G D * G (G + 2) and D * G (G + 2) multiply-adds, twice a block."""
  several = dataclasses.replace(
    CONFIG, streams=3, engram=dataclasses.replace(MEMORY, streams=3)
  )
  flops = flops_per_token(several, LENGTH)
  assert flops["hyper_connections"] == 2 * 4 * 2 * (3 * 16 * 15 + 16 * 15)
  one = flops_per_token(CONFIG, LENGTH)
  assert flops["engram"] == one["engram"] * 4 // 2  # G + 1 projections
  for name in set(PRODUCTS) - {"hyper_connections", "engram"}:
    assert flops[name] == one[name]


def test_only_the_scores_grow_with_the_length():
  short, long = flops_per_token(CONFIG, 9), flops_per_token(CONFIG, 19)
  assert long["attention_scores"] == 2 * short["attention_scores"]
  for name in set(PRODUCTS) - {"attention_scores"}:
    assert long[name] == short[name]


def test_training_costs_three_passes_and_what_is_computed_again():
  again = {}
  for remat in ("none", "dots", "block"):
    config = dataclasses.replace(CONFIG, remat=remat)
    flops = flops_per_token(config, LENGTH)
    assert flops["training"] == 3 * flops["forward"] + flops["recomputed"]
    again[remat] = flops["recomputed"]
  assert again["none"] == 0
  assert again["dots"] == flops["attention_scores"]
  assert again["block"] == flops["forward"] - flops["head"]


def test_six_per_parameter_at_the_papers_size():
  """The rule of thumb 6 P_act, to a few percent, without scores and head."""
  for name in ("dense_4b", "moe_27b", "engram_27b"):
    flops = flops_per_token(preset(name).model, 4096)
    body = flops["forward"] - flops["attention_scores"] - flops["head"]
    assert 3 * body == pytest.approx(6 * 3.8e9, rel=0.02)


def size(tree) -> int:
  """Bytes of the arrays in a tree; step counts, which are scalars, are none."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_are_those_of_the_state(optimizer, streams):
  train = dataclasses.replace(TRAIN, optimizer=optimizer)
  memory = dataclasses.replace(MEMORY, streams=streams, projection_bias=True)
  config = dataclasses.replace(CONFIG, streams=streams, engram=memory)
  memory = Memory.create(memory, vocab_size=config.vocab_size)
  state = TrainSetup.create(config, train, memory).abstract_state()
  found = bytes_of(config, memory.hashing, train)
  assert found["parameters"] == found["gradients"] == size(state.params)
  assert found["optimizer"] == size(state.opt_state)
  assert found["tables"] == size(state.tables)
  assert found["table_state"] == size(state.table_states)
  total = sum(found.values()) - found["training"] - found["serving"]
  assert found["training"] == total


def test_bytes_by_optimizer_of_the_tables():
  hashing = counting_hash(CONFIG)
  rows = sum(hashing.num_rows.values())
  per_row = {  # of width 3
    "lazy_adam": 24,
    "lazy_adam_row_steps": 28,
    "dense_adam": 24,
    "rowwise_adagrad": 4,
    "sinkhorn": 12,
  }
  assert set(per_row) == set(TABLE_OPTIMIZERS)
  read = 4 * 6 * LENGTH * 2 * (2 * 2) * 3  # tokens, layers, columns, width
  for name, state in per_row.items():
    train = dataclasses.replace(TRAIN, table_optimizer=name)
    found = bytes_of(CONFIG, hashing, train)
    assert found["table_state"] == state * rows
    dense = found["tables"] if name == "dense_adam" else 0
    assert found["row_gradients"] == read + dense


def test_without_memory_and_in_half_the_width():
  plain = dataclasses.replace(CONFIG, engram=None)
  found = bytes_of(plain, None, TRAIN)
  assert found["tables"] == found["table_state"] == found["row_gradients"] == 0
  assert found["serving"] == found["parameters"]
  half = dataclasses.replace(plain, dtype="bfloat16")
  assert bytes_of(half, None, TRAIN)["serving"] == found["serving"] // 2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_counted(name):
  found = preset(name)
  hashing = counting_hash(found.model)
  assert bytes_of(found.model, hashing, found.train)["training"] > 0
  assert flops_per_token(found.model, found.train.seq_len)["training"] > 0


def test_a_length_below_one_is_refused():
  with pytest.raises(InputError, match="seq_len: 0"):
    flops_per_token(CONFIG, 0)
