"""What `engram_module` times: one Engram layer, and its lines as functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.fusion.engram import Engram, fuse, fuse_options
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.row_optimizers import lazy_adam, sum_duplicates
from engram_jax.memory.table import init_table, lookup
from experiments.benchmarks import harness

LAYER = 1
RATE = 1e-3
ADAM = optax.adam(RATE)
ROW_ADAM = lazy_adam()
#: Arrays as large as the table, by how many tables they are.
TABLES = {"table": 1, "row_state": 2}


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
  """One layer at one table size, with the arrays that its lines have needed.

  An array is made when a line first asks for it: a process that runs the
  forward pass alone never holds a moment.
  """

  def __init__(self, rows_per_head: int, sizes: Sizes):
    self.sizes = sizes
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
    self.table_bytes = 4 * self.num_rows * sizes.head_dim
    self.arrays: dict[str, Any] = {}

  def __getitem__(self, name: str) -> Any:
    if name not in self.arrays:
      self.arrays[name] = self._make(name)
    return self.arrays[name]

  def _make(self, name: str) -> Any:
    sizes, width = self.sizes, self.config.head_dim
    shape = (sizes.batch, sizes.length)
    match name:
      case "tokens":
        draw = np.random.default_rng(0).integers
        return jnp.asarray(draw(0, sizes.vocab_size, shape), jnp.int32)
      case "hidden" | "target":
        key = jax.random.key(1 if name == "hidden" else 3)
        return jax.random.normal(
          key, (*shape, sizes.streams, sizes.hidden_size)
        )
      case "params":
        return Engram(self.config, rngs=nnx.Rngs(0)).params()
      case "opt_state":
        return ADAM.init(self["params"])
      case "table":
        # Without noise: drawing it would be the peak of memory.
        empty = init_table(jax.random.key(0), self.num_rows, width, std=0.0)
        return harness.resident(empty)
      case "row_state":
        return harness.resident(ROW_ADAM.init(self["table"]))
      case "row_ids":
        return self.row_ids(self["tokens"])
      case "by_rows":
        key = jax.random.key(2)
        return jax.random.normal(key, (*self["row_ids"].shape, width))
      case _:
        raise KeyError(name)

  def row_ids(self, tokens):
    return self.hashing.row_ids(tokens, LAYER)

  def rows(self, table, tokens):
    return lookup(table, self.row_ids(tokens))

  def fuse(self, params, hidden, rows):
    return fuse(params, hidden, rows, **fuse_options(self.config)).update

  def loss(self, params, hidden, rows, target):
    # A fixed array makes the gradient a dense one at no cost.
    return jnp.mean(self.fuse(params, hidden, rows) * target)

  def update(self, table, row_state, row_ids, by_rows):
    gradients = sum_duplicates(row_ids, by_rows, num_rows=self.num_rows)
    return ROW_ADAM.update(table, row_state, gradients, RATE)

  def runs(self, line: str) -> Callable[[], Any]:
    """The line as a function without arguments, its arrays made."""
    function, reads, writes = LINES[line]

    def pure(written, read):
      return function(self, **written, **read)

    jitted = jax.jit(pure, donate_argnums=0)

    def call():
      written = {name: self.arrays.pop(name) for name in writes}
      new, result = jitted(written, {name: self[name] for name in reads})
      self.arrays.update(new)
      return result, new

    for name in (*reads, *writes):
      self[name]
    return call


# --- the lines: each returns the arrays that it writes anew, and a result ---


def forward(layer, *, table, params, hidden, tokens):
  return {}, layer.fuse(params, hidden, layer.rows(table, tokens))


def backward(layer, *, table, params, hidden, target, tokens):
  grad = jax.value_and_grad(layer.loss, argnums=(0, 1, 2))
  return {}, grad(params, hidden, layer.rows(table, tokens), target)


def backward_dense(layer, *, table, params, hidden, target, tokens):
  def loss(params, hidden, table):
    return layer.loss(params, hidden, layer.rows(table, tokens), target)

  return {}, jax.value_and_grad(loss, argnums=(0, 1, 2))(params, hidden, table)


def step(layer, *, table, row_state, params, opt_state, hidden, target, tokens):
  row_ids = layer.row_ids(tokens)
  grad = jax.value_and_grad(layer.loss, argnums=(0, 2))
  rows = lookup(table, row_ids)
  loss, (by_params, by_rows) = grad(params, hidden, rows, target)
  updates, opt_state = ADAM.update(by_params, opt_state, params)
  params = optax.apply_updates(params, updates)
  table, row_state = layer.update(table, row_state, row_ids, by_rows)
  written = dict(
    table=table, row_state=row_state, params=params, opt_state=opt_state
  )
  return written, loss


def rows_gradient(layer, *, table, tokens):
  row_ids = layer.row_ids(tokens)
  by_rows = jax.grad(lambda rows: jnp.sum(rows**2))(lookup(table, row_ids))
  return {}, sum_duplicates(row_ids, by_rows, num_rows=layer.num_rows)


def table_gradient(layer, *, table, tokens):
  def loss(table):
    return jnp.sum(layer.rows(table, tokens) ** 2)

  return {}, jax.grad(loss)(table)


def row_optimizer(layer, *, table, row_state, row_ids, by_rows):
  table, row_state = layer.update(table, row_state, row_ids, by_rows)
  return dict(table=table, row_state=row_state), None


def hash_only(layer, *, tokens):
  return {}, layer.row_ids(tokens)


_INPUTS = ("params", "hidden", "target", "tokens")
#: Per line its function, what it reads, and what it writes in place.
LINES = {
  "forward": (forward, ("table", "params", "hidden", "tokens"), ()),
  "forward + backward": (backward, ("table", *_INPUTS), ()),
  "forward + backward, dense": (backward_dense, ("table", *_INPUTS), ()),
  "step": (step, _INPUTS[1:], ("table", "row_state", "params", "opt_state")),
  "rows' gradient": (rows_gradient, ("table", "tokens"), ()),
  "table's gradient": (table_gradient, ("table", "tokens"), ()),
  "row optimizer": (
    row_optimizer,
    ("row_ids", "by_rows"),
    ("table", "row_state"),
  ),
  "hash": (hash_only, ("tokens",), ()),
}
#: Whose result is as large as the table.
DENSE = ("forward + backward, dense", "table's gradient")
