"""A trained memory made larger, which at first is the same function.

`multiply_rows` gives each head `factor` times as many rows. The hash takes
remainders, so that a new size can keep what is there only if it is a multiple
of the old one:

  (mix mod c p) mod p = mix mod p

Row z of a head of p rows becomes rows z, z + p, ..., z + (c - 1) p of one of
c p rows: every n-gram finds the row that it had, to the bit. Another prime, as
a new model would take, moves every n-gram to another row, and the tables would
have to be trained anew. What it costs: all heads have the factor c in common.
Two n-grams that shared rows go on to share them if their mixes agree mod c, one
pair in c, and then in every head that they met in; all others part everywhere.
An odd factor is better than an even one: multipliers are odd, so that mix mod 2
is nothing but the parity of the ids' lowest bits.

`add_orders` appends n-gram orders: heads of sizes of their own (unused primes)
behind the old columns, and rows of zeros, which add nothing. What reads the
rows grows with them: `backbone.growth.grow_transformer`.

Either way the hash's constants are no longer those that a config draws: save
the memory itself (`Memory.save`). Moments of a row optimizer start anew
(`Memory.init_optimizer`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engram_jax.errors import require, require_integer
from engram_jax.memory.hash_constants import draw_multipliers, take_primes
from engram_jax.memory.lookup import Tables, require_tables
from engram_jax.memory.memory import Memory


class GrownMemory(NamedTuple):
  """What growing returns.

  Attributes:
    memory: the larger memory.
    tables: its tables, [R, d] per Engram layer.
  """

  memory: Memory
  tables: dict[int, Float[Array, "_R d"]]


def multiply_rows(
  memory: Memory, tables: Tables, *, factor: int
) -> GrownMemory:
  """A memory of `factor` times the rows that reads as before, to the bit.

  Args:
    memory: the memory to grow.
    tables: [R, d] per Engram layer, its trained tables.
    factor: new rows per old row; an odd one, see the head of this file.

  Returns:
    The memory, its heads in the same columns, and tables in which each old row
    stands `factor` times.

  Raises:
    InputError: a factor below 2, or heads of 2**31 rows or more; tables of
      another memory.
  """
  require_integer("factor", factor, low=2)
  require_tables(tables, memory.num_rows)
  hashing = memory.hashing
  largest = max(int(sizes.max()) for sizes in hashing.primes.values())
  valid = f"at most {(2**31 - 1) // largest}: heads have less than 2**31 rows"
  require(factor * largest < 2**31, "factor", factor, valid)
  grown = {}
  for layer, sizes in hashing.primes.items():
    offsets = hashing.head_offsets(layer)
    heads = [
      tables[layer][first : first + size]
      for first, size in zip(offsets.tolist(), sizes.tolist())
    ]
    grown[layer] = jnp.concatenate([jnp.tile(x, (factor, 1)) for x in heads])
  config = memory.config
  rows_per_head = tuple(factor * rows for rows in config.rows_per_head)
  larger = Memory(
    dataclasses.replace(config, rows_per_head=rows_per_head),
    memory.compression,
    dataclasses.replace(
      hashing, primes={i: factor * p for i, p in hashing.primes.items()}
    ),
  )
  return GrownMemory(larger, grown)


def add_orders(
  memory: Memory, tables: Tables, *, rows_per_head: Sequence[int]
) -> GrownMemory:
  """A memory of further n-gram orders, with rows of zeros for them.

  The old columns come first and read what they read before. Positions whose
  n-grams are the longest ones now look one token further back for each order:
  decoding needs that much more history.

  Args:
    memory: the memory to grow.
    tables: [R, d] per Engram layer, its trained tables.
    rows_per_head: least rows of a head, one entry per new order, from the
      memory's largest order + 1 on.

  Returns:
    The memory and its tables. The convolution's dilation stays as it was.

  Raises:
    InputError: no new order, or heads of less than 2 rows; tables of another
      memory.
  """
  valid = "one entry >= 2 per new n-gram order"
  ok = len(rows_per_head) >= 1 and min(rows_per_head) >= 2
  require(ok, "rows_per_head", tuple(rows_per_head), valid)
  require_tables(tables, memory.num_rows)
  config, hashing = memory.config, memory.hashing
  count = hashing.max_order + len(rows_per_head)
  used = {int(p) for sizes in hashing.primes.values() for p in sizes}
  multipliers, primes, grown = {}, {}, {}
  for layer in hashing.layers:
    drawn = draw_multipliers(
      layer, count=count, vocab_size=hashing.vocab_size, seed=config.seed
    )
    multipliers[layer] = np.concatenate(
      [hashing.multipliers[layer], drawn[hashing.max_order :]]
    )
    new = [
      prime
      for least in rows_per_head
      for prime in take_primes(least, hashing.heads, used)
    ]
    primes[layer] = np.concatenate([hashing.primes[layer], new])
    old = tables[layer][: memory.num_rows[layer]]  # without a mesh's padding
    zeros = jnp.zeros((sum(new), old.shape[1]), old.dtype)
    grown[layer] = jnp.concatenate([old, zeros])
  larger = Memory(
    dataclasses.replace(
      config,
      rows_per_head=(*config.rows_per_head, *rows_per_head),
      conv_dilation=config.dilation,
    ),
    memory.compression,
    dataclasses.replace(hashing, multipliers=multipliers, primes=primes),
  )
  return GrownMemory(larger, grown)
