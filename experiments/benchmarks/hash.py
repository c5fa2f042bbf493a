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

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from experiments.benchmarks import harness

TARGET = 3.0
LAYER = 1
#: Vocabulary, and rows of a head of each order.
CASES = {
  "demo, 16 columns": (129_280, (646_400, 646_400)),
  "paper, 16 columns": (129_280, (2_262_400, 2_262_400)),
  "V4.1, 24 columns": (99_092, (16_000_000, 16_000_000, 16_000_000)),
}
FLAGS = {
  "tokens": ([4096, 16384, 131072, 1048576], "Tokens of one call."),
  "length": (512, "Tokens of one sequence."),
  "repeats": (9, "Timed turns of each form."),
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
  *,
  tokens: Sequence[int],
  length: int,
  repeats: int,
  cases: Mapping[str, tuple[int, Sequence[int]]] = CASES,
  heads: int = 8,
) -> harness.Figures:
  """One record per case and number of tokens.

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
      ids = harness.rng().integers(0, vocab_size, (count // length, length))
      device_ids = jnp.asarray(ids, jnp.int32)
      forms = {
        "jnp": lambda f=row_ids, x=device_ids: f(x),
        "numpy": lambda h=hashing, x=ids: h.row_ids_numpy(x, LAYER),
        "numpy_loop": lambda h=hashing, x=ids: loop_over_heads(h, x),
      }
      first, *others = [np.asarray(form()) for form in forms.values()]
      if not all((first == other).all() for other in others):
        raise RuntimeError(f"{name}: the forms disagree")
      calls = min(64, max(tokens) // count)
      turns = {
        name: lambda form=form, calls=calls: [form() for _ in range(calls)]
        for name, form in forms.items()
      }
      times = harness.interleaved(turns, repeats=repeats)
      ns, least = (
        {k: 1e6 * t[figure] / (calls * count) for k, t in times.items()}
        for figure in ("median_ms", "min_ms")
      )
      ratio = min(ns["numpy"], ns["numpy_loop"]) / ns["jnp"]
      records.append(
        {
          "case": name,
          "columns": hashing.columns,
          "tokens": count,
          "calls": calls,
          "ns_per_token": ns,
          "min_ns_per_token": least,
          "ratio": ratio,
        }
      )
  least = min(record["ratio"] for record in records)
  targets = {"least ratio": harness.target(least, at_least=TARGET)}
  return {"targets": targets, "records": records}


def tables(result: harness.Figures) -> list[str]:
  columns = {"hash": "case", "tokens": "tokens"}
  for form in ("jnp", "numpy", "numpy_loop"):
    columns[form] = f"ns_per_token.{form}"
  columns["ratio"] = "ratio"
  title = "ns per token; ratio to the faster NumPy form"
  return [harness.table(columns, result["records"], title=title)]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
