"""Tests of what a checkpoint says of its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.training.manifest import (
  checksum,
  describe,
  require_same_arrays,
)


def by_hand(x: np.ndarray) -> int:
  """The same checksum in Python integers."""
  words = np.frombuffer(x.tobytes(), f"<u{x.dtype.itemsize}")
  total = 0
  for place, word in enumerate(words.tolist()):
    h = (word + place * 0x9E3779B9) % 2**32
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    total += h ^ (h >> 16)
  return total % 2**32


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "int32", "int8", "bool", "float8_e4m3fn"]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2), (2, 0)])
def test_checksum_by_hand(dtype, shape):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(scale=9, size=shape), dtype)
  assert int(checksum(x)) == by_hand(np.asarray(x))


def test_any_bit_and_any_order_counts():
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  sums = {int(checksum(jnp.asarray(x)))}
  words = x.view(np.uint32)
  for place in range(x.size):
    for bit in range(32):
      flipped = words.copy()
      flipped.flat[place] ^= np.uint32(1 << bit)
      sums.add(int(checksum(jnp.asarray(flipped.view(np.float32)))))
  sums.add(int(checksum(jnp.asarray(x[::-1]))))
  # A sign of zero and a NaN's payload are bits as well.
  assert len(sums) == 1 + 6 * 32 + 1


def test_a_wide_dtype_is_refused():
  with jax.enable_x64(True):
    with pytest.raises(InputError, match=r"^x.dtype: float64; valid: a dtype"):
      checksum(jnp.zeros(3, jnp.float64))


def test_arrays_are_described_and_compared():
  arrays = {"a": jnp.ones((2, 3)), "b": jnp.zeros((), jnp.int32)}
  described = describe(arrays)
  assert described["a"] == ["float32", [2, 3], by_hand(np.ones((2, 3), "f4"))]
  require_same_arrays("item", described, arrays)
  for expected, message in (
    ({**arrays, "c": jnp.ones(1)}, "item/c: missing in the checkpoint; valid:"),
    ({"a": arrays["a"]}, r"item/b: int32\[\] in .*; valid: no such array"),
    (
      {**arrays, "a": jnp.ones((3, 2))},
      r"item/a: float32\[2, 3\] in the checkpoint; valid: float32\[3, 2\]",
    ),
  ):
    with pytest.raises(InputError, match=f"^{message}"):
      require_same_arrays("item", described, expected)
