"""Files appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from engram_jax.errors import InputError
from engram_jax.files import whole_file, write_whole


def test_it_takes_its_name_at_the_end(tmp_path):
  path = tmp_path / "file"
  path.write_text("old")
  with whole_file(path) as file:
    file.write(b"new")
    file.flush()
    assert path.read_text() == "old"
  assert path.read_text() == "new"
  assert os.listdir(tmp_path) == ["file"]
  assert path.stat().st_mode & 0o777 == 0o644


def test_a_body_that_raises_changes_nothing(tmp_path):
  path = tmp_path / "file"
  write_whole(path, "old")
  with pytest.raises(ZeroDivisionError), whole_file(path) as file:
    file.write(b"half")
    raise ZeroDivisionError
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
  path = tmp_path / "file"
  write_whole(path, "old, ä")
  code = """
import os, signal, sys
from engram_jax.files import whole_file
with whole_file(sys.argv[1]) as file:
  file.write(b"half")
  file.flush()
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", code, path])
  assert done.returncode == -signal.SIGKILL
  assert path.read_text(encoding="utf-8") == "old, ä"


def test_no_folder_is_one_clear_line(tmp_path):
  with pytest.raises(InputError, match=r"^path: .*; valid: a file: this is a"):
    write_whole(tmp_path, "text")
  with pytest.raises(InputError, match=r"^path: .*; valid: a file in a writ"):
    write_whole(tmp_path / "missing" / "file", "text")


@pytest.mark.parametrize("part", ["body", "fsync"])
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, part):
  path = tmp_path / "file"
  write_whole(path, "old")

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  if part == "fsync":
    monkeypatch.setattr(os, "fsync", full)
  match = r"^path: .*file; valid: .* with room for it \(No space left on dev"
  with pytest.raises(InputError, match=match), whole_file(path) as file:
    file.write(b"new")
    if part == "body":
      full()
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
