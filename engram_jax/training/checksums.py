"""What a checkpoint says of its arrays: dtype, shape, and a 32-bit checksum.

  checksum = sum over entries i of mix(bits(x_i) + i g) - mix(i g)  (mod 2^32)

`mix` is MurmurHash3's finalizer, a bijection of the 32-bit words: one changed
entry always changes the sum, and a random change of many escapes it once in
2^32. A sum of integers does not depend on its order, so the checksum is the
same on any device and for any sharding. It is there because what Orbax writes
carries none: a flipped bit in a file would be restored without a word.

Nor does it depend on zero rows at the end, of which a table has as many as its
devices ask for: the second term makes an entry of zero bits add nothing, and
the place i of an entry, row * d + column, knows nothing of the number of rows.
The difference is a bijection of the bits still, so that a change to or from
zero counts like any other. (Leaving zeros out of a sum of mix(bits + i g) would
do too, but for one word at each place: -i g, which `mix` sends to 0.)
"""

import hashlib
import json
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
  place = place * jnp.uint32(0x9E3779B9)
  return jnp.sum(_mix(bits + place) - _mix(place), dtype=jnp.uint32)


def _mix(h: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def describe(arrays: Mapping[str, Array]) -> dict[str, list]:
  """`[dtype, shape, checksum]` of each array, ready for JSON."""
  # One after the other: on CPU all threads of XLA's pool may otherwise wait for
  # a device whose part of another checksum has none left to run on.
  sums = {name: jax.device_get(checksum(x)) for name, x in arrays.items()}
  return {
    name: [str(x.dtype), list(x.shape), int(sums[name])]
    for name, x in arrays.items()
  }


def rows_in_use(run_metadata: Mapping[str, Any]) -> dict[str, int]:
  """Rows R that the hash of each table can name, by layer; {} without one.

  Args:
    run_metadata: a checkpoint's, of which `hash` is `NgramHash.to_dict`'s.
  """
  stored = run_metadata.get("hash") or {}
  primes = zip(stored.get("layers", ()), stored.get("primes", ()))
  return {str(layer): sum(of_heads) for layer, of_heads in primes}


def weights_digest(manifest: Mapping[str, Any]) -> str:
  """Digest of a checkpoint's parameters and tables, from what it says of them.

  It does not depend on the devices that saved: the padding of a table is not in
  it.

  Args:
    manifest: with `arrays` by item, from `describe`, and `rows`.

  Returns:
    64 hexadecimal digits.
  """
  found = []
  for item in ("backbone", "memory"):
    described = manifest["arrays"].get(item, {})
    for name, (dtype, shape, total) in sorted(described.items()):
      used = _rows_of(name, manifest["rows"])
      shape = shape if used is None else [used, *shape[1:]]
      found.append([name, dtype, shape, total])
  return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def require_same_arrays(
  item: str,
  described: Mapping[str, list],
  expected: Mapping[str, Any],
  rows: Mapping[str, int],
) -> None:
  """Refuses a checkpoint with missing, further or other arrays.

  Tables and the states of their optimizers may differ in their padding: there
  the checkpoint has R rows or more, and what is expected has R or more too,
  but fewer padding rows than devices, so that the template of a larger hash is
  refused; one of about as many rows is for `require_same_run` to tell apart.

  Args:
    item: the item of the checkpoint, for messages.
    described: what `describe` said of its arrays, by name.
    expected: what has the dtypes, shapes and shardings wanted, by name.
    rows: `rows_in_use` of the checkpoint.

  Raises:
    InputError: the first name of which dtype and shape differ.
  """
  for name in dict.fromkeys([*expected, *described]):
    was, wanted, same = "missing in the checkpoint", "no such array", False
    if name in described:
      dtype, shape, _ = described[name]
      was = f"{dtype}{shape} in the checkpoint"
    if name in expected:
      leaf = expected[name]
      wanted = f"{leaf.dtype}{list(leaf.shape)}"
    if name in described and name in expected:
      same = was == f"{wanted} in the checkpoint"
      used = _rows_of(name, rows)
      if used is not None and shape and shape[0] >= used:
        same = same or (
          [dtype, *shape[1:]] == [str(leaf.dtype), *leaf.shape[1:]]
          and len(leaf.shape) == len(shape)
          and used <= leaf.shape[0] < used + _devices(leaf)
        )
        was += f" with {used} rows in use"
    require(same, f"{item}/{name}", was, wanted)


def _rows_of(name: str, rows: Mapping[str, int]) -> int | None:
  """R of the table that `name` is, or belongs to; None if that is unknown."""
  field, _, rest = name.partition("/")
  is_table = field in ("tables", "table_states")
  return rows.get(rest.partition("/")[0]) if is_table else None


def _devices(leaf: Any) -> int:
  sharding = getattr(leaf, "sharding", None)
  return 1 if sharding is None else len(sharding.device_set)
