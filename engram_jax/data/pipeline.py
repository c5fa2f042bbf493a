"""Batches of packed windows: prepared data -> Grain -> NumPy arrays.

The documents of a split are one stream x of tokens. Window i predicts every
token of x[i L + 1 .. (i + 1) L] from the one before it:

  inputs  = x[i L     ..  i L + L - 1]
  targets = x[i L + 1 ..  i L + L]

so that each token of the stream, but for the last fraction of a window, is
predicted once in an epoch. A window may start inside a document and hold parts
of several. What is evaluated may be shorter than a window, which is then filled
with padding; training has no use for such a text.
"""

import bisect
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int

from engram_jax.data.prepared import PreparedData
from engram_jax.data.sources import SPLITS
from engram_jax.data.text_dataset import read_index, read_pieces
from engram_jax.data.tokenizers import PAD_ID
from engram_jax.errors import InputError, require
from engram_jax.types import Break

#: Grain's own defaults (16 threads, 500 elements ahead) are for single records
#: on remote disks; here an element is a whole batch on a local one.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class PackedWindows:
  """Windows of a stream of tokens, by random access.

  Indices from the number of windows up to `len` are padding: `PAD_ID`
  everywhere, and a loss mask of False.

  Attributes:
    seq_len: L.
    tokens: length of the stream.
    windows: number of windows with a target in them.
  """

  def __init__(
    self,
    pieces: Sequence[Mapping[str, Any]],
    *,
    piece_ends: Int[np.ndarray, "pieces"],
    document_starts: Int[np.ndarray, "documents"],
    seq_len: int,
    multiple_of: int = 1,
    tail: bool = False,
  ):
    """Keeps the arguments; reads nothing yet.

    Args:
      pieces: random access to the stream's pieces, `tokens` int32 [n] in each.
      piece_ends: int64, one past each piece's last token in the stream.
      document_starts: int64, position of each document's first token.
      seq_len: L, predictions of one window; it reads L + 1 tokens.
      multiple_of: pads the number of windows to a multiple of this.
      tail: fill the last fraction of a window with padding, instead of leaving
        it out.

    Raises:
      InputError: the stream is shorter than one window, or, with `tail`, has no
        token to predict.
    """
    require(seq_len > 0, "seq_len", seq_len, "a number above 0")
    self._pieces, self._piece_ends = pieces, piece_ends
    self._document_starts = document_starts
    self.seq_len = seq_len
    self.tokens = int(piece_ends[-1]) if len(piece_ends) else 0
    targets = max(self.tokens - 1, 0)
    self.windows = -(-targets // seq_len) if tail else targets // seq_len
    require(
      self.windows > 0,
      "seq_len",
      seq_len,
      f"at most {targets}: there are {self.tokens} tokens, and "
      "a window takes one more than seq_len",
    )
    self._length = -(-self.windows // multiple_of) * multiple_of

  def __len__(self) -> int:
    return self._length

  def __repr__(self) -> str:
    # Shown in Grain's messages, where the arrays would fill the screen.
    return f"PackedWindows(tokens={self.tokens}, seq_len={self.seq_len})"

  def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
    """One window.

    Returns:
      `inputs` and `targets`, int32 [L]; `breaks` int8 [L], of `types.Break`:
      where an input is the first token of a document; `loss_mask` bool [L]:
      False where the target is one, as the document before it says nothing
      about it.

    Raises:
      IndexError: no such window.
    """
    index = operator.index(index)
    if not 0 <= index < self._length:
      raise IndexError(f"window {index} of {self._length}")
    if index >= self.windows:
      return _padding(self.seq_len)
    start = index * self.seq_len
    stop = min(start + self.seq_len + 1, self.tokens)
    tokens, is_start = self.read(start, stop), self._is_start(start, stop)
    window, n = _padding(self.seq_len), stop - start - 1
    window["inputs"][:n] = tokens[:-1]
    window["targets"][:n] = tokens[1:]
    window["breaks"][:n][is_start[:-1]] = Break.DOCUMENT_START
    window["loss_mask"][:n] = ~is_start[1:]
    return window

  def read(self, start: int, stop: int) -> Int[np.ndarray, "n"]:
    """Tokens `start` to `stop` of the stream, int32; reads those pieces.

    Args:
      start: first token.
      stop: one past the last token.
    """
    ends = self._piece_ends
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop, side="left"))
    offset = int(ends[first - 1]) if first else 0
    parts = [self._pieces[i]["tokens"] for i in range(first, last + 1)]
    return np.concatenate(parts)[start - offset : stop - offset]

  def _is_start(self, start: int, stop: int) -> np.ndarray:
    low = bisect.bisect_left(self._document_starts, start)
    high = bisect.bisect_left(self._document_starts, stop)
    flags = np.zeros(stop - start, np.bool_)
    flags[self._document_starts[low:high] - start] = True
    return flags


def windows(
  prepared: PreparedData,
  split: str,
  *,
  seq_len: int,
  multiple_of: int = 1,
  tail: bool | None = False,
) -> PackedWindows:
  """The windows of a split.

  Args:
    prepared: tokenised documents.
    split: `train`, `validation`, or `all` for one after the other.
    seq_len: L.
    multiple_of: see `PackedWindows`.
    tail: see `PackedWindows`; None for True if the split is shorter than a
      window.

  Raises:
    InputError: no such split, or fewer tokens in it than one window takes.
  """
  names = SPLITS if split == "all" else (split,)
  known = (*SPLITS, "all")
  require(split in known, "split", split, f"one of {', '.join(known)}")
  used = [name for name in names if prepared.splits[name].tokens]
  require(
    used,
    "split",
    split,
    f"a split with documents: the other has all of them in {prepared.folder}",
  )
  ends, starts, offset = [], [], 0
  for name in used:
    piece_ends, document_starts = read_index(prepared.folder, name)
    ends.append(piece_ends + offset)
    starts.append(document_starts + offset)
    offset += prepared.splits[name].tokens
  if tail is None:
    tail = offset <= seq_len
  try:
    return PackedWindows(
      read_pieces(prepared.folder, splits=used),
      piece_ends=np.concatenate(ends),
      document_starts=np.concatenate(starts),
      seq_len=seq_len,
      multiple_of=multiple_of,
      tail=tail,
    )
  except InputError as error:
    valid = f"{error.valid}; split {split} of {prepared.folder}"
    raise InputError(error.field, error.value, valid) from None


def batches(
  prepared: PreparedData,
  split: str,
  *,
  seq_len: int,
  batch_size: int,
  seed: int = 0,
  shuffle: bool = True,
  epochs: int | None = None,
  drop_remainder: bool = True,
  tail: bool | None = False,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """This host's part of every batch.

  The windows of step s, over all hosts, are the same for any number of hosts,
  and every host gets equally many batches. `iter()` of the result has
  `get_state` and `set_state`, and goes into an Orbax checkpoint through
  `grain.checkpoint.CheckpointSave`.

  Args:
    prepared: tokenised documents.
    split: `train`, `validation`, or `all`.
    seq_len: L.
    batch_size: windows of one step over all hosts, B * process_count.
    seed: seed of the shuffle.
    shuffle: a new random order in every epoch; False is the stream's order.
    epochs: passes over the windows; None goes on for ever.
    drop_remainder: leave the last incomplete batch out. False, for a single
      pass in the stream's order, fills it with windows of padding, on which
      there is no loss: every window counts once and all batches have one shape.
    tail: see `windows`; with `drop_remainder` False alone.
    process_index: this host, `jax.process_index()`.
    process_count: number of hosts, `jax.process_count()`.

  Returns:
    Batches of `inputs`, `targets` int32 [B, L], `breaks` int8 [B, L] and
    `loss_mask` bool [B, L]; see `PackedWindows.__getitem__`.

  Raises:
    InputError: a split without a window of `seq_len`, a `batch_size` that the
      hosts cannot share or that the windows of all epochs do not fill, or an
      argument out of its range.
  """
  require(batch_size > 0, "batch_size", batch_size, "a number above 0")
  require(
    batch_size % process_count == 0,
    "batch_size",
    batch_size,
    f"a multiple of the number of processes, {process_count}",
  )
  require(
    0 <= process_index < process_count,
    "process_index",
    process_index,
    f"0 <= index < process_count = {process_count}",
  )
  require(
    epochs is None or epochs > 0, "epochs", epochs, "a number above 0, or None"
  )
  require(0 <= seed < 2**32, "seed", seed, "0 <= seed < 2**32")
  require(
    drop_remainder or (epochs == 1 and not shuffle),
    "drop_remainder",
    drop_remainder,
    "True, unless shuffle is False and epochs is 1",
  )
  valid = "False with drop_remainder"
  require(tail is False or not drop_remainder, "tail", tail, valid)
  multiple_of = 1 if drop_remainder else batch_size
  source = windows(
    prepared, split, seq_len=seq_len, multiple_of=multiple_of, tail=tail
  )
  dataset = grain.MapDataset.source(source).seed(seed)
  if shuffle:
    dataset = dataset.shuffle()
  dataset = dataset.repeat(epochs)
  # Cut to whole batches before the hosts take their shares: else one host
  # could come to its end a step before the others, which would wait for it.
  whole = len(dataset) // batch_size * batch_size
  require(
    whole > 0,
    "batch_size",
    batch_size,
    f"at most {len(dataset)}, the windows of seq_len = {seq_len} in {epochs} "
    f"epochs of {split}",
  )
  dataset = dataset[process_index:whole:process_count]
  local = batch_size // process_count
  return dataset.batch(local, drop_remainder=True).to_iter_dataset(READ_OPTIONS)


def held_out_batches(
  prepared: PreparedData,
  split: str,
  *,
  seq_len: int,
  batch_size: int,
  most: int | None = None,
  tail: bool | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """The same batches at every evaluation: each window once, none left out.

  Args:
    prepared: tokenised documents.
    split: `train`, `validation`, or `all`.
    seq_len: L.
    batch_size: B; the last batch is filled with padding.
    most: stop after so many batches, in the stream's order; None for all.
    tail: True for every token of the text: the last fraction of a window too,
      filled with padding. None for that of a text shorter than a window, False
      to refuse such a one.
    process_index: this host, `jax.process_index()`.
    process_count: number of hosts, `jax.process_count()`.

  Yields:
    As `batches`.

  Raises:
    InputError: as `batches`, or `most` below 1.
  """
  require(most is None or most > 0, "most", most, "a number above 0, or None")
  whole = batches(
    prepared,
    split,
    seq_len=seq_len,
    batch_size=batch_size,
    shuffle=False,
    epochs=1,
    drop_remainder=False,
    tail=tail,
    process_index=process_index,
    process_count=process_count,
  )
  return itertools.islice(whole, most)


def spread_batches(
  prepared: PreparedData,
  split: str,
  *,
  seq_len: int,
  batch_size: int,
  count: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Windows at equal distances over a whole split, the same at every call.

  The first windows of a text have a level of their own; these are a sample of
  all of it.

  Args:
    prepared: tokenised documents.
    split: `train`, `validation`, or `all`.
    seq_len: L.
    batch_size: B; the last batch is filled with padding.
    count: number of windows; all of them if there are no more.

  Yields:
    As `batches`.

  Raises:
    InputError: as `batches`, or `count` below 1.
  """
  require(batch_size > 0, "batch_size", batch_size, "a number above 0")
  require(count > 0, "count", count, "a number above 0")
  source = windows(prepared, split, seq_len=seq_len, tail=None)
  count = min(count, source.windows)
  chosen = np.linspace(0, source.windows - 1, count).round().astype(int)
  for start in range(0, count, batch_size):
    rows = [source[i] for i in chosen[start : start + batch_size]]
    rows += [_padding(seq_len)] * (batch_size - len(rows))
    yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _padding(seq_len: int) -> dict[str, np.ndarray]:
  return {
    "inputs": np.full(seq_len, PAD_ID, np.int32),
    "targets": np.full(seq_len, PAD_ID, np.int32),
    "breaks": np.full(seq_len, Break.NONE, np.int8),
    "loss_mask": np.zeros(seq_len, np.bool_),
  }
