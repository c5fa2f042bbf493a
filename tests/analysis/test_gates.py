"""Tests of the gates of a text."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.analysis.gates import gate_map, token_texts
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.data.tokenizers import END_ID, train_tokenizer
from engram_jax.errors import InputError
from engram_jax.memory.memory import Memory
from engram_jax.stores.program_stores import TableStore
from engram_jax.training.state import abstract_model

CONFIG = ModelConfig(
  vocab_size=40,
  hidden_size=8,
  num_layers=2,
  attention=AttentionConfig(
    num_heads=2, nope_dim=4, rope_dim=4, value_dim=4, kv_rank=4
  ),
  dense_size=8,
  # A capacity that drops most assignments: the gates must not see it.
  moe=MoEConfig(num_experts=4, top_k=2, expert_size=4, capacity_factor=0.1),
  num_dense_layers=0,
  engram=EngramConfig(
    hidden_size=8, layers=(0, 1), rows_per_head=(30, 30), heads=2, head_dim=4
  ),
)
IDS = np.array([3, 4, 5, 3, 4, 5, 7, 39, 0, 3], np.int64)


@pytest.fixture(scope="module")
def arguments():
  memory = Memory.create(CONFIG.engram, vocab_size=40)
  # Drawn by NumPy: compiling the initialisation would take most of the time.
  draw = np.random.default_rng(0).normal

  def random(shape):
    return jnp.asarray(draw(scale=0.5, size=shape), jnp.float32)

  tables = {i: random((rows, 4)) for i, rows in memory.num_rows.items()}
  graph, *state = abstract_model(CONFIG)
  state = jax.tree.map(lambda leaf: random(leaf.shape), state)
  model = nnx.merge(graph, *state)
  return model, memory, tables


def test_gates_are_those_of_the_dense_model(arguments):
  model, memory, tables = arguments
  gates = gate_map(*arguments, IDS)
  assert sorted(gates) == [0, 1]
  ids = jnp.asarray(IDS, jnp.int32)[None]
  rows = memory.lookup(tables, ids).rows

  @nnx.jit
  def both(model):
    forms = ("dense", "bucketed")
    return [model(ids, rows, dispatch=form).gates for form in forms]

  expected, dropping = both(model)
  for layer, gate in gates.items():
    assert isinstance(gate, np.ndarray)
    assert gate.shape == (10, 1) and gate.dtype == np.float32
    assert (gate > 0).all() and (gate < 1).all()
    np.testing.assert_allclose(gate, expected[layer][0], atol=1e-6)
  assert np.abs(gates[1] - dropping[1][0]).max() > 1e-4


def test_any_store_gives_the_gates_of_the_tables(arguments):
  model, memory, tables = arguments
  expected = gate_map(*arguments, IDS)
  for store in (TableStore(tables), memory.open_store("host", tables)):
    found = gate_map(model, memory, store, IDS)
    chex.assert_trees_all_equal(found, expected)


def test_a_later_token_changes_no_gate_before_it(arguments):
  whole = gate_map(*arguments, IDS)
  other = gate_map(*arguments, np.append(IDS[:6], [8, 9, 10, 11]))
  for layer, gate in whole.items():
    np.testing.assert_allclose(other[layer][:6], gate[:6], atol=1e-6)
    assert (other[layer][6:] != gate[6:]).all()


def test_what_has_no_gates_is_refused(arguments):
  model, memory, tables = arguments
  with pytest.raises(InputError, match="no tokens"):
    gate_map(model, memory, tables, IDS[:0])
  with pytest.raises(InputError, match="40"):
    gate_map(model, memory, tables, np.array([1, 40]))
  without = dataclasses.replace(CONFIG, engram=None)
  graph, *state = abstract_model(without)
  with pytest.raises(InputError, match="engram"):
    gate_map(nnx.merge(graph, *state), memory, tables, IDS)


def test_token_texts_join_to_the_text_and_stay_aligned():
  text = "def f(x):\n\treturn 'é漢🎉'  # e\u0301\n"
  tokenizer = train_tokenizer(["def f(x):\n  return x\n"] * 5, vocab_size=270)
  ids = tokenizer.encode(text).ids
  texts = token_texts(tokenizer, ids)
  assert len(texts) == len(ids)
  assert "".join(texts) == text
  assert "" in texts  # the first bytes of a character
  assert token_texts(tokenizer, [*ids, END_ID]) == [*texts, ""]
  assert token_texts(tokenizer, []) == []
  cut = tokenizer.encode("é").ids[:1]
  assert token_texts(tokenizer, cut) == ["\ufffd"]
