"""Tests of what a checkpoint says of its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.training.checksums import (
  checksum,
  describe,
  require_same_arrays,
  rows_in_use,
)


def mix(h: int) -> int:
  h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
  h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
  return h ^ (h >> 16)


def by_hand(x: np.ndarray) -> int:
  """The same checksum in Python integers."""
  words = np.frombuffer(x.tobytes(), f"<u{x.dtype.itemsize}")
  total = 0
  for i, word in enumerate(words.tolist()):
    place = i * 0x9E3779B9
    total += mix((word + place) % 2**32) - mix(place % 2**32)
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


@pytest.mark.parametrize(
  ("dtype", "shape"),
  [("int32", (7,)), ("bfloat16", (7, 3)), ("float32", (7, 3, 2))],
)
def test_zero_rows_at_the_end_count_for_nothing(dtype, shape):
  rng = np.random.default_rng(0)
  x = rng.normal(scale=9, size=shape)
  # Zeros in between, or at the start of the last row, are no padding.
  x[2], x.reshape(7, -1)[-1, :-1] = 0, 0
  x = jnp.asarray(x, dtype)
  for more in (1, 1000):
    padded = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))
    assert checksum(padded) == checksum(x)
    assert checksum(padded[1:]) != checksum(x)
  assert checksum(jnp.zeros(shape, dtype)) == 0
  if dtype != "int32":
    # A zero that is not of zero bits.
    sign = jnp.full((1, *shape[1:]), -0.0, dtype)
    assert checksum(jnp.concatenate([x, sign])) != checksum(x)
  if x.ndim > 1:
    # The other axes count.
    wider = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    assert checksum(wider) != checksum(x)


def test_every_change_to_or_from_zero_counts():
  size = 50
  zeros = np.zeros(size, np.uint32)
  for place in range(size):
    # The last is the word that an unmixed sum of places would send to 0.
    for word in (1, 1 << 31, -place * 0x9E3779B9 % 2**32):
      x = zeros.copy()
      x[place] = word
      assert (int(checksum(jnp.asarray(x))) == 0) == (word == 0)


def test_a_wide_dtype_is_refused():
  with jax.enable_x64(True):
    with pytest.raises(InputError, match=r"^x.dtype: float64; valid: a dtype"):
      checksum(jnp.zeros(3, jnp.float64))


def test_arrays_are_described_and_compared():
  arrays = {"a": jnp.ones((2, 3)), "b": jnp.zeros((), jnp.int32)}
  described = describe(arrays)
  assert described["a"] == ["float32", [2, 3], by_hand(np.ones((2, 3), "f4"))]
  require_same_arrays("item", described, arrays, {})
  for expected, message in (
    ({**arrays, "c": jnp.ones(1)}, "item/c: missing in the checkpoint; valid:"),
    ({"a": arrays["a"]}, r"item/b: int32\[\] in .*; valid: no such array"),
    (
      {**arrays, "a": jnp.ones((3, 2))},
      r"item/a: float32\[2, 3\] in the checkpoint; valid: float32\[3, 2\]",
    ),
  ):
    with pytest.raises(InputError, match=f"^{message}"):
      require_same_arrays("item", described, expected, {})


def test_padding_may_differ_where_a_hash_says_how_many_rows_there_are():
  rows = rows_in_use({"hash": {"layers": [1, 14], "primes": [[3, 4], [5]]}})
  assert rows == {"1": 7, "14": 5}
  assert rows_in_use({}) == rows_in_use({"hash": None}) == {}
  described = {
    name: ["float32", [8, 2], 0] for name in ("tables/1", "table_states/1/mean")
  } | {"table_states/1/step": ["int32", [], 0]}
  others = {"table_states/1/step": jax.ShapeDtypeStruct((), jnp.int32)}

  def compare(shape, rows=rows):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    expected = dict.fromkeys(["tables/1", "table_states/1/mean"], leaf) | others
    require_same_arrays("item", described, expected, rows)

  compare((8, 2))
  compare((7, 2))
  compare((8, 2), rows={})
  for shape in ((6, 2), (9, 2), (7, 3), (7,), (), (7, 2, 1)):
    with pytest.raises(InputError, match=r"^item/tables/1: .* with 7 rows in "):
      compare(shape)
  # As many as are stored, or nothing is known: then exactly these.
  for known in ({}, {"14": 7}, {"1": 9}):
    with pytest.raises(
      InputError, match=r"^item/tables/1: float32\[8, 2\] in "
    ):
      compare((7, 2), rows=known)
