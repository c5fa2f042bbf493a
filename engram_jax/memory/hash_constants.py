"""The constants of a hash, drawn once on the host: multipliers and primes."""

import numpy as np


def draw_multipliers(
  layer: int, *, count: int, vocab_size: int, seed: int
) -> np.ndarray:
  """int64 [count]: odd, below 2^63 / vocab_size, as DeepSeek draws them.

  Args:
    layer: the Engram layer; it enters the seed.
    count: number of multipliers, one per token of the longest n-gram.
    vocab_size: number of canonical ids.
    seed: seed of the multipliers.
  """
  bound = max(1, (2**63 - 1) // vocab_size // 2)
  draws = np.random.default_rng(seed + 10007 * layer).integers(
    0, bound, count, dtype=np.int64
  )
  return 2 * draws + 1


def is_prime(number: int) -> bool:
  """Whether `number`, below 3.1e23, is prime (Miller-Rabin, exact)."""
  if number < 2:
    return False
  bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
  for p in bases:
    if number % p == 0:
      return number == p
  twos = ((number - 1) & (1 - number)).bit_length() - 1
  odd = (number - 1) >> twos
  for base in bases:
    x = pow(base, odd, number)
    if x in (1, number - 1):
      continue
    for _ in range(twos - 1):
      x = x * x % number
      if x == number - 1:
        break
    else:
      return False
  return True


def take_primes(least: int, count: int, used: set[int]) -> list[int]:
  """The next `count` primes >= least not in `used`, which they then join.

  Args:
    least: smallest prime that may be taken.
    count: number of primes.
    used: primes that are taken already; it grows.
  """
  taken: list[int] = []
  candidate = least
  while len(taken) < count:
    if candidate not in used and is_prime(candidate):
      taken.append(candidate)
      used.add(candidate)
    candidate += 1
  return taken
