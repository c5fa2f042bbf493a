"""How many rows of one device's batch of real text are distinct."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from engram_jax import sharding
from engram_jax.data.pipeline import batches as text_batches
from engram_jax.data.prepared import prepare
from engram_jax.data.tokenizers import PAD_ID
from engram_jax.errors import require
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.run_config import DataConfig

LAYER = 1


def measure(
  *,
  tokens: Sequence[int],
  rows_per_head: Sequence[int],
  heads: int,
  length: int,
  batches: int,
  devices: int,
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """How many of the ids of one device's batch are distinct.

  Args:
    tokens: of one device's batch; multiples of `length`.
    rows_per_head: of each order from 2 on.
    heads: an order.
    length: L of the training sequences, which are shuffled.
    batches: measured of each number of tokens.
    devices: that the table is spread over, for `capacity_factor`.
    data: fields of a `DataConfig`.

  Returns:
    `corpus` and `records`, one per number of tokens: `distinct` over ids by
    order and of `all`, and `capacity_factor`, the `lookup_capacity` that all
    of these batches would have fitted in.

  Raises:
    InputError: tokens that are no whole sequences, or more than there are.
  """
  for count in tokens:
    whole = count >= length and count % length == 0
    require(whole, "tokens", count, f"a multiple of length = {length}")
  prepared = prepare(DataConfig(**data))
  compression = TokenCompression.from_tokenizer(prepared.tokenizer)
  hashing = NgramHash.create(
    vocab_size=compression.size,
    rows_per_head=rows_per_head,
    heads=heads,
    layers=(LAYER,),
    pad_id=int(compression.canonical_ids[PAD_ID]),
  )

  @jax.jit
  def row_ids(batch):
    canonical = compression(batch["inputs"])
    return hashing.row_ids(canonical, LAYER, breaks=batch["breaks"])

  starts = hashing.head_offsets(LAYER)[::heads]
  rows = sharding.padded_rows(hashing.num_rows[LAYER], devices)
  orders = range(2, hashing.max_order + 1)
  records = []
  for count in tokens:
    stream = iter(
      text_batches(
        prepared, "train", seq_len=length, batch_size=count // length
      )
    )
    shares, factors = [], []
    for _ in range(batches):
      batch = next(stream)
      batch = {name: batch[name] for name in ("inputs", "breaks")}
      ids = np.asarray(row_ids(batch))
      distinct = np.unique(ids)
      by_order = np.diff(np.searchsorted(distinct, [*starts, rows]))
      shares.append([*by_order / (count * heads), distinct.size / ids.size])
      asked = np.bincount(distinct // (rows // devices))
      factors.append(asked.max() * devices / ids.size)
    names = [*map(str, orders), "all"]
    mean = np.mean(shares, axis=0).tolist()
    records.append(
      {
        "tokens": count,
        "distinct": dict(zip(names, mean, strict=True)),
        "capacity_factor": float(max(factors)),
      }
    )
  train = prepared.splits["train"]
  corpus = {
    "documents": train.documents,
    "tokens": train.tokens,
    "digest": train.digest,
    "vocab_size": prepared.vocab_size,
    "canonical_ids": compression.size,
  }
  return {"corpus": corpus, "records": records}
