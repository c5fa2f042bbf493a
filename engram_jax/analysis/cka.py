"""Linear CKA without bias, in minibatches; the soft alignment index (§5).

Eq. 8, of two representations X [n, d1] and Y [n, d2] of the same n tokens:

  CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  K = X X^T,  L = Y Y^T

with the unbiased estimate of HSIC (Song et al. 2012; minibatches as in Nguyen
et al., arXiv 2010.15327): with zeros on the diagonals of K and L

  HSIC = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'K L1 / (n-2)] / (n (n-3))

For centred kernels (U-centring, Székely and Rizzo, arXiv 1310.2926)

  K^_ij = K_ij - (K_i. + K_.j) / (n-2) + K.. / ((n-1)(n-2)),  K^_ii = 0

it is their plain product, HSIC = sum_ij K^_ij L^_ij / (n (n-3)), so that the
HSIC of all pairs of layers are one product of matrices.

On the host and in float64: what is left after centring may be a small part.
Axes: n tokens of a minibatch, X and Y layers of the two models.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from engram_jax.errors import require


class HsicSums(NamedTuple):
  """Sums over minibatches of the unbiased HSIC.

  Attributes:
    cross: [X, Y], of every layer of one model with every layer of the other.
    own_x: [X], of each layer with itself.
    own_y: [Y], the same of the other model.
  """

  cross: Float[np.ndarray, "X Y"]
  own_x: Float[np.ndarray, "X"]
  own_y: Float[np.ndarray, "Y"]


def centered_kernel(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
  """K^, the U-centred linear kernel of n tokens, float64.

  Args:
    x: [n, d], n >= 4.

  Raises:
    InputError: fewer than 4 tokens.
  """
  n = len(x)
  require(n >= 4, "x", f"{n} tokens", "4 or more")
  x = np.asarray(x, np.float64)
  # U-centring undoes any shift of x; without it fewer digits are lost.
  x = x - x.mean(axis=0)
  kernel = x @ x.T
  np.fill_diagonal(kernel, 0)
  rows = kernel.sum(axis=1)
  kernel -= (rows[:, None] + rows) / (n - 2)
  kernel += rows.sum() / ((n - 1) * (n - 2))
  np.fill_diagonal(kernel, 0)
  return kernel


def unbiased_hsic(
  x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "n d2"]
) -> float:
  """The unbiased HSIC of two representations of the same n tokens.

  Its expectation is 0 for independent ones, so that it may be negative.

  Args:
    x: [n, d1], n >= 4.
    y: [n, d2].

  Raises:
    InputError: other tokens in one than in the other, or fewer than 4.
  """
  return float(_sums(x[None], y[None]).cross[0, 0])


def hsic_sums(
  batches: Iterable[
    tuple[Float[np.ndarray, "X n d1"], Float[np.ndarray, "Y n d2"]]
  ],
) -> HsicSums:
  """The HSIC of every pair of layers, summed over minibatches.

  Args:
    batches: pairs of the layers' representations of the same n >= 4 tokens;
      n may differ from batch to batch.

  Raises:
    InputError: no batch, or as `unbiased_hsic`.
  """
  total = None
  for xs, ys in batches:
    sums = _sums(xs, ys)
    total = sums if total is None else HsicSums(*map(np.add, total, sums))
  require(total is not None, "batches", "none", "one or more")
  return total


def cka(sums: HsicSums) -> Float[np.ndarray, "X Y"]:
  """Eq. 8 of every pair of layers.

  Args:
    sums: from `hsic_sums`.

  Returns:
    1 where two layers are equal up to rotation, scale and shift, near 0 where
    they are independent; there it may be below 0.

  Raises:
    InputError: a layer that is the same for all tokens.
  """
  for name, own in (("own_x", sums.own_x), ("own_y", sums.own_y)):
    require((own > 0).all(), f"sums.{name}", own.min(), "above 0")
  return sums.cross / np.sqrt(sums.own_x[:, None] * sums.own_y)


def soft_alignment(
  similarity: Float[np.ndarray, "I J"], *, k: int = 5, first: int = 1
) -> Float[np.ndarray, "J"]:
  """Eq. 9: the depth in one model that each layer of another resembles.

  a_j = sum_i S_ij i / sum_i S_ij over the k layers i of largest S_ij.

  Args:
    similarity: S, from `cka`: layers i of the reference along the first axis,
      layers j of the model in question along the second.
    k: layers i that count for each j; all of them if there are fewer.
    first: number of the first layer i.

  Raises:
    InputError: k below 1, or a layer j whose k largest similarities are not
      all above 0.
  """
  require(k >= 1, "k", k, "an integer >= 1")
  top = np.argsort(-similarity, axis=0, kind="stable")[:k]
  weights = np.take_along_axis(similarity, top, axis=0)
  valid = "above 0 among the k largest"
  require((weights > 0).all(), "similarity", weights.min(), valid)
  return (weights * (top + first)).sum(axis=0) / weights.sum(axis=0)


def _sums(
  xs: Float[np.ndarray, "X n d1"], ys: Float[np.ndarray, "Y m d2"]
) -> HsicSums:
  """The HSIC of one minibatch."""
  n, other = xs.shape[1], ys.shape[1]
  require(other == n, "y", f"{other} tokens", f"the {n} of x")
  left, right = (
    np.stack([centered_kernel(x).reshape(-1) for x in side])
    for side in (xs, ys)
  )
  left, right = (side / np.sqrt(n * (n - 3)) for side in (left, right))
  own = [np.einsum("ij,ij->i", side, side) for side in (left, right)]
  return HsicSums(left @ right.T, *own)
