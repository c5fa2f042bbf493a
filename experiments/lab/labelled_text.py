"""Held-out windows whose tokens are labelled by what they are and where they
were met before.

A position of a window predicts a target from the tokens up to it. `text.key` is
about the n-gram that addresses the memory there; all else is about the target.
"""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from engram_jax.analysis.gates import token_texts
from engram_jax.analysis.ngram_recurrence import (
  frequency_bands,
  occurs_earlier,
  training_counts,
)
from engram_jax.analysis.token_classes import token_classes, word_ends
from engram_jax.data.pipeline import windows
from engram_jax.data.prepared import PreparedData
from engram_jax.data.text_dataset import read_index
from engram_jax.memory.compression import TokenCompression
from engram_jax.run_config import TrainConfig
from engram_jax.training.batches import training_batches
from engram_jax.types import Break

#: Counts in the training text at which the next band begins.
BAND_EDGES = (1, 2, 4, 16, 64, 256)
BANDS = ("0", "1", "2-3", "4-15", "16-63", "64-255", "256+")
#: Where a target's trigram was met: in neither text, earlier in the window
#: alone ("reading"), in the training text alone ("facts"), in both.
ORIGINS = ("new", "read", "stored", "both")


@dataclasses.dataclass(frozen=True)
class LabelledText:
  """Windows of a held-out split; n counts the targets that the mask leaves.

  Attributes:
    batches: as the model takes them, [B, L] each.
    target_class: [n] of `token_classes.CLASSES`.
    input_class: [n], the same of the token that predicts.
    ends_word: [n], whether the token that predicts ends a word of several.
    origin: [n] of `ORIGINS`.
    bands: by order, [n] of `BANDS`: how often the n-gram that addresses the
      memory was met in training.
    trigram_counts: [n], that number for trigrams.
  """

  batches: list[dict[str, np.ndarray]]
  target_class: Shaped[np.ndarray, "n"]
  input_class: Shaped[np.ndarray, "n"]
  ends_word: Shaped[np.ndarray, "n"]
  origin: Shaped[np.ndarray, "n"]
  bands: dict[int, Shaped[np.ndarray, "n"]]
  trigram_counts: Int[np.ndarray, "n"]


def training_windows(
  data: PreparedData, train: TrainConfig
) -> dict[str, np.ndarray]:
  """Every window that a run trains on, [m, L], in its order."""
  parts = [*itertools.islice(training_batches(train, data), train.steps)]
  return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def label_text(
  data: PreparedData, train: TrainConfig, *, count: int
) -> LabelledText:
  """Windows spread over the validation split, with their labels.

  Args:
    data: the text of a run.
    train: the run, whose own training text is counted.
    count: number of windows, at most; rounded down to whole batches.
  """
  source = windows(data, "validation", seq_len=train.seq_len)
  count = min(count, source.windows)
  count = max(count // train.batch_size, 1) * train.batch_size
  chosen = np.linspace(0, source.windows - 1, count).round().astype(int)
  rows = [source[i] for i in chosen]
  text = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  mask = text["loss_mask"]
  seen = training_windows(data, train)

  classes, ends = _classes(data, source, chosen)
  ids, starts = _with_targets(text)
  seen_ids, seen_starts = _with_targets(seen)
  stored = training_counts(seen_ids, seen_starts, ids, starts, order=3) > 0
  read = occurs_earlier(ids, starts, order=3)
  origin = np.array(ORIGINS)[read + 2 * stored]

  compress = TokenCompression.from_tokenizer(data.tokenizer)
  counts = {
    order: training_counts(
      compress(seen["inputs"]),
      seen["breaks"] == Break.DOCUMENT_START,
      compress(text["inputs"]),
      text["breaks"] == Break.DOCUMENT_START,
      order=order,
    )[mask]
    for order in (2, 3)
  }
  size = train.batch_size
  return LabelledText(
    batches=[
      {name: x[i : i + size] for name, x in text.items()}
      for i in range(0, count, size)
    ],
    target_class=classes[:, 1:][mask],
    input_class=classes[:, :-1][mask],
    ends_word=ends[:, :-1][mask],
    origin=origin[:, 1:][mask],
    bands={
      order: np.array(BANDS)[frequency_bands(found, BAND_EDGES)]
      for order, found in counts.items()
    },
    trigram_counts=counts[3],
  )


def _with_targets(text: dict[str, np.ndarray]) -> tuple[Any, Any]:
  """Inputs and the last target, [n, L + 1]; where documents start in them."""
  ids = np.concatenate([text["inputs"], text["targets"][:, -1:]], axis=1)
  starts = text["breaks"] == Break.DOCUMENT_START
  # There is no loss on the first token of a document, and on it alone.
  last = ~text["loss_mask"][:, -1:]
  return ids, np.concatenate([starts, last], axis=1)


def _classes(data, source, chosen) -> tuple[np.ndarray, np.ndarray]:
  """Class and end of word of each token of the windows, [windows, L + 1].

  A window may begin inside a document, which is read from its own start.
  """
  _, starts = read_index(data.folder, "validation")
  edges = [*starts.tolist(), source.tokens]

  # Windows ascend: one document may hold several that follow each other.
  @functools.lru_cache(maxsize=1)
  def of_document(i):
    texts = token_texts(data.tokenizer, source.read(edges[i], edges[i + 1]))
    return token_classes(texts), word_ends(texts)

  classes, ends = [], []
  for window in chosen:
    first = int(window) * source.seq_len
    stop = first + source.seq_len + 1
    pieces, i = [], int(np.searchsorted(starts, first, side="right")) - 1
    while i < len(starts) and edges[i] < stop:
      part = slice(max(first - edges[i], 0), stop - edges[i])
      pieces.append([labels[part] for labels in of_document(i)])
      i += 1
    for labels, parts in zip((classes, ends), zip(*pieces)):
      labels.append(np.concatenate(parts))
  return np.stack(classes), np.stack(ends)
