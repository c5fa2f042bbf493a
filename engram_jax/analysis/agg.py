"""Matplotlib as the pictures use it: figures on a canvas of Agg, no backend.

A notebook hands its `MPLBACKEND` on to the programs that it starts, and where
that names a backend which is not installed, `import matplotlib` fails. No
backend is needed here: the variable is put aside during the import.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

_NAME = "MPLBACKEND"


@contextlib.contextmanager
def _without_backend() -> Iterator[None]:
  chosen = os.environ.pop(_NAME, None)
  try:
    yield
  finally:
    if chosen is not None:
      os.environ[_NAME] = chosen


_is_first = "matplotlib" not in sys.modules

with _without_backend():
  import matplotlib
  from matplotlib import font_manager
  from matplotlib.axes import Axes
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.cm import ScalarMappable
  from matplotlib.collections import PolyCollection
  from matplotlib.colors import Normalize
  from matplotlib.figure import Figure

# The user's choice stands for who draws with pyplot later, if it can.
if _is_first and os.environ.get(_NAME):
  with contextlib.suppress(ValueError):
    matplotlib.rcParams["backend"] = os.environ[_NAME]

__all__ = [
  "Axes",
  "Figure",
  "FigureCanvasAgg",
  "Normalize",
  "PolyCollection",
  "ScalarMappable",
  "font_manager",
  "matplotlib",
]
