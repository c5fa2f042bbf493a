"""Meshes of eight simulated devices; see tests/test_eight_devices.py."""

import os

import jax
import pytest
from jax.sharding import AxisType

from engram_jax import sharding
from engram_jax.run_config import MeshConfig

if "EIGHT_DEVICES" not in os.environ:
  collect_ignore_glob = ["test_*.py"]

SHAPES = ((8, 1, 1), (2, 2, 2))


@pytest.fixture(params=SHAPES, ids=str)
def auto_mesh(request):
  """Auto axes, of several shapes."""
  return sharding.make_mesh(MeshConfig(*request.param))


@pytest.fixture(params=["auto", "explicit"])
def any_mesh(request):
  """One shape, both kinds of axes."""
  kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[request.param]
  return sharding.make_mesh(MeshConfig(2, 2, 2), axis_type=kind)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
  """These tests mean nothing on another number of devices."""
  assert jax.device_count() == 8
