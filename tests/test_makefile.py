"""The Makefile's own logic, with shell scripts in the place of Pythons."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Answers what the Makefile asks of a Python, makes a .venv of itself, and
# writes every other call down.
PYTHON = """
case "$2" in
  *version_info*) exit {unusable} ;;
  *sys.version*) echo {name} ;;
  venv) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo {name} venv >> log ;;
  "") echo Python ;;
  *) echo {name} "$@" >> log ;;
esac
"""
# As a version manager's, for a version that is not switched on.
SHIM = "echo command not found >&2; exit 127"
TRAIN = (
  "-m experiments.pretrain --config=experiments/configs/tiny.py "
  "--workdir=runs/tiny"
)


def python(name: str, *, unusable: int = 0) -> str:
  return PYTHON.format(name=name, unusable=unusable)


@pytest.fixture
def make(tmp_path):
  """Runs a copy of the Makefile with only the given Pythons on the path."""
  for name in ("Makefile", "setup.cfg", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  tools = tmp_path / "tools"
  tools.mkdir()
  for name in ("sh", "touch", "rm", "find", "mkdir", "cp"):
    (tools / name).symlink_to(shutil.which(name))
  inherited = {"PYTHON", "VENV", "ARGS", "JOBS", "CONFIG", "WORKDIR"}
  inherited |= {"SCALE", "WORKERS"}
  inherited |= {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
  kept = {k: v for k, v in os.environ.items() if k not in inherited}
  program = shutil.which("make")

  def call(*arguments: str, **pythons: str) -> subprocess.CompletedProcess:
    for name, text in pythons.items():
      script = tools / name.replace("_", ".")
      script.write_text(f"#!{shutil.which('sh')}\n{text}\n")
      script.chmod(0o755)
    return subprocess.run(
      [program, *arguments],
      cwd=tmp_path,
      env=kept | {"PATH": str(tools)},
      capture_output=True,
      text=True,
    )

  return call


@pytest.fixture
def calls(tmp_path):
  """What the Pythons were called for since the last time asked."""

  def read() -> list[str]:
    log = tmp_path / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines

  return read


def test_takes_the_first_python_that_runs(make, calls, tmp_path):
  done = make(
    "train", python3_12=SHIM, python3_13=python("A"), python3=python("B")
  )
  assert done.returncode == 0, done.stderr
  install = "A -m pip install --quiet --editable ."
  assert calls() == ["A venv", install, f"A {TRAIN}"]
  # Installed once: the second time only the program runs.
  assert make("train").returncode == 0
  assert calls() == [f"A {TRAIN}"]
  # Other dependencies are installed into the same environment.
  os.utime(tmp_path / "setup.cfg", (2**32, 2**32))
  assert make("train").returncode == 0
  assert calls() == [install, f"A {TRAIN}"]


def test_installs_what_the_target_needs(make, calls):
  done = make("test", "ARGS=-k hash", "JOBS=3", python3=python("A"))
  assert done.returncode == 0 and not done.stderr
  assert calls() == [
    "A venv",
    "A -m pip install --quiet --editable .[test]",
    "A -m pytest -n 3 --dist loadfile --no-loadscope-reorder -k hash",
  ]
  assert make("lint").returncode == 0
  assert calls() == [
    "A -m pip install --quiet --editable .[dev]",
    "A -m ruff check .",
    "A -m ruff format --check .",
  ]
  assert make("docs").returncode == 0
  assert calls() == [
    "A -m pip install --quiet --editable .[docs]",
    "A -m mkdocs build --strict",
  ]
  assert make("lab", "SCALE=cpu", "WORKERS=1").returncode == 0
  assert calls() == [
    "A -m pip install --quiet --editable .",
    "A -m experiments.lab --scale=cpu --workers=1",
  ]


def test_the_python_asked_for_wins(make, calls):
  make("train", python3=python("A"))
  calls()
  install = "B -m pip install --quiet --editable ."
  done = make("train", "PYTHON=mine", mine=python("B"))
  assert done.returncode == 0, done.stderr
  assert calls() == ["B venv", install, f"B {TRAIN}"]
  # The same one again, and none: the environment stays.
  for arguments in (["PYTHON=mine"], []):
    assert make("train", *arguments).returncode == 0
    assert calls() == [f"B {TRAIN}"]


def test_makes_a_broken_environment_anew(make, calls, tmp_path):
  make("train", python3=python("A"))
  calls()
  # As after an interrupted first run: no stamp, and a Python without pip.
  (tmp_path / ".venv" / ".installed-train").unlink()
  (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
  assert make("train").returncode == 0
  assert calls()[0] == "A venv"


def test_a_failed_install_is_repeated(make, calls):
  failing = python("A").replace("venv)", "pip) exit 1 ;;\n  venv)")
  assert make("train", python3=failing).returncode != 0
  assert calls() == ["A venv"]
  assert make("train", "PYTHON=mine", mine=python("B")).returncode == 0
  assert calls()[-1] == f"B {TRAIN}"


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3.9",)])
def test_refuses_an_old_python_in_one_line(make, calls, arguments):
  old = {name: python("A", unusable=1) for name in ("python3", "python3_9")}
  done = make("train", *arguments, **old)
  assert done.returncode != 0
  line, end = done.stderr.splitlines()
  assert re.match(r"PYTHON: .*python3.*; valid: .*3\.11 or newer", line)
  assert re.match(r"make.*: \*\*\*", end)
  assert calls() == []


def test_clean_keeps_the_runs(make, tmp_path):
  for name in ("runs/tiny", ".venv/bin", "build", "tests/__pycache__"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "engram_jax").mkdir()
  (tmp_path / "experiments").mkdir()
  assert make("clean").returncode == 0
  assert (tmp_path / "runs" / "tiny").is_dir()
  for name in (".venv", "build", "tests/__pycache__"):
    assert not (tmp_path / name).exists()


def test_the_first_lines_name_every_target():
  text = (ROOT / "Makefile").read_text(encoding="utf-8")
  told = re.findall(r"^#   make (\w+) ", text, re.M)
  targets = re.search(r"^\.PHONY: (.*)$", text.split("endif\n")[-1], re.M)
  assert sorted(told) == sorted(targets.group(1).split())


def test_continuous_integration_checks_style_first(tmp_path):
  (tmp_path / ".ci").mkdir()
  script = Path(shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci"))
  log = tmp_path / "log"
  fake = tmp_path / "bin" / "make"
  fake.parent.mkdir()
  # Fails at the target named in FAIL.
  fake.write_text(f'#!/bin/sh\necho "$1" >> {log}\ntest "$1" != "$FAIL"\n')
  fake.chmod(0o755)
  path = f"{fake.parent}:{os.environ['PATH']}"
  for fail, targets in (("", ["lint", "test"]), ("lint", ["lint"])):
    log.unlink(missing_ok=True)
    done = subprocess.run(
      [script], env=os.environ | {"PATH": path, "FAIL": fail}
    )
    assert (done.returncode == 0) == (not fail)
    assert log.read_text().split() == targets
