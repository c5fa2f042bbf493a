"""Pinned host memory: how tables lie there, and how a program reads them.

A device's `pinned_host` memory holds what its own cannot. A compiled program
gathers there, by the host's processor, and only the rows cross to the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import compute_on as compute_on_module
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt8

# jax 0.10 has the decorator under another name.
_compute_on = getattr(compute_on_module, "compute_on2", None)
_compute_on = _compute_on or compute_on_module.compute_on


def pinned_format(device: jax.Device) -> Format:
  """Where and how a table lies in a device's pinned host memory.

  Rows one after the other. A TPU would have the first bytes of all rows beside
  each other, then the second; and at widths of whole 128 bytes XLA:TPU, which
  wants its host's arrays untiled, ends the process.
  """
  # Of one device's sharding, JAX forgets the memory where shapes or a format
  # stand for the array; not of a mesh's.
  mesh = Mesh(np.array([device]), ("device",))
  place = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
  untiled = Layout(major_to_minor=(0, 1), tiling=((1,),))
  return Format(untiled if device.platform == "tpu" else None, place)


@jax.jit
def gather_on_host(
  table: UInt8[Array, "_R n"], ids: Int[Array, "*S"]
) -> UInt8[Array, "*S n"]:
  """Rows of a table in pinned host memory, gathered there; for use under jit.

  Args:
    table: as `pinned_format` says.
    ids: row ids, in bounds; on the device.

  Returns:
    The rows on the device.
  """

  @_compute_on(
    compute_type="device_host", out_memory_spaces=jax.memory.Space.Device
  )
  def gather(table, ids):
    # Any other mode makes constants in the device's memory.
    return table.at[ids].get(mode="promise_in_bounds")

  return gather(table, jax.device_put(ids, jax.memory.Space.Host))


def pin(
  table: UInt8[Array | np.ndarray, "_R n"],
  location: Format,
  *,
  rows_at_a_time: int = 2**16,
) -> UInt8[Array, "_R n"]:
  """The table in pinned host memory.

  Args:
    table: packed rows.
    location: its format there, from `pinned_format`.
    rows_at_a_time: rows that cross the device at a time, where they have to.
  """
  if location.layout is None:
    return jax.device_put(table, location.sharding)
  # Into a layout JAX brings an array on the device, which may be too small for
  # the whole.
  host = jax.memory.Space.Host
  on_host = _compute_on(compute_type="device_host", out_memory_spaces=host)

  @functools.partial(jax.jit, out_shardings=location)
  def empty():
    return on_host(lambda: jnp.zeros(table.shape, table.dtype))()

  @functools.partial(jax.jit, out_shardings=location, donate_argnums=0)
  def put(pinned, rows, start):
    def update(pinned, rows, start):
      place = (start, jnp.zeros_like(start))
      return lax.dynamic_update_slice(pinned, rows, place)

    return on_host(update)(pinned, *jax.device_put((rows, start), host))

  pinned = empty()
  for start in range(0, len(table), rows_at_a_time):
    rows = table[start : start + rows_at_a_time]
    pinned = put(pinned, rows, np.int32(start))
  return pinned
