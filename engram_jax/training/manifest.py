"""What a checkpoint says of its arrays: dtype, shape, and a 32-bit checksum.

  checksum = sum over entries i of mix(bits(x_i) + i * golden)   (mod 2^32)

`mix` is MurmurHash3's finalizer, a bijection of the 32-bit words: one changed
entry always changes the sum, and a random change of many escapes it once in
2^32. A sum of integers does not depend on its order, so the checksum is the
same on any device and for any sharding. It is there because what Orbax writes
carries none: a flipped bit in a file would be restored without a word.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from engram_jax.errors import InputError, require

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """The checksum of the bits of `x`, which may be sharded.

  Its cost is one pass over the array.

  Args:
    x: any dtype of 1, 2 or 4 bytes; any shape.

  Raises:
    InputError: a dtype of another width.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  if x.dtype.itemsize not in _WORDS:
    raise InputError("x.dtype", x.dtype, "a dtype of 1, 2 or 4 bytes")
  word = _WORDS[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  # The place of an entry, modulo 2^32. By axis, because a reshape to one axis
  # would gather a sharded array.
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place + along * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  bits = bits + place * jnp.uint32(0x9E3779B9)
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def describe(arrays: Mapping[str, Array]) -> dict[str, list]:
  """`[dtype, shape, checksum]` of each array, ready for JSON."""
  sums = jax.device_get({name: checksum(x) for name, x in arrays.items()})
  return {
    name: [str(x.dtype), list(x.shape), int(sums[name])]
    for name, x in arrays.items()
  }


def require_same_arrays(
  item: str, described: Mapping[str, list], expected: Mapping[str, Any]
) -> None:
  """Refuses a checkpoint with missing, further or other arrays.

  Args:
    item: the item of the checkpoint, for messages.
    described: what `describe` said of its arrays, by name.
    expected: what has the dtypes and shapes wanted, by name.

  Raises:
    InputError: the first name of which dtype and shape differ.
  """
  for name in dict.fromkeys([*expected, *described]):
    was, wanted = "missing in the checkpoint", "no such array"
    if name in described:
      dtype, shape, _ = described[name]
      was = f"{dtype}{shape} in the checkpoint"
    if name in expected:
      wanted = f"{expected[name].dtype}{list(expected[name].shape)}"
    require(was == f"{wanted} in the checkpoint", f"{item}/{name}", was, wanted)
