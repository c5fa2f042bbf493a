"""Row-wise optax transformations that optax itself does not have.

For `row_sparse`, like optax's own: they take gradients [U, d] and give
directions, to be multiplied by a learning rate and subtracted.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from engram_jax.errors import require
from engram_jax.memory.row_sparse import require_decay, require_eps


class ScaleByRowwiseAdagradState(NamedTuple):
  """State of `scale_by_rowwise_adagrad`.

  Attributes:
    accumulator: float32 [R], the sum over a row's updates of its gradient's
      mean square.
  """

  accumulator: Float[Array, "R"]


def scale_by_rowwise_adagrad(
  *, initial: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adagrad with one scalar a row, as FBGEMM's exact rowwise Adagrad.

    a   <- a + mean over d of g^2
    row <- row - learning_rate * g / (sqrt(a) + eps)

  Untouched rows stay as they are, and so they do in the dense form: without a
  gradient Adagrad moves nothing. A row's first step has RMS `learning_rate`
  (with `initial` = 0), and its steps shrink with its own touches alone: a rare
  row goes on learning.

  Args:
    initial: the accumulator of a row never touched; more of it makes the first
      steps of a row shorter.
    eps: added to the root of the accumulator.

  Returns:
    A transformation of arrays [R, d] with 4 bytes of state a row.

  Raises:
    InputError: a constant out of its range.
  """
  valid = "a finite number >= 0"
  require(0 <= initial < math.inf, "initial", initial, valid)
  require_eps(eps)

  def init(table):
    full = jnp.full(table.shape[0], initial, jnp.float32)
    return ScaleByRowwiseAdagradState(full)

  def update(gradients, state, params=None):
    del params
    square = jnp.mean(jnp.square(gradients), axis=1)
    total = state.accumulator + square
    direction = gradients / (jnp.sqrt(total) + eps)[:, None]
    return direction, ScaleByRowwiseAdagradState(total)

  return optax.GradientTransformation(init, update)


class ScaleByAdamPerRowState(NamedTuple):
  """State of `scale_by_adam_per_row`.

  Attributes:
    count: int32 [R], updates of each row.
    mu: float32 [R, d], first moment.
    nu: float32 [R, d], second moment.
  """

  count: Int[Array, "R"]
  mu: Float[Array, "R d"]
  nu: Float[Array, "R d"]


def scale_by_adam_per_row(
  *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam whose bias correction counts each row's own updates.

  `optax.scale_by_adam` corrects by the optimizer's steps: a row first touched
  late then moves (1 - b1) / sqrt(1 - b2) of the learning rate, 0.45 of it with
  these defaults. Here the first step of every row has length `learning_rate`,
  for 4 bytes more a row.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.

  Raises:
    InputError: a constant out of its range.
  """
  require_decay("b1", b1)
  require_decay("b2", b2)
  require_eps(eps)

  def init(table):
    # Two buffers: one array in both places could not be donated.
    return ScaleByAdamPerRowState(
      count=jnp.zeros(table.shape[0], jnp.int32),
      mu=jnp.zeros(table.shape, jnp.float32),
      nu=jnp.zeros(table.shape, jnp.float32),
    )

  def update(gradients, state, params=None):
    del params
    count = state.count + 1
    t = count[:, None]
    mu = b1 * state.mu + (1 - b1) * gradients
    nu = b2 * state.nu + (1 - b2) * jnp.square(gradients)
    direction = (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    return direction, ScaleByAdamPerRowState(count, mu, nu)

  return optax.GradientTransformation(init, update)
