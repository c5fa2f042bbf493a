"""Weights taken apart and cast for decoding: the same model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.decoders import TableDecoder
from engram_jax.decoding.generate import pad_prompts
from engram_jax.decoding.state import init_state, prefill
from engram_jax.decoding.weights import for_decoding

PROMPTS = pad_prompts([[5, 6, 7, 8, 9], [20], [3, 1, 4]], vocab_size=24)


@functools.partial(jax.jit, static_argnums=(2, 3))
def last_logits(*arguments):
  return prefill(*arguments)[0]


def test_the_blocks_apart_are_the_stacks(every_tiny):
  tiny = every_tiny
  state = init_state(tiny.model, tiny.hashing, batch=3, capacity=16)
  expected = last_logits(*tiny.parts, state, *PROMPTS)
  _, *memory = tiny.parts
  found = last_logits(for_decoding(tiny.model), *memory, state, *PROMPTS)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_second_time_changes_nothing_and_the_first_leaves_the_model(tiny):
  before = jax.tree.leaves(nnx.state(tiny.model))
  apart = for_decoding(tiny.model)
  assert for_decoding(apart) is apart
  after = jax.tree.leaves(nnx.state(tiny.model))
  assert all(a is b for a, b in zip(before, after, strict=True))
  size = sum(leaf.size for leaf in before)
  assert sum(x.size for x in jax.tree.leaves(nnx.state(apart))) == size


def test_it_can_be_called_without_a_cache_too(tiny):
  model = tiny.model
  expected = model(PROMPTS[0], None).logits
  config = dataclasses.replace(model.config, scan_blocks=True)
  apart = for_decoding(model)
  apart.config = config
  found = apart(PROMPTS[0], None).logits
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


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
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(apart))
  }
  for path, dtype in dtypes.items():
    kept = any(name in path for name in ("scale", "router", "bias"))
    assert dtype == (jnp.float32 if kept else jnp.bfloat16), path
  state = init_state(tiny.model, tiny.hashing, batch=3, capacity=16)
  expected = last_logits(*tiny.parts, state, *PROMPTS)
  decoder = TableDecoder(*tiny.parts)
  found, _ = decoder.start(decoder.init_state(3, 16), *PROMPTS)()
  # Of loud weights: roundings of 2^-8, some of which XLA may leave out.
  np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)
