"""One Engram layer at two table sizes: forward, backward, a step.

  python -m experiments.benchmarks.engram_module

The sizes are those of the figures measured for the one other JAX
implementation, so that its rows can be set beside these: hidden 1024, 4
streams, orders 2 and 3, 8 heads of width 64 an order, 4 taps, 2 x 512 tokens,
float32. A line's peak memory is that of a process that ran it alone; times are
taken in turns, both table sizes in one process.

  hash                        what every line begins with
  forward                     hash, lookup, fuse
  forward + backward          gradients of parameters, hidden state and rows
  forward + backward, dense   of the whole table instead of its rows
  step                        and Adam: of parameters, and of touched rows
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, fuse, fuse_options
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.row_sparse import row_sparse, sum_duplicates
from engram_jax.memory.table import init_table, lookup
from experiments.benchmarks import harness

LAYER = 1
RATE = 1e-3
#: Arrays as large as the table that a line holds at its peak.
LINES = {
  "hash": 0,
  "forward": 1,
  "forward + backward": 1,
  "forward + backward, dense": 2,
  "step": 3,
}
SIZES = {
  "hidden_size": (1024, "Of the layer."),
  "streams": (4, "Residual streams."),
  "heads": (8, "Of an order."),
  "head_dim": (64, "Width of a row."),
  "taps": (4, "Of the convolution."),
  "batch": (2, "Sequences."),
  "length": (512, "Tokens of one."),
  "vocab_size": (129_280, "Of the tokens."),
}
FLAGS = {
  "rows_per_head": ([64_640, 646_400], "Table sizes."),
  "repeats": (9, "Timed calls of each line."),
  **SIZES,
}


def contender(
  line: str, rows_per_head: int, **sizes: int
) -> tuple[Callable[[], Any], int]:
  """A line as a function without arguments, its arrays made; and its rows."""
  shape = sizes["batch"], sizes["length"]
  config = EngramConfig(
    hidden_size=sizes["hidden_size"],
    layers=(LAYER,),
    rows_per_head=(rows_per_head,) * 2,
    heads=sizes["heads"],
    head_dim=sizes["head_dim"],
    streams=sizes["streams"],
    conv_kernel_size=sizes["taps"],
    projection_bias=True,  # as DeepSeek's demo
  )
  hashing = NgramHash.create(
    vocab_size=sizes["vocab_size"],
    rows_per_head=config.rows_per_head,
    heads=config.heads,
    layers=(LAYER,),
    pad_id=2,
  )
  num_rows = hashing.num_rows[LAYER]
  tokens = harness.rng().integers(0, sizes["vocab_size"], shape)
  tokens = jnp.asarray(tokens, jnp.int32)
  row_ids = functools.partial(hashing.row_ids, layer=LAYER)
  if line == "hash":
    return functools.partial(jax.jit(row_ids), tokens), num_rows

  hidden, target = jax.random.normal(
    jax.random.key(harness.SEED),
    (2, *shape, config.streams, sizes["hidden_size"]),
  )
  params = Engram(config, rngs=nnx.Rngs(harness.SEED)).params()
  # Without noise: drawing it would be the peak of memory.
  empty = init_table(jax.random.key(0), num_rows, config.head_dim, std=0.0)
  table = harness.resident(empty)

  def update(params, hidden, rows):
    return fuse(params, hidden, rows, **fuse_options(config)).update

  def loss(params, hidden, rows):
    # A fixed array makes the gradient a dense one at no cost.
    return jnp.mean(update(params, hidden, rows) * target)

  def forward(params, hidden, table):
    return update(params, hidden, lookup(table, row_ids(tokens)))

  def backward(params, hidden, table):
    rows = lookup(table, row_ids(tokens))
    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return grad(params, hidden, rows)

  def backward_dense(params, hidden, table):
    def of_table(params, hidden, table):
      return loss(params, hidden, lookup(table, row_ids(tokens)))

    grad = jax.value_and_grad(of_table, argnums=(0, 1, 2))
    return grad(params, hidden, table)

  plain = {
    "forward": forward,
    "forward + backward": backward,
    "forward + backward, dense": backward_dense,
  }
  if line in plain:
    jitted = jax.jit(plain[line])
    return functools.partial(jitted, params, hidden, table), num_rows

  adam = optax.adam(RATE)
  row_adam = row_sparse(optax.scale_by_adam(b2=0.95))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    params, opt_state, table, row_state = state
    ids = row_ids(tokens)
    grad = jax.value_and_grad(loss, argnums=(0, 2))
    value, (by_params, by_rows) = grad(params, hidden, lookup(table, ids))
    updates, opt_state = adam.update(by_params, opt_state, params)
    params = optax.apply_updates(params, updates)
    gradients = sum_duplicates(ids, by_rows, num_rows=num_rows)
    table, row_state = row_adam.update(table, row_state, gradients, RATE)
    return (params, opt_state, table, row_state), value

  moments = harness.resident(row_adam.init(table))
  state = params, adam.init(params), table, moments

  def call():
    nonlocal state
    state, value = step(state)
    return state, value

  return call, num_rows


def in_turns(
  *, rows_per_head: Sequence[int], lines: Sequence[str], repeats: int, **sizes
) -> harness.Figures:
  """Times lines in turns, each at every table size; in this process.

  Returns:
    `records`, one per line and table size: `line`, `rows`, `table_mib` and the
    times of `harness.interleaved`.

  Raises:
    InputError: an unknown line, or tables that do not fit in memory.
  """
  for line in lines:
    require(line in LINES, "lines", line, f"of {', '.join(LINES)}")
  row = 4 * sizes["head_dim"]
  bytes_of = {n: 2 * sizes["heads"] * n * row for n in rows_per_head}
  held = sum(LINES[line] for line in lines)
  needed = held * sum(bytes_of.values())
  harness.require_memory("rows_per_head", list(rows_per_head), needed)
  made = {
    (line, n): contender(line, n, **sizes)
    for line in lines
    for n in rows_per_head
  }
  cases = {name: function for name, (function, _) in made.items()}
  records = []
  for case, times in harness.interleaved(cases, repeats=repeats).items():
    rows = made[case][1]
    about = {"line": case[0], "rows": rows}
    mib = round(row * rows / harness.MIB, 1)
    records.append({**about, "table_mib": mib, **times})
  return {"records": records}


def measure(
  *, rows_per_head: Sequence[int], repeats: int, **sizes: int
) -> harness.Figures:
  """All lines; arguments as the flags."""
  fields = dict(sizes, rows_per_head=rows_per_head, repeats=repeats)
  found = harness.in_child(in_turns, lines=list(LINES), **fields)
  records = found["records"]
  for i, record in enumerate(records):
    rows = rows_per_head[i % len(rows_per_head)]
    fields.update(rows_per_head=[rows], repeats=1)
    alone = harness.in_child(in_turns, lines=[record["line"]], **fields)
    record["peak_mib"] = alone["peak_mib"]
  steps = [r["median_ms"] for r in records if r["line"] == "step"]
  return {"step_ratio": steps[-1] / steps[0], "records": records}


def tables(result: harness.Figures) -> list[str]:
  names = "line rows median_ms min_ms first_s peak_mib".split()
  found = harness.table(dict(zip(names, names)), result["records"])
  ratio = result["step_ratio"]
  return [found, f"step at the last size over the first: {ratio:.2f}"]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
