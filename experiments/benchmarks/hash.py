"""The n-gram hash: jnp on uint32 limbs against NumPy int64, ns per token.

  python -m experiments.benchmarks.hash

To reach: jnp at least 3 times as fast as NumPy on a CPU. Two forms in NumPy
take part, and the ratio is taken to the faster: `row_ids_numpy`, which hashes
all columns at once, and the loop over heads that DeepSeek's demo has. jnp uses
all cores, NumPy one. Fewer tokens are hashed several times in a turn, as a
decoder does: a single short call after another program's would measure how long
sleeping threads take to wake up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from experiments import number_flags
from experiments.benchmarks import harness

TARGET = 3.0
LAYER = 1
#: Canonical ids and rows per head; 8 heads an order.
CASES = {
  "demo, 16 columns": (129_280, (646_400, 646_400)),
  "paper, 16 columns": (129_280, (2_262_400, 2_262_400)),
  "V4.1, 24 columns": (99_092, (16_000_000, 16_000_000, 16_000_000)),
}


def loop_over_heads(hashing: NgramHash, ids: np.ndarray) -> np.ndarray:
  """`row_ids_numpy` as DeepSeek's demo computes it; text without breaks."""
  length, order = ids.shape[1], hashing.max_order
  window = [
    np.pad(ids, ((0, 0), (k, 0)), constant_values=hashing.pad_id)[:, :length]
    for k in range(order)
  ]
  multipliers = hashing.multipliers[LAYER]
  primes = hashing.primes[LAYER].reshape(order - 1, hashing.heads)
  mix, columns = window[0] * multipliers[0], []
  for k in range(1, order):
    mix = mix ^ (window[k] * multipliers[k])
    columns += [mix % prime for prime in primes[k - 1]]
  return np.stack(columns, axis=-1) + hashing.head_offsets(LAYER)


def measure(
  cases: Mapping[str, tuple[int, Sequence[int]]],
  *,
  tokens: Sequence[int],
  repeats: int,
  heads: int = 8,
  length: int = 512,
) -> list[dict[str, Any]]:
  """One record per case and number of tokens.

  Args:
    cases: name to (vocabulary, rows per head of each order).
    tokens: of one call; multiples of `length`.
    repeats: timed turns of each form. A turn is one call at the most tokens,
      and up to 64 at fewer.
    heads: an order.
    length: L; the batch is what remains.

  Raises:
    InputError: tokens that are no whole sequences.
    RuntimeError: the forms disagree.
  """
  records = []
  for name, (vocab_size, rows_per_head) in cases.items():
    hashing = NgramHash.create(
      vocab_size=vocab_size,
      rows_per_head=rows_per_head,
      heads=heads,
      layers=(LAYER,),
      pad_id=2,
    )
    row_ids = jax.jit(lambda ids, hashing=hashing: hashing.row_ids(ids, LAYER))
    for count in tokens:
      whole = count >= length and count % length == 0
      require(whole, "tokens", count, f"a multiple of length = {length}")
      shape = (count // length, length)
      ids = np.random.default_rng(0).integers(0, vocab_size, shape)
      device_ids = jnp.asarray(ids, jnp.int32)
      forms = {
        "jnp": lambda f=row_ids, x=device_ids: f(x),
        "numpy": lambda h=hashing, x=ids: h.row_ids_numpy(x, LAYER),
        "numpy_loop": lambda h=hashing, x=ids: loop_over_heads(h, x),
      }
      found = [np.asarray(form()) for form in forms.values()]
      if not all((found[0] == other).all() for other in found[1:]):
        raise RuntimeError(f"{name}: the forms disagree")
      del found
      calls = min(64, max(tokens) // count)
      turns = {
        name: lambda form=form, calls=calls: [form() for _ in range(calls)]
        for name, form in forms.items()
      }
      times = harness.interleaved(turns, repeats=repeats, warmup=2)
      hashed = calls * count
      ns = {k: 1e6 * t["median_ms"] / hashed for k, t in times.items()}
      ratio = min(ns["numpy"], ns["numpy_loop"]) / ns["jnp"]
      records.append(
        {
          "case": name,
          "columns": hashing.columns,
          "tokens": count,
          "calls": calls,
          "ns_per_token": ns,
          "min_ns_per_token": {
            k: 1e6 * t["min_ms"] / hashed for k, t in times.items()
          },
          "ratio": ratio,
          "reached": ratio >= TARGET,
        }
      )
  return records


def define_flags() -> None:
  harness.define_common("hash", repeats=9)
  tokens = [4096, 16384, 131072, 1048576]
  number_flags.define("tokens", tokens, "Of one call.")
  flags.DEFINE_integer("length", 512, "Tokens of one sequence.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  records = measure(
    CASES,
    tokens=args.tokens,
    repeats=args.repeats,
    length=args.length,
  )
  header = "hash tokens jnp numpy numpy_loop ratio".split()
  rows = [
    (r["case"], r["tokens"], *r["ns_per_token"].values(), r["ratio"])
    for r in records
  ]
  reached = [f"{r['case']}: {r['tokens']:,}" for r in records if r["reached"]]
  result = {
    "target": f"jnp at least {TARGET:g} times as fast as NumPy int64",
    "reached_at": reached,
    "missed_at": [
      f"{r['case']}: {r['tokens']:,}" for r in records if not r["reached"]
    ],
    "records": records,
  }
  text = f"target reached at {len(reached)} of {len(records)} sizes"
  title = "ns per token; ratio to the faster NumPy form"
  harness.publish(result, [title, harness.aligned(header, rows), text])


if __name__ == "__main__":
  harness.launch(define_flags, main)
