"""What text does to the tables: who shares a row, and what a cache would hold.

Everything is counted from ids on the host; no table is needed. n is a number
of accesses, C of columns.

Two n-grams of one order share a row of a head by chance, one pair in p. They
share the rows of all heads if and only if their 64-bit mixes are equal: mixes
are below 2^63, so by the Chinese remainder theorem already three primes of 16
million tell any two of them apart.

A cache that keeps the `size` ids used last (LRU) hits at access i if and only
if fewer than `size` others were used since the last access p of the same id.
With prev[j] the last access before j of j's id (-1: none), that number is

  d_i = #{p < j < i: prev[j] < p} = #{j < i: prev[j] < p} - (p + 1)   (Mattson)

as the p + 1 accesses up to p all count. So one count per access gives the hit
rates of all sizes at once: of smaller elements to the left, taken bit by bit
from the highest, O(n log n) in whole arrays.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from engram_jax.errors import require
from engram_jax.memory.ngrams import number_tuples

#: Groups of so many ranks are compared pair by pair.
_LAST_BITS = 5
_LAST = 1 << _LAST_BITS


class ZipfFit(NamedTuple):
  """Exponents s of count ~ rank^-s, and the ranks that they were fitted to.

  Attributes:
    least_squares: exponent by regression of log count on log rank, each rank
      weighted by 1 / rank so that every decade of ranks counts the same.
    maximum_likelihood: most likely exponent of the accesses within the range,
      each a draw of a rank with probability rank^-s over the sum of the range.
    first_rank: first rank of the fit, from 1.
    last_rank: its last.
  """

  least_squares: float
  maximum_likelihood: float
  first_rank: int
  last_rank: int


class Collisions(NamedTuple):
  """How the n-grams of one order share the rows of its H heads.

  Attributes:
    ngrams: distinct n-grams.
    rows: distinct rows of each head.
    by_shared_heads: entry h counts the n-grams whose row belongs to another
      n-gram too in exactly h heads, h = 0 to H.
    equal: n-grams that have the rows of some other in every head.
  """

  ngrams: int
  rows: tuple[int, ...]
  by_shared_heads: tuple[int, ...]
  equal: int


# --- n-grams ---


def ngram_ids(
  canonical: Int[np.ndarray, "n"],
  starts: Bool[np.ndarray, "n"],
  *,
  max_order: int,
  pad_id: int,
  smallest_order: int = 2,
) -> Int[np.ndarray, "n orders"]:
  """The n-grams that end at each position, numbered within each order.

  Args:
    canonical: the text's ids, documents one after another.
    starts: whether a document starts here; look-backs stop there.
    max_order: N.
    pad_id: the id that a look-back finds before the document.
    smallest_order: the first order that is wanted.

  Returns:
    int64 [n, orders], from the smallest order to N; equal numbers for equal
    n-grams.

  Raises:
    InputError: an order below 1, or a largest one below the smallest.
  """
  ok = smallest_order >= 1
  require(ok, "smallest_order", smallest_order, "an integer >= 1")
  valid = f"an integer >= smallest_order = {smallest_order}"
  require(max_order >= smallest_order, "max_order", max_order, valid)
  position = np.arange(len(canonical))
  age = position - np.maximum.accumulate(np.where(starts, position, 0))
  numbers = number_tuples([canonical])
  orders = [numbers]
  for steps in range(1, max_order):
    back = np.where(age >= steps, np.roll(canonical, steps), pad_id)
    numbers = number_tuples([numbers, back])
    orders.append(numbers)
  return np.stack(orders[smallest_order - 1 :], axis=1)


def count_collisions(
  ngrams: Int[np.ndarray, "n"], rows: Int[np.ndarray, "n H"]
) -> Collisions:
  """Distinct n-grams against distinct rows.

  Args:
    ngrams: n-grams of one order, from `ngram_ids`.
    rows: their rows in the heads of that order.
  """
  rows = rows[np.unique(ngrams, return_index=True)[1]]
  distinct, shared = [], np.zeros(len(rows), np.int64)
  for column in rows.T:
    found, place, counts = np.unique(
      column, return_inverse=True, return_counts=True
    )
    distinct.append(len(found))
    shared += counts[place] > 1
  whole = np.bincount(number_tuples(list(rows.T)))
  by_heads = np.bincount(shared, minlength=rows.shape[1] + 1)
  return Collisions(
    ngrams=len(rows),
    rows=tuple(distinct),
    by_shared_heads=tuple(by_heads.tolist()),
    equal=int(whole[whole > 1].sum()),
  )


def zipf_exponent(
  ids: Int[np.ndarray, "n"], *, first_rank: int = 10, least_count: int = 10
) -> ZipfFit:
  """How fast counts fall with rank.

  Both ends of the curve follow no power law: the first ranks are a language's
  few commonest words, and at low counts ranks lie on steps.

  Args:
    ids: accesses.
    first_rank: first rank of the fit.
    least_count: the last rank is the last that was accessed so often.

  Raises:
    InputError: fewer than two ranks in the range.
  """
  require(first_rank >= 1, "first_rank", first_rank, "an integer >= 1")
  counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
  last = int(np.sum(counts >= least_count))
  found = f"{last} ids accessed {least_count} times or more"
  require(last > first_rank, "ids", found, f"more than {first_rank}")
  counts = counts[first_rank - 1 : last]
  ranks = np.arange(first_rank, last + 1)
  logs = np.log(ranks)
  # polyfit squares its weights.
  slope = np.polyfit(logs, np.log(counts), 1, w=ranks**-0.5)[0]
  # The likelihood is greatest where the law's mean log rank is the sample's;
  # the mean falls as s grows.
  mean, low, high = np.average(logs, weights=counts), -10.0, 10.0
  for _ in range(50):
    middle = (low + high) / 2
    law = np.average(logs, weights=np.exp(-middle * (logs - logs[0])))
    low, high = (middle, high) if law > mean else (low, middle)
  return ZipfFit(-float(slope), float(low), first_rank, last)


# --- batches ---


def distinct_share(ids: Int[np.ndarray, "n C"], batch: int) -> float:
  """Distinct ids over ids asked for: what is left after deduplication.

  Args:
    ids: ids of n tokens in order; each column has its own range.
    batch: consecutive tokens that are looked up together.

  Returns:
    Over all whole batches together.

  Raises:
    InputError: not one whole batch.
  """
  ok = 1 <= batch <= len(ids)
  require(ok, "batch", batch, f"1 to the {len(ids)} tokens that there are")
  whole = ids[: len(ids) // batch * batch].reshape(-1, batch * ids.shape[1])
  ordered = np.sort(whole, axis=1)
  distinct = len(whole) + np.count_nonzero(ordered[:, 1:] != ordered[:, :-1])
  return float(distinct / whole.size)


def decode_order(lengths: Sequence[int], slots: int) -> Int[np.ndarray, "n"]:
  """The order in which a batch of `slots` texts is decoded, token by token.

  A slot whose document ends takes the next one, so that all stay busy until
  documents run out.

  Args:
    lengths: tokens of each document; n in all.
    slots: documents at a time; 1 leaves all in order.

  Returns:
    int64 [n]: places in the joined documents, in the order of access.

  Raises:
    InputError: no slot.
  """
  require(slots >= 1, "slots", slots, "an integer >= 1")
  free = [(0, slot) for slot in range(slots)]
  chosen = []
  for length in lengths:
    time, slot = free[0]
    chosen.append((time, slot))
    heapq.heapreplace(free, (time + length, slot))
  times, places = np.array(chosen, np.int64).reshape(-1, 2).T
  begins = np.cumsum([0, *lengths[:-1]])[: len(lengths)]
  within = np.arange(sum(lengths)) - np.repeat(begins, lengths)
  return np.lexsort(
    (np.repeat(places, lengths), np.repeat(times, lengths) + within)
  )


# --- caches ---


def stack_distances(ids: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
  """How many other ids were accessed since the last access of the same one.

  Args:
    ids: accesses in order, below 2**63 / n.

  Returns:
    int64 [n]; -1 at the first access of an id.
  """
  count = len(ids)
  # One sort of (id, position) pairs in one integer.
  keys = np.sort(ids.astype(np.int64) * count + np.arange(count))
  positions, groups = keys % count, keys // count
  same = groups[1:] == groups[:-1]
  previous = np.full(count, -1)
  previous[positions[1:][same]] = positions[:-1][same]

  again = np.flatnonzero(previous >= 0)
  last = previous[again]
  # Every position is the last access of at most one other: ranks among these
  # are a permutation, and a first access is smaller than all of them.
  comes_back = np.zeros(count, bool)
  comes_back[last] = True
  ranks = (np.cumsum(comes_back) - 1)[last]
  firsts_before = again - np.arange(len(again))
  distances = np.full(count, -1)
  distances[again] = firsts_before + _smaller_before(ranks) - (last + 1)
  return distances


def lru_hit_rates(
  ids: Int[np.ndarray, "n"], sizes: Sequence[int], *, start: int = 0
) -> Float[np.ndarray, "sizes"]:
  """Share of accesses that find their id among the `size` used last.

  Exact for every size, from `stack_distances`.

  Args:
    ids: accesses in order, to a cache that is empty at first.
    sizes: sizes of the caches, in ids.
    start: accesses before it fill the cache and are not counted.

  Raises:
    InputError: a size below 1, or no access to count.
  """
  _check(sizes, ids[start:])
  distances = np.sort(stack_distances(ids)[start:])
  firsts = np.searchsorted(distances, 0)
  return (np.searchsorted(distances, sizes) - firsts) / len(distances)


def static_hit_rates(
  train_ids: Int[np.ndarray, "n"],
  test_ids: Int[np.ndarray, "m"],
  sizes: Sequence[int],
) -> Float[np.ndarray, "sizes"]:
  """Share of `test_ids` among the `size` commonest of other accesses.

  Args:
    train_ids: accesses that choose the hot set; equal counts are taken in the
      order of their ids.
    test_ids: accesses that are counted.
    sizes: sizes of the hot sets, in ids.

  Raises:
    InputError: a size below 1, or no access to choose from or to count.
  """
  _check(sizes, test_ids)
  require(len(train_ids) > 0, "train_ids", "none", "one or more accesses")
  hot, counts = np.unique(train_ids, return_counts=True)
  rank = np.empty(len(hot), np.int64)
  rank[np.argsort(-counts, kind="stable")] = np.arange(len(hot))
  place = np.minimum(np.searchsorted(hot, test_ids), len(hot) - 1)
  ranks = np.sort(rank[place[hot[place] == test_ids]])
  return np.searchsorted(ranks, sizes) / len(test_ids)


def _check(sizes: Sequence[int], ids: np.ndarray) -> None:
  least = min(sizes, default=0)
  require(least >= 1, "sizes", least or "none", "one or more integers >= 1")
  require(len(ids) > 0, "ids", "none", "one or more accesses to count")


def _smaller_before(ranks: np.ndarray) -> np.ndarray:
  """For each entry of a permutation of 0 ..., how many before it are smaller.

  From the highest bit down, entries are kept in groups of equal higher bits,
  each in its first order. Filled up to a power of two (by larger entries behind
  all others, which count for none) a group of 2^(b+1) has as many entries with
  bit b as without, and those without are smaller than those with it.
  """
  bits = max(_LAST_BITS, (len(ranks) - 1).bit_length())
  order = np.arange(1 << bits, dtype=np.int32)
  order[: len(ranks)] = ranks
  smaller = np.zeros_like(order)
  index = np.arange(1 << bits >> 1, dtype=np.int32)
  for bit in range(bits - 1, _LAST_BITS - 1, -1):
    half = 1 << bit
    is_high = order & half != 0
    low, high = np.flatnonzero(~is_high), np.flatnonzero(is_high)
    # Entries of the group before this one, less those of them that are high.
    low_before = high - index - (index & -half)
    smaller[high] += low_before.astype(np.int32)

    def split(entries, low=low, high=high, half=half):
      sides = [entries[side].reshape(-1, half) for side in (low, high)]
      return np.concatenate(sides, axis=1).reshape(-1)

    order, smaller = split(order), split(smaller)

  # Groups of 32 are compared pair by pair, in bytes.
  members = np.ascontiguousarray(order.astype(np.uint8).reshape(-1, _LAST).T)
  within = np.zeros_like(members)
  members &= _LAST - 1
  for i in range(_LAST):
    for j in range(i):
      within[i] += members[j] < members[i]
  by_rank = np.empty_like(smaller)
  by_rank[order] = smaller + within.T.reshape(-1)
  return by_rank[ranks]
