"""One Engram layer: forward, backward, a step; and its convolution apart.

  python -m experiments.benchmarks.engram_module

The sizes are those of the one other JAX implementation's figures, so that its
rows can be set beside these: hidden 1024, 4 streams, orders 2 and 3, 8 heads
of width 64 an order, 4 taps, 2 x 512 tokens, float32. Hashing is part of every
line but the last ones. A line's peak memory is that of a process that ran it
alone; times are taken in turns, both table sizes in one process.

  forward               hash, lookup, fuse
  forward + backward    and gradients of parameters, hidden state and rows
  . dense               the same, but of the whole table instead of its rows
  step                  and Adam: of parameters, and of the touched rows
  lookup + rows' grad   of a sum of squares; duplicates summed
  . dense               of the same, as a whole table
  row optimizer         duplicates summed, lazy Adam
  hash                  row ids alone
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, fuse, fuse_options
from engram_jax.fusion.short_conv import short_conv
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.row_optimizers import lazy_adam, sum_duplicates
from engram_jax.memory.table import init_table, lookup
from experiments.benchmarks import harness

LAYER = 1
RATE = 1e-3
#: Tables' worth of memory that a line needs, itself included.
TABLES = {
  "forward": 1,
  "forward + backward": 1,
  "forward + backward, dense": 2,
  "step": 3,
  "lookup + rows' grad": 1,
  "lookup + rows' grad, dense": 2,
  "row optimizer": 3,
  "hash": 0,
}
LINES = tuple(TABLES)
#: Beside each other, since each step donates the table.
CONV_LINES = (
  "forward",
  "forward, nnx.Conv",
  "forward + backward",
  "forward + backward, nnx.Conv",
)


class Sizes(NamedTuple):
  """Of the layer and of its input."""

  hidden_size: int = 1024
  streams: int = 4
  heads: int = 8
  head_dim: int = 64
  taps: int = 4
  batch: int = 2
  length: int = 512
  vocab_size: int = 129_280


class Layer:
  """One layer at one table size, and what each line runs on it.

  Arrays are made when a line first needs them: a process that runs the forward
  pass alone never holds a moment.
  """

  def __init__(self, rows_per_head: int, sizes: Sizes):
    self.config = EngramConfig(
      hidden_size=sizes.hidden_size,
      layers=(LAYER,),
      rows_per_head=(rows_per_head,) * 2,
      heads=sizes.heads,
      head_dim=sizes.head_dim,
      streams=sizes.streams,
      conv_kernel_size=sizes.taps,
      projection_bias=True,  # as DeepSeek's demo
    )
    self.hashing = NgramHash.create(
      vocab_size=sizes.vocab_size,
      rows_per_head=self.config.rows_per_head,
      heads=sizes.heads,
      layers=(LAYER,),
      pad_id=2,
    )
    self.num_rows = self.hashing.num_rows[LAYER]
    shape = (sizes.batch, sizes.length)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, shape)
    self.tokens = jnp.asarray(tokens, jnp.int32)
    shape = (*shape, sizes.streams, sizes.hidden_size)
    self.hidden, self.target = jax.random.normal(jax.random.key(0), (2, *shape))
    self.params = Engram(self.config, rngs=nnx.Rngs(0)).params()
    self.adam = optax.adam(RATE)
    self.row_adam = lazy_adam()

  @functools.cached_property
  def table(self):
    # Without noise: drawing it would be the peak of memory.
    size = (self.num_rows, self.config.head_dim)
    return harness.resident(init_table(jax.random.key(1), *size, std=0))

  @functools.cached_property
  def opt_state(self):
    return self.adam.init(self.params)

  @functools.cached_property
  def row_state(self):
    return harness.resident(self.row_adam.init(self.table))

  def row_ids(self, tokens):
    return self.hashing.row_ids(tokens, LAYER)

  def loss(self, params, hidden, rows, target):
    # The product with a fixed array: a gradient of full rank, for nothing.
    fused = fuse(params, hidden, rows, **fuse_options(self.config))
    return jnp.mean(fused.update * target)

  def runs(self, line: str) -> Callable[[], Any]:
    """The line as a function without arguments, its arrays made."""
    jitted = jax.jit(_FUNCTIONS[line], static_argnums=0)
    if line == "hash":
      return lambda: jitted(self, self.tokens)
    table = self.table  # made now, not in the first call
    del table
    if line not in ("step", "row optimizer"):
      return lambda: jitted(
        self, self.table, self.params, self.hidden, self.target, self.tokens
      )
    opt_state, row_state = self.opt_state, self.row_state
    del opt_state, row_state
    donating = jax.jit(
      _FUNCTIONS[line], static_argnums=0, donate_argnums=(1, 2)
    )
    if line == "step":

      def step():
        state = (self.params, self.opt_state, self.table, self.row_state)
        state, loss = donating(
          self, state[:2], state[2:], self.hidden, self.target, self.tokens
        )
        self.params, self.opt_state, self.table, self.row_state = state
        return loss

      return step

    ids = jax.jit(self.row_ids)(self.tokens)
    shape = (*ids.shape, self.config.head_dim)
    gradients = jax.random.normal(jax.random.key(2), shape)

    def update():
      self.table, self.row_state = donating(
        self, self.table, self.row_state, ids, gradients
      )
      return self.row_state.step

    return update


def _forward(layer, table, params, hidden, target, tokens):
  rows = lookup(table, layer.row_ids(tokens))
  return fuse(params, hidden, rows, **fuse_options(layer.config)).update


def _backward(layer, table, params, hidden, target, tokens):
  rows = lookup(table, layer.row_ids(tokens))
  grad = jax.value_and_grad(layer.loss, argnums=(0, 1, 2))
  return grad(params, hidden, rows, target)


def _backward_dense(layer, table, params, hidden, target, tokens):
  def loss(params, hidden, table):
    rows = lookup(table, layer.row_ids(tokens))
    return layer.loss(params, hidden, rows, target)

  return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, hidden, table)


def _lookup(layer, table, params, hidden, target, tokens):
  ids = layer.row_ids(tokens)
  rows = lookup(table, ids)
  gradients = jax.grad(lambda rows: jnp.sum(rows**2))(rows)
  return sum_duplicates(ids, gradients, num_rows=layer.num_rows)


def _lookup_dense(layer, table, params, hidden, target, tokens):
  ids = layer.row_ids(tokens)
  return jax.grad(lambda table: jnp.sum(lookup(table, ids) ** 2))(table)


def _update(layer, table, row_state, ids, gradients):
  distinct = sum_duplicates(ids, gradients, num_rows=layer.num_rows)
  return layer.row_adam.update(table, row_state, distinct, RATE)


def _step(layer, module_state, table_state, hidden, target, tokens):
  (params, opt_state), (table, row_state) = module_state, table_state
  ids = layer.row_ids(tokens)
  loss, (by_params, by_rows) = jax.value_and_grad(layer.loss, argnums=(0, 2))(
    params, hidden, lookup(table, ids), target
  )
  updates, opt_state = layer.adam.update(by_params, opt_state, params)
  params = optax.apply_updates(params, updates)
  table, row_state = _update(layer, table, row_state, ids, by_rows)
  return (params, opt_state, table, row_state), loss


_FUNCTIONS = dict(
  zip(
    LINES,
    (
      _forward,
      _backward,
      _backward_dense,
      _step,
      _lookup,
      _lookup_dense,
      _update,
      lambda layer, tokens: layer.row_ids(tokens),
    ),
    strict=True,
  )
)


def measure(
  rows_per_head: Sequence[int],
  *,
  lines: Sequence[str] = LINES,
  sizes: Mapping[str, int] | None = None,
  repeats: int,
) -> dict[str, Any]:
  """Times `lines` in turns, each at every table size.

  Args:
    rows_per_head: one entry per table size; 16 heads of it make the table.
    lines: of `LINES`.
    sizes: fields of `Sizes` that differ from the defaults.
    repeats: timed calls of each.

  Returns:
    `records`, one per line and size, with `line`, `rows`, `table_mib` and the
    times of `harness.interleaved`.

  Raises:
    InputError: an unknown line, or tables that do not fit in memory.
  """
  for line in lines:
    require(line in LINES, "lines", line, f"of {', '.join(LINES)}")
  layers = [Layer(rows, Sizes(**(sizes or {}))) for rows in rows_per_head]
  mib = [4 * x.num_rows * x.config.head_dim / harness.MIB for x in layers]
  # Dense gradients come and go: only the largest table has one at a time.
  tables = [max(n for n in (TABLES[x], 0) if n != 2) for x in lines]
  transient = any(TABLES[x] == 2 for x in lines)
  needed = (max(tables, default=0) or 1) * sum(mib) + transient * max(mib)
  harness.require_memory(
    "rows_per_head", list(rows_per_head), int(needed * harness.MIB)
  )
  cases = {
    (line, i): layer.runs(line)
    for line in lines
    for i, layer in enumerate(layers)
  }
  times = harness.interleaved(cases, repeats=repeats)
  records = [
    {
      "line": line,
      "rows": layers[i].num_rows,
      "table_mib": round(mib[i], 1),
      **taken,
    }
    for (line, i), taken in times.items()
  ]
  return {"records": records}


def measure_conv(
  *, sizes: Mapping[str, int] | None = None, dilation: int = 3, repeats: int
) -> dict[str, Any]:
  """Times `short_conv` and `nnx.Conv` on the same input, in turns.

  Returns:
    `records`, one per line of `CONV_LINES`; `difference`, the largest of the
    two outputs relative to the largest entry; `ratio`, per pass how many times
    as long `nnx.Conv` takes.
  """
  size = Sizes(**(sizes or {}))
  channels = size.streams * size.hidden_size
  shape = (size.batch, size.length, size.streams, size.hidden_size)
  x, target = jax.random.normal(jax.random.key(0), (2, *shape))
  kernel = jax.random.normal(jax.random.key(1), (size.taps, *shape[2:]))
  flax_conv = nnx.Conv(
    channels,
    channels,
    kernel_size=(size.taps,),
    kernel_dilation=(dilation,),
    padding="CAUSAL",
    feature_group_count=channels,
    use_bias=False,
    rngs=nnx.Rngs(0),
  )
  graph, _ = nnx.split(flax_conv)

  def ours(x, kernel):
    return short_conv(x, kernel, dilation=dilation)[0]

  def theirs(x, kernel):
    weights = nnx.State(
      {"kernel": nnx.Param(kernel.reshape(size.taps, 1, channels))}
    )
    flat = x.reshape(*x.shape[:2], channels)
    return nnx.merge(graph, weights)(flat).reshape(x.shape)

  def backward(conv):
    def loss(x, kernel):
      return jnp.mean(conv(x, kernel) * target)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))

  passes = (jax.jit(ours), jax.jit(theirs), backward(ours), backward(theirs))
  cases = {
    line: functools.partial(function, x, kernel)
    for line, function in zip(CONV_LINES, passes, strict=True)
  }
  here, there = cases["forward"](), cases["forward, nnx.Conv"]()
  difference = jnp.max(jnp.abs(here - there)) / jnp.max(jnp.abs(there))
  times = harness.interleaved(cases, repeats=repeats)
  return {
    "records": [{"line": line, **taken} for line, taken in times.items()],
    "difference": float(difference),
    "ratio": {
      line: times[f"{line}, nnx.Conv"]["median_ms"] / times[line]["median_ms"]
      for line in ("forward", "forward + backward")
    },
  }


def define_flags() -> None:
  harness.define_common("engram_module", repeats=9)
  flags.DEFINE_list(
    "rows_per_head", ["64640", "646400"], "The two table sizes."
  )
  for name, value in Sizes()._asdict().items():
    flags.DEFINE_integer(name, value, "Of the layer or its input.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  rows_per_head = [int(rows) for rows in args.rows_per_head]
  common = {
    "sizes": {name: args[name].value for name in Sizes._fields},
    "repeats": args.repeats,
  }
  here = "experiments.benchmarks.engram_module"
  times = harness.in_child(
    f"{here}:measure", rows_per_head=rows_per_head, **common
  )
  conv = harness.in_child(f"{here}:measure_conv", **common)
  records = times["records"]
  for record, rows in zip(records, rows_per_head * len(LINES), strict=True):
    alone = harness.in_child(
      f"{here}:measure",
      rows_per_head=[rows],
      lines=[record["line"]],
      sizes=common["sizes"],
      repeats=1,
    )
    record["peak_mib"] = alone["peak_mib"]

  steps = [r["median_ms"] for r in records if r["line"] == "step"]
  tokens = args.batch * args.length
  header = ["", "rows", "ms", "least ms", "first s", "peak MiB"]
  columns = "rows median_ms min_ms first_s peak_mib".split()
  table = [(r["line"], *(r[name] for name in columns)) for r in records]
  conv_table = [
    (r["line"], r["median_ms"], r["min_ms"]) for r in conv["records"]
  ]
  ns = 1e6 / tokens
  result = {
    **common,
    "step_ratio": steps[-1] / steps[0],
    "hash_ns_per_token": [
      ns * r["median_ms"] for r in records if r["line"] == "hash"
    ],
    "records": records,
    "convolution": conv,
  }
  harness.publish(
    result,
    [
      harness.aligned(header, table),
      harness.aligned(["convolution alone", "ms", "least ms"], conv_table),
      f"step at the largest table / at the smallest: {steps[-1] / steps[0]:.2f}"
      f"\nnnx.Conv / short_conv: {conv['ratio']['forward']:.1f} forward, "
      f"{conv['ratio']['forward + backward']:.1f} forward + backward",
    ],
  )


if __name__ == "__main__":
  harness.launch(define_flags, main)
