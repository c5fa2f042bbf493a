"""The convolution against NumPy, in pieces, and across documents."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.fusion.short_conv import short_conv

SHAPE = (2, 19, 2, 3)


def inputs(taps=4, seed=0):
  a, b = jax.random.split(jax.random.key(seed))
  return jax.random.normal(a, SHAPE), jax.random.normal(b, (taps, *SHAPE[2:]))


def by_hand(x, kernel, dilation):
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    for tap in range(len(kernel)):
      source = t - (len(kernel) - 1 - tap) * dilation
      if source >= 0:
        y[:, t] += x[:, source] * kernel[tap]
  return y


@pytest.mark.parametrize("taps, dilation", [(1, 1), (3, 2), (4, 3), (4, 30)])
def test_against_numpy(taps, dilation):
  x, kernel = inputs(taps)
  y, state = short_conv(x, kernel, dilation=dilation)
  expected = by_hand(np.asarray(x), np.asarray(kernel), dilation)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert state.shape == (2, (taps - 1) * dilation, 2, 3)


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_pieces_equal_the_whole(cut):
  x, kernel = inputs()
  starts = jax.random.bernoulli(jax.random.key(5), 0.15, SHAPE[:2])
  whole, final = short_conv(x, kernel, dilation=3, starts=starts)
  state, pieces = None, []
  for i in range(0, SHAPE[1], cut):
    y, state = short_conv(
      x[:, i : i + cut],
      kernel,
      dilation=3,
      state=state,
      starts=starts[:, i : i + cut],
    )
    pieces.append(y)
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-6)
  np.testing.assert_array_equal(state, final)


def test_a_later_position_changes_nothing_before_it():
  x, kernel = inputs()
  before, _ = short_conv(x, kernel, dilation=3)
  after, _ = short_conv(x.at[:, 9].add(1), kernel, dilation=3)
  np.testing.assert_array_equal(before[:, :9], after[:, :9])
  assert (before[:, 9] != after[:, 9]).any()


def test_documents_are_convolved_alone():
  x, kernel = inputs()
  cuts = [0, 1, 5, 6, 13, 19]
  starts = jnp.zeros(SHAPE[:2], bool).at[:, jnp.array(cuts[:-1])].set(True)
  packed, _ = short_conv(x, kernel, dilation=3, starts=starts)
  alone = [
    short_conv(x[:, a:b], kernel, dilation=3)[0]
    for a, b in itertools.pairwise(cuts)
  ]
  np.testing.assert_array_equal(packed, jnp.concatenate(alone, 1))


def test_state_of_right_padded_prompts():
  x, kernel = inputs()
  lengths = jnp.array([4, 19])
  _, together = short_conv(x, kernel, dilation=3, lengths=lengths)
  for i, length in enumerate(lengths):
    _, alone = short_conv(x[i : i + 1, : int(length)], kernel, dilation=3)
    np.testing.assert_array_equal(together[i], alone[0])


def test_refuses_a_state_of_another_shape():
  x, kernel = inputs()
  with pytest.raises(InputError, match=r"state: \(2, 8, 2, 3\)"):
    short_conv(x, kernel, dilation=3, state=jnp.zeros((2, 8, 2, 3)))
