"""Weights taken apart and cast for decoding: the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.decoders import Decoder
from engram_jax.decoding.generate import pad_prompts
from engram_jax.decoding.weights import for_decoding

PROMPTS = pad_prompts([[5, 6, 7, 8, 9], [20], [3, 1, 4]], vocab_size=24)


def last_logits(decoder):
  state = decoder.init_state(3, 16)
  return decoder.start(state, *PROMPTS)()[0]


def test_the_blocks_apart_are_the_stacks(every_tiny):
  tokens, lengths = PROMPTS
  whole = every_tiny.logits(tokens)
  expected = whole[np.arange(3), np.asarray(lengths) - 1]
  found = last_logits(Decoder(*every_tiny.parts))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  _, *memory = every_tiny.parts
  apart = for_decoding(every_tiny.model)
  again = last_logits(Decoder(apart, *memory))
  np.testing.assert_array_equal(again, found)


def test_a_second_time_changes_nothing_and_the_first_leaves_the_model(tiny):
  before = jax.tree.leaves(nnx.state(tiny.model))
  apart = for_decoding(tiny.model)
  assert for_decoding(apart) is apart
  after = jax.tree.leaves(nnx.state(tiny.model))
  assert all(a is b for a, b in zip(before, after, strict=True))
  size = sum(leaf.size for leaf in before)
  assert sum(x.size for x in jax.tree.leaves(apart)) == size
  assert len(apart.blocks) == 3 and apart.config == tiny.model.config


def in_bfloat16(tiny):
  """The model that computes in bfloat16, of float32 parameters."""
  config = tiny.model.config
  memory = config.engram
  memory = memory and dataclasses.replace(memory, dtype="bfloat16")
  config = dataclasses.replace(config, dtype="bfloat16", engram=memory)
  make = lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)))
  graph, _ = jax.eval_shape(make)
  model = nnx.merge(graph, nnx.state(tiny.model))
  return dataclasses.replace(tiny, model=model)


@pytest.mark.parametrize("kind", ["conv", "plain"])
def test_what_is_computed_in_bfloat16_is_kept_in_it(request, kind):
  from tests.decoding.conftest import make_tiny

  tiny = in_bfloat16(make_tiny(kind))
  apart = for_decoding(tiny.model)
  dtypes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(apart)
  }
  for path, dtype in dtypes.items():
    kept = any(name in path for name in ("scale", "router", "bias"))
    assert dtype == (jnp.float32 if kept else jnp.bfloat16), path
  cache = jax.eval_shape(lambda: Decoder(*tiny.parts).init_state(2, 8)).cache
  arrays = jax.tree.leaves((cache.attention, cache.conv))
  assert all(x.dtype == jnp.bfloat16 for x in arrays)
  tokens, lengths = PROMPTS
  expected = tiny.logits(tokens)[np.arange(3), np.asarray(lengths) - 1]
  found = last_logits(Decoder(*tiny.parts))
  # Of loud weights: roundings of 2^-8, some of which XLA may leave out.
  np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)
