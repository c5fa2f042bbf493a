"""The repository as others meet it: wheel, README, imports, Makefile."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What `import engram_jax` must not need: each is for one part of it only.
HEAVY = (
  "grain",
  "matplotlib",
  "orbax",
  "tensorflow",
  "tensorflow_datasets",
  "tokenizers",
  "torch",
)


def run(*command, **options) -> str:
  """The command's output; its errors are part of the failure."""
  done = subprocess.run(
    [str(part) for part in command], capture_output=True, text=True, **options
  )
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


def repository_files() -> list[Path]:
  """The files of the repository: all that git would commit."""
  if not (ROOT / ".git").exists():
    # An unpacked archive holds nothing else.
    skipped = {".venv", "build", "dist", "runs"}
    files = (path for path in ROOT.rglob("*") if path.is_file())
    return [p for p in files if not skipped & set(p.relative_to(ROOT).parts)]
  # Not yet committed files count: the check is for before they are.
  options = ("--cached", "--others", "--exclude-standard", "-z")
  names = run("git", "-C", ROOT, "ls-files", *options).split("\0")
  return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """The wheel, built from a copy: a build leaves folders behind."""
  source = tmp_path_factory.mktemp("source")
  output = tmp_path_factory.mktemp("wheel")
  for path in repository_files():
    copy = source / path.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
  # The build requirements of pyproject.toml: if they are here, nothing is
  # downloaded.
  major = (
    int(metadata.version("setuptools").split(".")[0])
    if ("setuptools" in {d.name for d in metadata.distributions()})
    else 0
  )
  isolation = ["--no-isolation"] if major >= 77 else []
  build = (sys.executable, "-m", "build", "--wheel", *isolation)
  run(*build, "--outdir", output, source)
  (built,) = output.glob("*.whl")
  return built


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
  """Python of a new environment that has the wheel and its dependencies.

  The dependencies are borrowed from the environment of the tests, at the end
  of the path. An editable install there is not seen: its own .pth file is not
  read from a borrowed folder.
  """
  folder = tmp_path_factory.mktemp("environment")
  venv.create(folder, symlinks=True)
  python = folder / "bin" / "python"
  pip = (sys.executable, "-m", "pip", "--python", python)
  run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
  (site,) = folder.glob("lib/python*/site-packages")
  names = ("purelib", "platlib")
  borrowed = {sysconfig.get_path(name) for name in names}
  (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
  return python


def test_wheel_holds_the_package_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  tops = {name.split("/")[0] for name in names}
  assert tops == {"engram_jax", "engram_jax-0.1.0.dist-info"}
  assert "engram_jax/py.typed" in names
  assert "engram_jax-0.1.0.dist-info/licenses/LICENSE" in names
  # A subpackage without __init__.py would be left out without a word.
  expected = {
    path.relative_to(ROOT).as_posix()
    for path in repository_files()
    if path.is_relative_to(ROOT / "engram_jax")
  }
  assert expected == {name for name in names if name.startswith("engram_jax/")}


def test_readme_example_runs_from_the_wheel(clean_python, tmp_path):
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
  assert blocks, "README.md has no ```python block"
  example = tmp_path / "example.py"
  example.write_text(
    blocks[0] + "\nimport engram_jax\nprint('FROM', engram_jax.__file__)\n",
    encoding="utf-8",
  )
  # -I: neither the checkout nor PYTHONPATH is on the path.
  output = run(clean_python, "-I", example, cwd=tmp_path)
  imported = Path(output.rpartition("FROM ")[2].strip())
  environment = clean_python.parent.parent
  assert imported.resolve().is_relative_to(environment.resolve())


def test_import_is_light():
  program = (
    "import sys, engram_jax; "
    f"print([name for name in {HEAVY} if name in sys.modules])"
  )
  assert run(sys.executable, "-c", program, cwd=ROOT).strip() == "[]"


def test_no_file_names_a_machine():
  # In pieces, so that this file may be searched too.
  forbidden = [
    rb"(?<![\w.~-])/" + folder + rb"/"
    for folder in (b"wo" + b"rk", b"ro" + b"ot", b"ho" + b"me")
  ] + [b"pypi" + rb"\.org", b"python" + rb"hosted\.org"]
  pattern = re.compile(b"|".join(forbidden))
  found = [
    f"{path.relative_to(ROOT)}: {match.group().decode()}"
    for path in repository_files()
    if (match := pattern.search(path.read_bytes()))
  ]
  assert not found


def test_notebooks_have_no_outputs():
  stored = re.compile(r'"execution_count": *[0-9]|"output_type":')
  for path in repository_files():
    if path.suffix == ".ipynb":
      text = path.read_text(encoding="utf-8")
      assert not stored.search(text), f"outputs in {path.name}"


@pytest.fixture
def make(tmp_path):
  """Runs the Makefile in a copy, with nothing on the path but the given."""
  for name in ("Makefile", "setup.cfg", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  tools = tmp_path / "tools"
  tools.mkdir()
  for name in ("sh", "touch", "rm", "find", "mkdir"):
    (tools / name).symlink_to(shutil.which(name))
  program = shutil.which("make")

  def call(*arguments, **pythons):
    for name, text in pythons.items():
      script = tools / name.replace("_", ".")
      script.write_text(f"#!{shutil.which('sh')}\n{text}\n")
      script.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
      environment.pop(name, None)
    return subprocess.run(
      [program, *arguments],
      cwd=tmp_path,
      env=environment | {"PATH": str(tools)},
      capture_output=True,
      text=True,
    )

  return call


# Stands for a Python: notes what it is called for, and makes a .venv of
# itself when asked for one.
FAKE = """
case "$2" in
  *version_info*) exit {too_old} ;;
  *sys.version*) echo {name} ;;
  venv) mkdir -p .venv/bin; cp="$0"
    echo "$0 made .venv" >> log
    while IFS= read -r line; do echo "$line"; done < "$0" > .venv/bin/python
    /bin/chmod +x .venv/bin/python ;;
  *) echo "{name} $@" >> log ;;
esac
"""
SHIM = "echo 'command not found' >&2; exit 127"


def fake(name: str, too_old: int = 0) -> str:
  return FAKE.format(name=name, too_old=too_old)


def log(folder: Path) -> list[str]:
  path = folder / "log"
  return path.read_text().splitlines() if path.exists() else []


def test_make_takes_the_first_python_that_runs(make, tmp_path):
  pythons = {
    "python3_12": SHIM,
    "python3_13": fake("thirteen"),
    "python3": fake("three"),
  }
  done = make("train", **pythons)
  assert done.returncode == 0, done.stderr
  made, install, train = log(tmp_path)
  assert made.endswith("python3.13 made .venv")
  assert install == "thirteen -m pip install --quiet --editable ."
  assert train.startswith("thirteen -m experiments.pretrain --config=")

  # Installed once: the second time only the program runs.
  make("train")
  assert len(log(tmp_path)) == 4
  assert log(tmp_path)[-1] == train

  # New dependencies are installed into the same environment.
  os.utime(tmp_path / "setup.cfg", (2**32, 2**32))
  make("train")
  assert log(tmp_path)[-2:] == [install, train]
  assert len(log(tmp_path)) == 6


def test_make_installs_what_the_target_needs(make, tmp_path):
  make("test", "ARGS=-k hash", "JOBS=3", python3=fake("three"))
  make("lint")
  assert log(tmp_path)[1:] == [
    "three -m pip install --quiet --editable .[test]",
    "three -m pytest -n 3 --dist loadfile -k hash",
    "three -m pip install --quiet --editable .[dev]",
    "three -m ruff check .",
    "three -m ruff format --check .",
  ]


def test_make_takes_the_python_asked_for(make, tmp_path):
  make("train", python3=fake("three"))
  done = make("train", "PYTHON=mine", mine=fake("mine"))
  assert done.returncode == 0, done.stderr
  assert log(tmp_path)[3].endswith("mine made .venv")
  assert log(tmp_path)[4].startswith("mine -m pip install")
  # The same one again: nothing to make.
  make("train", "PYTHON=mine")
  assert len(log(tmp_path)) == 7


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3.9",)])
def test_make_refuses_an_old_python_in_one_line(make, tmp_path, arguments):
  pythons = {"python3": fake("three", 1), "python3_9": fake("nine", 1)}
  done = make("train", *arguments, **pythons)
  assert done.returncode != 0
  first, second = done.stderr.splitlines()
  assert re.match(r"PYTHON: .*python3.*; valid: .*3\.11 or newer", first)
  assert second.startswith("make: ***")
  assert log(tmp_path) == []
