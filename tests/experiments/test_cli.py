"""Config files that are none: one clear line each, whatever they raise."""

import sys

import pytest
from absl import flags

from experiments import cli


def parse(path):
  """The config of `--config=PATH`."""
  values = flags.FlagValues()
  holder = cli.define_config(values)
  values(["program", f"--config={path}"])
  return holder.value


GOOD = """
import ml_collections
def get_config(name="none"):
  return ml_collections.ConfigDict({"name": name, "steps": 1})
"""


def test_a_config_file_is_read_with_its_argument(tmp_path):
  path = tmp_path / "good.py"
  path.write_text(GOOD)
  assert parse(path).name == "none"
  assert parse(f"{path}:some").name == "some"


@pytest.mark.parametrize(
  "text, why",
  [
    ("vm-17", r"line 1: NameError: name 'vm' is not defined"),
    ("def get_config(:", r"SyntaxError: .*line 1"),
    ("import nothing_of_this_name", r"line 1: ModuleNotFoundError: "),
    ("def get_config():\n  return 1 / 0", r"line 2: ZeroDivisionError: "),
    ("def get_config():\n  return int('x')", r"line 2: ValueError: invalid"),
    ("def get_config():\n  return 5", r"AttributeError: 'int' object"),
    ("def get_config():\n  return open('/no/such')", r"OSError: .*/no/such"),
    (b"\xff\xfe", r"SyntaxError: .*utf-8"),
  ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, why):
  path = tmp_path / "config.py"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(Exception, match=rf"^config: {path}; .*\({why}") as found:
    parse(path)
  assert "\n" not in str(found.value)


def test_what_cannot_be_read_is_one_line(tmp_path):
  for path in (tmp_path, tmp_path / "missing.py", ""):
    with pytest.raises(Exception, match=rf"^config: {path}; valid: a Python"):
      parse(path)


def test_the_field_that_a_config_refuses_is_named(tmp_path):
  path = tmp_path / "config.py"
  path.write_text("from experiments.configs.preset import get_config")
  with pytest.raises(Exception, match=r"^preset: nope; valid: one of "):
    parse(f"{path}:nope")


@pytest.mark.parametrize(
  "argument, line",
  [
    (
      "--config.nope=1",
      "config.nope: 1; valid: a field of config: name, steps",
    ),
    ("--noconfig.nope", "config.nope: given; valid: a field of config: name, "),
    ("--config.steps.a.b=x", "config.steps.a.b: x; valid: a field of a group "),
  ],
)
def test_a_field_that_there_is_not(tmp_path, monkeypatch, argument, line):
  path = tmp_path / "good.py"
  path.write_text(GOOD)
  monkeypatch.setattr(sys, "argv", ["program", f"--config={path}", argument])
  with pytest.raises(Exception, match=f"^{line}"):
    parse(path)
  monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--config.steps=7"])
  assert parse(path).steps == 1  # the flag of the field comes later


@pytest.mark.parametrize("name, why", [("", "directory"), ("a.py", "get_conf")])
def test_a_program_ends_with_the_line(program, tmp_path, name, why):
  (tmp_path / "a.py").write_text("x = 1")
  done = program("count", f"--config={tmp_path / name}", configured=False)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: config: ") and why in done.stderr
  assert done.stderr.count("\n") == 1
