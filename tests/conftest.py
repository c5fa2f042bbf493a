"""What all tests share. It must not import engram_jax.

The import hook that checks jaxtyping's annotations is put in place when pytest
is configured, which is after this file is imported; a module imported here
would go unchecked.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from absl import flags

# Set before jax, matplotlib or tokenizers are imported. JAX_PLATFORMS is left
# as it is, so that the tests run on what the machine has.
# Several test processes share one accelerator.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# No display.
os.environ.setdefault("MPLBACKEND", "Agg")
# The library warns when a process that has used its threads is forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# C++ logs from warnings down, which are about the machine.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Much of the tests' time is compilation of programs that run for less than a
# second: XLA need not try its best. `test_eight_devices.py` asks it to.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one process has compiled, its neighbours find, and the programs that
# tests start; each call of pytest begins with nothing.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache = None if _CACHE in os.environ else tempfile.mkdtemp(prefix="jax-")
if _own_cache:
  os.environ[_CACHE] = _own_cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

# Grain reads absl flags, which only a program's `app.run` parses.
flags.FLAGS.mark_as_parsed()


#: Files of few, long tests. Two processes share the files out in order: one of
#: these at the end would leave one of them alone with it.
FIRST = (
  "tests/test_eight_devices.py",
  "tests/experiments/test_programs.py",
  "tests/backbone/test_transformer.py",
  "tests/training/test_processes.py",
)


def pytest_collection_modifyitems(items):
  """The long files come first; the order is otherwise as it was."""
  items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


def pytest_unconfigure():
  """Removes the compiled programs, where this process has made their folder."""
  if _own_cache:
    shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def program_server():
  """Starts programs by `start(module, *arguments)` without their imports."""
  from tests.program_server import ProgramServer

  with ProgramServer() as server:
    yield server


@pytest.fixture
def types_unchecked():
  """Annotations are not checked, as for a user: what does the code itself?"""
  from jaxtyping import config

  config.update("jaxtyping_disable", True)
  yield
  config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
  """The folder of reference values."""
  return Path(__file__).parent / "golden"
