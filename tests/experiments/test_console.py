"""The boundary to the shell: arguments of any bytes, stdout of any kind."""

import io
import os
import subprocess
import sys
import textwrap

import pytest

from engram_jax.errors import InputError
from experiments import console

# A program in a few lines: what `cli.run` does of the kind.
PROGRAM = """
  import sys
  from absl import flags
  from experiments import cli, console
  PROMPT = flags.DEFINE_string("prompt", "x", "")
  def main(argv):
    console.require_stdout()
    print(console.argument_text("prompt", PROMPT.value))
    for _ in range(int(argv[1])):
      print("a line of text " * 10, flush=True)
  cli.run(main)
"""


def start(*arguments, **options):
  command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments]
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
  root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
  return subprocess.Popen(command, cwd=root, **options)


def test_bytes_that_are_no_utf8_are_refused_in_one_line():
  process = start("1", b"--prompt=caf\xe9")
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  (line,) = err.decode().splitlines()
  assert line.startswith("error: prompt: ") and line.endswith("text in UTF-8")


@pytest.mark.parametrize(
  "encoding, expected",
  [
    ("ascii", "\\xe9\\u20ac"),
    ("latin-1", "\xe9\\u20ac"),
    ("utf-8", "\xe9\u20ac"),
  ],
)
def test_stdout_of_every_encoding_takes_every_character(encoding, expected):
  env = os.environ | {"PYTHONIOENCODING": encoding}
  process = start("0", "--prompt=\xe9\u20ac", env=env)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, err) == (0, b"")
  assert out.decode(encoding) == expected + "\n"


def test_arguments_are_utf8_in_a_locale_that_is_not():
  env = os.environ | {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "utf-8",
  }
  process = start("0", "--prompt=caf\xe9".encode(), env=env)
  out, err = process.communicate(timeout=100)
  assert out.decode() == "caf\xe9\n", err


def test_a_reader_that_goes_away_ends_the_program_quietly():
  process = start("100000")
  process.stdout.readline()
  process.stdout.close()
  err = process.stderr.read()
  assert (process.wait(timeout=100), err) == (console.READER_GONE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
@pytest.mark.parametrize("lines", ["0", "3"])
def test_a_full_disk_behind_stdout_is_told_in_one_line(lines):
  with open("/dev/full", "w") as full:
    process = start(lines, stdout=full)
    _, err = process.communicate(timeout=100)
  assert process.returncode == 1
  (line,) = err.decode().splitlines()
  assert line.startswith("error: stdout: No space left on device")


def test_a_closed_stdout_is_refused(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  assert console.stdout_failure() is None
  with pytest.raises(InputError, match="stdout: closed"):
    console.require_stdout()


def test_text_that_is_text_stays_as_it_is(monkeypatch):
  assert console.argument_text("prompt", "\u20ac\0 x") == "\u20ac\0 x"
  with pytest.raises(InputError, match="prompt: "):
    console.argument_text("prompt", "\ud800")
  # A stream that cannot be set up, as a notebook's, is left alone.
  monkeypatch.setattr(sys, "stdout", io.StringIO())
  console.prepare_stdout()
