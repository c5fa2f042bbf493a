"""The Sinkhorn-balanced update: DeepSeek-V4.1's optimizer of its tables.

  m   <- mu m + g                 momentum, the only state: half of Adam's
  u   =  g + mu m                 Nesterov
  u_i =  0 where |u_i| < tau * (mean of |u_i|)
  u   =  rows, columns, rows, ..., rows of u scaled to l2 norm 1: K scalings
  row <- row - learning_rate * 0.18 * sqrt(d) * u_i

A row that moves at all moves as far as any other, whatever its gradient; the
columns are balanced besides, so that no coordinate takes over. The constants
mu = 0.95, tau = 1e-3, K = 11, 0.18 and eps = 1e-20 are the report's. Three
readings of it are ours:

  sqrt(n)   n is d, the row's width: a row moves with RMS learning_rate * 0.18
  mean      over the rows that take part: those where u is not all zeros
  columns   to norm 1. U rows of norm 1 agree with columns of norm sqrt(U / d);
            that is one factor for all of u, and the scaling of the rows, which
            always follows, takes it out again

`sinkhorn` lets the rows touched in this step take part, and leaves the others
and their momentum as they were. `dense_sinkhorn` is the oracle: all rows with
momentum left take part. The two are equal at the first step, and as long as
every row is touched at every step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engram_jax.errors import require
from engram_jax.memory.row_sparse import (
  RowGradients,
  RowOptimizer,
  dense_gradient,
  gather_rows,
  move_rows,
  require_decay,
  require_eps,
  scatter_rows,
)
from engram_jax.norms import power_of_two


class SinkhornState(NamedTuple):
  """State of `sinkhorn` and `dense_sinkhorn`.

  Attributes:
    momentum: float32 [R, d].
  """

  momentum: Float[Array, "R d"]


def balance(
  update: Float[Array, "U d"],
  *,
  iterations: int,
  threshold: float,
  eps: float,
  axes: Sequence[str] = (),
) -> Float[Array, "U d"]:
  """Scales rows and columns in turn: rows of norm 1, columns nearly equal.

  The result does not depend on the size of `update`, however large or small.

  Args:
    update: float32 [U, d]; rows of zeros count for nothing and stay zeros.
    iterations: K, odd: the first and the last scaling is of the rows.
    threshold: rows shorter than this share of the mean become zeros.
    eps: added to every norm that is divided by.
    axes: mesh axes that the rows are spread over.

  Returns:
    float32 [U, d], rows of norm 1 or 0.
  """

  def total(x):
    return jax.lax.psum(x, tuple(axes)) if axes else x

  def norms(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True))

  def scale_rows(x):
    return x / (norms(x) + eps)

  def scale_columns_and_rows(_, x):
    squares = total(jnp.sum(jnp.square(x), axis=0))
    return scale_rows(x / (jnp.sqrt(squares) + eps))

  largest = jnp.max(jnp.abs(update))
  largest = jax.lax.pmax(largest, tuple(axes)) if axes else largest
  update = update * power_of_two(largest, small=True)
  length = norms(update)
  count = total(jnp.sum(length > 0))
  mean = total(jnp.sum(length)) / jnp.maximum(count, 1)
  balanced = scale_rows(jnp.where(length < threshold * mean, 0, update))
  return jax.lax.fori_loop(0, iterations // 2, scale_columns_and_rows, balanced)


def sinkhorn(
  *,
  momentum: float = 0.95,
  iterations: int = 11,
  threshold: float = 1e-3,
  scale: float = 0.18,
  eps: float = 1e-20,
) -> RowOptimizer:
  """The balanced update over the rows that have a gradient in this step.

  A step costs what it touches, about `iterations` passes over [U, d]. With the
  rows spread over devices, each pass over the columns sums d numbers over them,
  and the result is that of one device up to rounding.

  Args:
    momentum: mu, decay of the momentum.
    iterations: K, scalings of rows and columns together.
    threshold: tau; a row whose update is shorter than this share of the mean
      does not move. Its momentum goes on.
    scale: factor on the learning rate.
    eps: added to every norm that is divided by.

  Returns:
    A `RowOptimizer` whose state is a `SinkhornState`, 4 d bytes a row.

  Raises:
    InputError: a constant out of its range.
  """
  step = _make_step(momentum, iterations, threshold, scale, eps)

  def update(
    table: Float[Array, "R d"],
    state: SinkhornState,
    gradients: RowGradients,
    learning_rate: Float[Array, ""] | float,
    *,
    axes: Sequence[str] = (),
  ) -> tuple[Float[Array, "R d"], SinkhornState]:
    ids, values = gradients
    # Padding takes no part, whatever stands in it: its momentum reads as 0.
    values = jnp.where((ids < table.shape[0])[:, None], values, 0)
    moments, change = step(
      gather_rows(state.momentum, ids), values, learning_rate, axes
    )
    moments = scatter_rows(state.momentum, ids, moments)
    return move_rows(table, ids, change), SinkhornState(moments)

  return RowOptimizer(_init, update)


def dense_sinkhorn(
  *,
  momentum: float = 0.95,
  iterations: int = 11,
  threshold: float = 1e-3,
  scale: float = 0.18,
  eps: float = 1e-20,
) -> RowOptimizer:
  """The same over the whole table: the oracle; every step costs R.

  Rows that were touched before go on moving by their momentum, all as far,
  until it falls under the threshold.

  Args:
    momentum: as in `sinkhorn`, and so are the others.
    iterations: K.
    threshold: tau.
    scale: factor on the learning rate.
    eps: added to every norm that is divided by.

  Raises:
    InputError: a constant out of its range.
  """
  step = _make_step(momentum, iterations, threshold, scale, eps)

  def update(table, state, gradients, learning_rate, *, axes=()):
    dense = dense_gradient(table, gradients)
    moments, change = step(state.momentum, dense, learning_rate, axes)
    return (table - change).astype(table.dtype), SinkhornState(moments)

  return RowOptimizer(_init, update)


def _init(table: Float[Array, "R d"]) -> SinkhornState:
  return SinkhornState(jnp.zeros(table.shape, jnp.float32))


def _make_step(momentum, iterations, threshold, scale, eps):
  """What both forms do with moments and gradients [U, d]; checks constants."""
  require_decay("momentum", momentum)
  odd = isinstance(iterations, int) and iterations > 0 and iterations % 2 == 1
  valid = "an odd integer >= 1: rows come first and last"
  require(odd, "iterations", iterations, valid)
  require(0 <= threshold < 1, "threshold", threshold, "0 <= threshold < 1")
  require(0 < scale < math.inf, "scale", scale, "a finite number above 0")
  require_eps(eps)

  def step(moments, values, learning_rate, axes):
    """The next moments, and what is to be taken from the rows."""
    moments = momentum * moments + values
    direction = balance(
      values + momentum * moments,
      iterations=iterations,
      threshold=threshold,
      eps=eps,
      axes=axes,
    )
    length = learning_rate * scale * math.sqrt(values.shape[1])
    return moments, length * direction

  return step
