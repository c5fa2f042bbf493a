"""The small layers against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.layers import (
  Embedding,
  RMSNorm,
  SwiGLU,
  logits_of,
  rotary,
  rotary_frequencies,
)
from engram_jax.errors import InputError

OPTIONS = {"init_std": 0.5, "dtype": "float32"}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def float64(x):
  return np.asarray(x, np.float64)


def leaf_dtypes(tree):
  return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_rms_norm_value_and_dtype():
  norm = RMSNorm(6, eps=0.1)
  norm.scale[...] = jnp.arange(1.0, 7.0)
  x = normal(0, 2, 3, 6)
  x64 = float64(x)
  root = np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 0.1)
  np.testing.assert_allclose(norm(x), x64 / root * np.arange(1, 7), rtol=1e-6)
  assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert leaf_dtypes(norm) == {jnp.dtype("float32")}


def test_swiglu_value():
  layer = SwiGLU(4, 7, rngs=nnx.Rngs(0), **OPTIONS)
  x = normal(1, 2, 3, 4)
  gate, up, down = map(float64, (layer.gate, layer.up, layer.down))
  a = float64(x) @ gate
  expected = (a / (1 + np.exp(-a)) * (float64(x) @ up)) @ down
  np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_new_weights_have_the_asked_deviation():
  layer = SwiGLU(100, 200, init_std=0.02, dtype="float32", rngs=nnx.Rngs(0))
  for weight in jax.tree.leaves(layer):
    assert abs(float(weight.std()) - 0.02) < 1e-3
    assert abs(float(weight.mean())) < 1e-3
  assert not np.array_equal(layer.gate[...], layer.up[...])


def test_embedding_and_tied_head():
  layer = Embedding(11, 4, rngs=nnx.Rngs(0), **OPTIONS)
  table = float64(layer.table)
  ids = jnp.array([[0, 10, 3]])
  np.testing.assert_array_equal(layer(ids), table[[[0, 10, 3]]])
  hidden = normal(2, 1, 3, 4)
  expected = float64(hidden) @ table.T
  np.testing.assert_allclose(
    logits_of(hidden, layer.table[...]), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("wrong", [-1, 11])
def test_embedding_refuses_ids_outside_the_vocabulary(wrong):
  layer = Embedding(11, 4, rngs=nnx.Rngs(0), **OPTIONS)
  ids = jnp.array([[0, wrong]])
  with pytest.raises(InputError, match="token_ids: "):
    layer(ids)


def test_rotary_turns_half_split_pairs():
  x = normal(3, 2, 5, 3, 8)
  positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 700]])
  turned = np.asarray(rotary(x, positions, rotary_frequencies(8, 100.0)))
  for i in range(4):
    angle = float64(positions)[:, :, None] * 100.0 ** (-2 * i / 8)
    pair = float64(x[..., i]) + 1j * float64(x[..., i + 4])
    expected = pair * np.exp(1j * angle)
    # 700 radians in float32 are known to about 3e-5.
    np.testing.assert_allclose(turned[..., i], expected.real, atol=1e-4)
    np.testing.assert_allclose(turned[..., i + 4], expected.imag, atol=1e-4)
  np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_rotary_product_depends_on_distance_only():
  query, key = normal(4, 1, 1, 1, 8), normal(5, 1, 1, 1, 8)
  frequencies = rotary_frequencies(8, 1e4)

  def product(p, q):
    a = rotary(query, jnp.array([[p]]), frequencies)
    return float(jnp.sum(a * rotary(key, jnp.array([[q]]), frequencies)))

  assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
  assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-4)


def test_rotary_works_in_float32_and_keeps_the_dtype():
  x = normal(6, 1, 2, 1, 4).astype(jnp.bfloat16)
  positions = jnp.array([[1000, 1001]])
  frequencies = rotary_frequencies(4, 1e4)
  turned = rotary(x, positions, frequencies)
  assert turned.dtype == jnp.bfloat16
  wide = rotary(x.astype(jnp.float32), positions, frequencies)
  np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


def test_rotary_refuses_an_odd_width():
  with pytest.raises(
    InputError, match="rotary width: 7; valid: an even number"
  ):
    rotary_frequencies(7, 1e4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compute_dtype_keeps_float32_parameters(dtype):
  rngs = nnx.Rngs(0)
  layers = {
    "ffn": SwiGLU(4, 8, init_std=0.5, dtype=dtype, rngs=rngs),
    "embedding": Embedding(9, 4, init_std=0.5, dtype=dtype, rngs=rngs),
  }

  def loss(layers):
    hidden = layers["ffn"](layers["embedding"](jnp.array([[1, 2]])))
    assert hidden.dtype == dtype
    logits = logits_of(hidden, layers["embedding"].table[...])
    assert logits.dtype == jnp.float32
    return jnp.sum(logits**2)

  grads = jax.grad(loss)(layers)
  for tree in (layers, grads):
    assert leaf_dtypes(tree) == {jnp.dtype("float32")}
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_bad_arguments_are_refused():
  rngs = nnx.Rngs(0)
  with pytest.raises(InputError, match="dtype: float16; valid: one of float32"):
    SwiGLU(4, 8, init_std=0.5, dtype="float16", rngs=rngs)
  with pytest.raises(InputError, match="dtype: half"):
    Embedding(4, 8, init_std=0.5, dtype="half", rngs=rngs)
  x = jnp.ones((1, 2, 5))
  ffn = SwiGLU(4, 8, rngs=rngs, **OPTIONS)
  for call in (RMSNorm(4, eps=1e-6), ffn):
    with pytest.raises(
      InputError, match=r"shape: \(1, 2, 5\); valid: \[..., 4\]"
    ):
      call(x)
