"""What interrupts n-grams: from packed data's segments, and what is refused.

Packed data say which document a token belongs to (`segment_ids`, and 0 for
padding); the hash wants to know where documents start and what is not text
(`types.Break`). The two must not be mixed up: many segment ids are breaks by
their value.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8

from engram_jax.errors import check_in_range, require
from engram_jax.types import Break, Breaks


def breaks_from_segments(
  segment_ids: Int[Array | np.ndarray, "B L"],
  positions: Int[Array | np.ndarray, "B L"] | None = None,
  *,
  padding: int | None = 0,
) -> Int8[Array | np.ndarray, "B L"]:
  """Breaks of packed sequences.

  Works inside and outside of transformations.

  Args:
    segment_ids: integers [B, L], equal within a document and different from
      its neighbours'.
    positions: integers [B, L], 0 at the first token of each document. They
      tell two neighbouring documents of one id apart; and a row whose first
      position is not 0 goes on with a document, as in a chunk after others.
      None: documents start where the id changes, and at the start of a row.
    padding: the segment id of positions without text; None for no such id.

  Returns:
    int8 [B, L] of `Break`: `NON_TEXT` on padding, `DOCUMENT_START` at the first
    token of each document, `NONE` elsewhere. NumPy if `segment_ids` is.

  Raises:
    InputError: not integers, or positions of another shape.
  """
  require_integers("segment_ids", segment_ids)
  shape = segment_ids.shape
  require(segment_ids.ndim == 2, "segment_ids.shape", shape, "[B, L]")
  xp: Any = np if isinstance(segment_ids, np.ndarray) else jnp
  # Padded, not joined: under Explicit mesh axes a fresh array has no sharding.
  before = xp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  is_first = xp.arange(shape[1]) == 0
  starts = (segment_ids != before) & ~is_first
  if positions is None:
    starts = starts | is_first
  else:
    require_integers("positions", positions)
    valid = f"as segment_ids, {shape}"
    require(positions.shape == shape, "positions.shape", positions.shape, valid)
    starts = starts | (positions == 0)
  breaks = xp.where(starts, Break.DOCUMENT_START, Break.NONE)
  if padding is not None:
    breaks = xp.where(segment_ids == padding, Break.NON_TEXT, breaks)
  return breaks.astype(xp.int8)


def resolve_breaks(breaks: Any, segment_ids: Any, positions: Any = None) -> Any:
  """`breaks`, checked; or those of `segment_ids`; None without either.

  Args:
    breaks: [B, L] of `Break`, or bool for document starts only; or None.
    segment_ids: integers [B, L], the document of each position; or None.

  Raises:
    InputError: both are given, or either is not what its name says.
  """
  if segment_ids is None:
    found = "without segment_ids"
    require(positions is None, "positions", found, "both, or neither")
    if breaks is not None:
      require_breaks(breaks)
    return breaks
  require(breaks is None, "segment_ids", "given with breaks", "one of the two")
  return breaks_from_segments(segment_ids, positions)


def require_breaks(breaks: Breaks | np.ndarray) -> None:
  """Refuses an array that holds no `Break`s, where its values are known.

  Segment ids may be breaks by their values: a row 1 1 1 2 2 0 is read as three
  documents of one token each, two positions without text, and text. Such rows
  are refused if all of the array is like that, unless it is int8 or bool.

  Under a trace the values are not known, and only the dtype is looked at; see
  `check_breaks`.

  Raises:
    InputError: another dtype, a value that is no `Break`, or segment ids.
  """
  require_integers("breaks", breaks)
  if isinstance(breaks, jax.core.Tracer) or breaks.dtype == bool:
    return
  values = np.asarray(breaks)
  if breaks.dtype != np.int8 and _like_segments(values):
    valid = "0, 1, 2 of Break; these are segment_ids=, or else say so by int8"
    require(False, "breaks", values[0].tolist(), valid)
  wrong = ~np.isin(values, list(Break))
  if wrong.any():
    valid = "0, 1, 2 of Break, or bool; for segment ids say segment_ids="
    require(False, "breaks", values[wrong].flat[0], valid)


def check_breaks(breaks: Breaks | np.ndarray) -> None:
  """`require_breaks` that also works inside a `checkify`-ed function.

  There it looks at the range of the values only; see `errors.check_in_range`.
  """
  require_breaks(breaks)
  if breaks.dtype != bool:
    check_in_range("breaks", breaks, low=min(Break), high=max(Break) + 1)


def require_integers(field: str, array: Any) -> None:
  """Refuses an array of another dtype than integers or bool.

  Args:
    field: name of the array, for the error line.
    array: the array to check.
  """
  kind = np.dtype(array.dtype).kind
  require(kind in "iub", field, f"dtype {array.dtype}", "integers")


def _like_segments(breaks: np.ndarray) -> bool:
  """Whether all rows with anything in them look like segment ids.

  They begin 1 1 and never fall, but to zeros at the end; and as breaks they
  make no sense: there is no position that an n-gram could end at, or text that
  goes on after positions without text without a document start.
  """
  rows = breaks[(breaks != 0).any(axis=1)] if breaks.ndim == 2 else breaks[:0]
  if not len(rows) or rows.shape[1] < 3:
    return False
  padding = np.cumsum(rows[:, ::-1] != 0, axis=1)[:, ::-1] == 0
  rises = ((np.diff(rows, axis=1) >= 0) | padding[:, 1:]).all(axis=1)
  begins = (rows[:, :2] == 1).all(axis=1)
  senseless = (rows > 1).any(axis=1) | ~padding.any(axis=1)
  return bool((rises & begins & senseless).all())
