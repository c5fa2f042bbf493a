"""What all tests share. It must not import engram_jax.

The import hook that checks jaxtyping's annotations is put in place when pytest
is configured, which is after this file is imported; a module imported here
would go unchecked.
"""

import os
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


@pytest.fixture(scope="session", autouse=True)
def programs_compile_fast():
  """Programs that tests start run for seconds: XLA need not try its best.

  JAX reads this when it is imported; the tests' own process, which has imported
  it, compiles as a user's does.
  """
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


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
