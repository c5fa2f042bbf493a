"""The repository as others meet it: wheel, README, imports, files."""

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
    # An unpacked archive, in which something may have been run.
    skipped = {".venv", "build", "dist", "runs", "__pycache__"}
    skipped |= {".pytest_cache", ".ruff_cache", "engram_jax.egg-info"}
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
  installed = {item.name for item in metadata.distributions()}
  version = metadata.version("setuptools") if "setuptools" in installed else "0"
  isolation = ["--no-isolation"] if int(version.split(".")[0]) >= 77 else []
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


def test_readme_examples_run_from_the_wheel(clean_python, tmp_path):
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
  assert len(blocks) == 2, "README.md has an example for nnx and one for linen"
  example = tmp_path / "example.py"
  example.write_text(
    "\n".join([*blocks, "print('FROM', engram_jax.__file__)"]),
    encoding="utf-8",
  )
  # -I: neither the checkout nor PYTHONPATH is on the path.
  output = run(clean_python, "-I", example, cwd=tmp_path)
  (loss,) = re.findall(r"^loss (.*)$", output, re.M)
  assert float(loss) < 1.0, "the example's model has not learnt its batch"
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
