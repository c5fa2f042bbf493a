"""The legend of axis names, and the array aliases used everywhere.

B  batch                      L  sequence (positions)
D  model width                G  residual streams
N  largest n-gram order       H  hash heads per order
K  hash columns, H * (N - 1)  d  width of one memory row
R  rows of one layer's table  E  routed experts
V  vocabulary                 T  tokens of a batch, B * L
U  number of rows read, B * L * K
"""

import enum

from jaxtyping import Array, Bool, Float, Int

TokenIds = Int[Array, "B L"]
CanonicalIds = Int[Array, "B L"]
History = Int[Array, "B history"]
Breaks = Int[Array, "B L"] | Bool[Array, "B L"]
RowIds = Int[Array, "B L K"]
Table = Float[Array, "R d"]
Rows = Float[Array, "B L K d"]
Hidden = Float[Array, "B L G D"]
#: A model with one residual stream may leave its axis out.
AnyHidden = Hidden | Float[Array, "B L D"]
Gates = Float[Array, "B L G"]


class Break(enum.IntEnum):
  """What interrupts the n-grams at a position; a `breaks` array holds these.

  A boolean array is a `breaks` array too: True is a document start.
  """

  NONE = 0
  #: First token of a document: no n-gram reaches across it to the left.
  DOCUMENT_START = 1
  #: Not text (an image span, say): no n-gram contains it or reaches across it,
  #: and its gate is 0, so that the memory leaves its hidden state unchanged.
  NON_TEXT = 2
