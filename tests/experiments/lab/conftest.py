"""One laboratory for all studies: text and finished runs are shared."""

import pytest

from experiments.lab.runs import Laboratory
from experiments.lab.scales import scale_of


@pytest.fixture(autouse=True)
def _fast(steps_compile_fast):
  """Nearly all of a smoke run's time is compilation."""


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
  """A laboratory of smoke scale."""
  return Laboratory(scale_of("smoke"), tmp_path_factory.mktemp("laboratory"))
