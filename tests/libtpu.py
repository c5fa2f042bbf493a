"""Whether tests that compile for TPUs can run."""

import importlib.metadata

import pytest


def has_libtpu() -> bool:
  try:
    return bool(importlib.metadata.version("libtpu"))
  except importlib.metadata.PackageNotFoundError:
    return False


needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="needs libtpu")
