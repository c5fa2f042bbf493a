"""One run at a time in a folder."""

import signal
import subprocess
import sys

import pytest

from engram_jax.errors import InputError
from engram_jax.training.locks import locked
from engram_jax.training.runs import RunFolder

HOLD = """
import pathlib, sys, time
from engram_jax.training.locks import locked
with locked(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
  folder = tmp_path / "run"
  with locked(folder):
    with pytest.raises(InputError, match=r"^workdir: .*; valid: .* process \d"):
      with locked(folder):
        pass
  with locked(folder):
    pass
  RunFolder.of(folder).require_usable()  # the lock alone makes no run


def test_a_killed_run_holds_nothing(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE
  )
  try:
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"process {process.pid} on "):
      with locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path):
      pass
  finally:
    process.kill()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(InputError, match=r"^workdir: "):
      with locked(folder):
        pass
    with pytest.raises(InputError, match=r"^workdir: "):
      RunFolder.of(folder).require_usable()
