"""Whether an n-gram was met before: in the training text, or in this window.

A token may be predicted by what is stored ("facts": its n-gram is in the
training text) or by what was just read ("reading": it stands earlier in the
window). Exact n-grams are counted, by numbers that are equal for equal ones; no
hash is involved.

A text is [windows, L]: no n-gram reaches out of its window, as in training.
"""

import numpy as np
from jaxtyping import Bool, Int

from engram_jax.errors import require
from engram_jax.memory.ngrams import number_tuples


def ngram_numbers(
  ids: Int[np.ndarray, "windows L"],
  starts: Bool[np.ndarray, "windows L"],
  *,
  order: int,
) -> Int[np.ndarray, "windows L"]:
  """A number for the n-gram that ends at each position.

  Args:
    ids: ids >= 0.
    starts: whether a document starts here. Look-backs find nothing beyond the
      start of a document or window: a shorter n-gram is one of its own.
    order: n >= 1.

  Returns:
    int64, equal where the n-grams are.

  Raises:
    InputError: an order below 1.
  """
  require(order >= 1, "order", order, "an integer >= 1")
  place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  # Tokens before this one in its document and window.
  age = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
  columns = []
  for steps in range(order):
    back = np.roll(ids, steps, axis=1).astype(np.int64)
    columns.append(np.where(age >= steps, back + 1, 0).reshape(-1))
  return number_tuples(columns).reshape(ids.shape)


def training_counts(
  train_ids: Int[np.ndarray, "m L"],
  train_starts: Bool[np.ndarray, "m L"],
  ids: Int[np.ndarray, "n L2"],
  starts: Bool[np.ndarray, "n L2"],
  *,
  order: int,
) -> Int[np.ndarray, "n L2"]:
  """How often the n-gram that ends at each position is in the training text.

  Args:
    train_ids: windows of the training text.
    train_starts: see `ngram_numbers`.
    ids: windows of the text in question.
    starts: see `ngram_numbers`.
    order: n >= 1.
  """
  length = max(train_ids.shape[1], ids.shape[1])

  def padded(x):
    return np.pad(x, ((0, 0), (0, length - x.shape[1])))

  numbers = ngram_numbers(
    np.concatenate([padded(train_ids), padded(ids)]),
    np.concatenate([padded(train_starts), padded(starts)]),
    order=order,
  )
  seen = numbers[: len(train_ids), : train_ids.shape[1]]
  asked = numbers[len(train_ids) :, : ids.shape[1]]
  counts = np.bincount(seen.reshape(-1), minlength=int(numbers.max()) + 1)
  return counts[asked]


def occurs_earlier(
  ids: Int[np.ndarray, "windows L"],
  starts: Bool[np.ndarray, "windows L"],
  *,
  order: int,
) -> Bool[np.ndarray, "windows L"]:
  """Whether the n-gram that ends here ended earlier in this document, too.

  Only what the window holds of the document counts: it is what a model that
  reads the window can have read.

  Args:
    ids: ids >= 0.
    starts: see `ngram_numbers`.
    order: n >= 1.
  """
  numbers = ngram_numbers(ids, starts, order=order)
  documents = np.cumsum(starts, axis=1)
  windows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
  places = [x.reshape(-1) for x in (windows, documents, numbers)]
  first = np.unique(number_tuples(places), return_index=True)[1]
  earlier = np.ones(ids.size, bool)
  earlier[first] = False
  return earlier.reshape(ids.shape)


def frequency_bands(
  counts: Int[np.ndarray, "*shape"], edges: tuple[int, ...]
) -> Int[np.ndarray, "*shape"]:
  """The band of each count: 0 below the first edge, up to len(edges).

  Args:
    counts: any integers.
    edges: ascending; a count equal to an edge is in the band that begins there.

  Raises:
    InputError: edges that do not ascend.
  """
  ascending = len(edges) > 0 and list(edges) == sorted(set(edges))
  require(ascending, "edges", edges, "one or more ascending integers")
  return np.searchsorted(np.asarray(edges), counts, side="right")
