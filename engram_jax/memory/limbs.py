"""64-bit arithmetic on pairs of uint32: what the hash needs, and no more.

  value = high * 2^32 + low

JAX has 32-bit integers unless told otherwise for the whole program. A product
of an id and a multiplier is below 2^63 by construction, so two limbs hold it;
XOR goes limb by limb; the remainder by a prime below 2^31 needs no division.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def mixes_by_order(
  window: Sequence[UInt32[Array, "B L"]],
  multipliers: np.ndarray,
  *,
  smallest_order: int = 2,
) -> list[tuple[UInt32[Array, "B L"], UInt32[Array, "B L"]]]:
  """The mixes of all orders: XOR of the products, cut off at each order.

  Args:
    window: N arrays uint32 [B, L]; entry k is the id k positions back.
    multipliers: int64 [N].
    smallest_order: n of the first mix that is wanted.

  Returns:
    (high, low), uint32 [B, L] each, of mix_n .. mix_N.
  """
  mixes = []
  high = low = jnp.zeros_like(window[0])
  for ids, multiplier in zip(window, multipliers.tolist(), strict=True):
    m_high, m_low = jnp.uint32(multiplier >> 32), jnp.uint32(multiplier % 2**32)
    low = low ^ (ids * m_low)
    high = high ^ (mulhi(ids, m_low) + ids * m_high)
    mixes.append((high, low))
  return mixes[smallest_order - 1 :]


def one_per_column(
  limbs: Sequence[UInt32[Array, "B L"]], heads: int
) -> UInt32[Array, "B L K"]:
  """One limb per order to one per column: an order serves `heads` columns.

  By selection, not by `jnp.stack` and `jnp.repeat`: those lay out an axis of
  one number per order, which XLA neither fuses nor vectorises; on CPU the whole
  hash is about ten times slower that way.

  Args:
    limbs: uint32 [B, L], one array per n-gram order.
    heads: number of columns of each order.
  """
  order = np.repeat(np.arange(len(limbs)), heads)
  columns = jnp.broadcast_to(limbs[0][..., None], (*limbs[0].shape, order.size))
  for i, limb in enumerate(limbs[1:], start=1):
    columns = jnp.where(order < i, columns, limb[..., None])
  return columns


def mulhi(
  x: UInt32[Array, "*S"], y: UInt32[Array, "*#S"]
) -> UInt32[Array, "*S"]:
  """High 32 bits of the product, by four products of 16-bit halves.

  `jax.lax.mulhi` is the same, but a program for several devices does not
  compile with it (jax 0.10.2 and 0.12.0: "failed to legalize operation").

  Args:
    x: uint32 of any shape.
    y: uint32, broadcast to the shape of `x`.
  """
  x_high, x_low = x >> 16, x & 0xFFFF
  y_high, y_low = y >> 16, y & 0xFFFF
  # Neither sum overflows: (2^16 - 1)^2 + 2^16 - 1 < 2^32.
  middle = x_high * y_low + (x_low * y_low >> 16)
  carry = x_low * y_high + (middle & 0xFFFF)
  return x_high * y_high + (middle >> 16) + (carry >> 16)


def remainder(
  high: UInt32[Array, "*S K"], low: UInt32[Array, "*S K"], primes: np.ndarray
) -> UInt32[Array, "*S K"]:
  """(high * 2^32 + low) mod primes, for any prime below 2^31.

  Shoup: with c' = floor(c 2^32 / p), x c - floor(x c' / 2^32) p lies in
  [0, 2p) for any 32-bit x; a 32-bit wrap does not matter, since 2p < 2^32.

  Args:
    high: uint32 [..., K], the upper 32 bits.
    low: uint32 [..., K], the lower 32 bits.
    primes: int64 [K], known on the host.
  """
  c = (1 << 32) % primes
  c_shoup = _constant((c << 32) // primes)
  one_shoup = _constant((1 << 32) // primes)
  c, p = _constant(c), _constant(primes)

  def below_p(x):  # x < 2p; where x < p the difference wraps and is larger
    return jnp.minimum(x, x - p)

  from_high = below_p(high * c - mulhi(high, c_shoup) * p)
  from_low = below_p(low - mulhi(low, one_shoup) * p)
  return below_p(from_high + from_low)


def _constant(values: np.ndarray) -> UInt32[Array, "K"]:
  return jnp.asarray(values.astype(np.uint32))
