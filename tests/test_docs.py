"""The pages and the API reference: complete, and without a warning."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import engram_jax

ROOT = Path(__file__).parents[1]
DOCS = "needs the docs extra: pip install -e '.[docs]'"


def modules() -> list[str]:
  """The package's modules, found without importing them."""
  paths = (ROOT / "engram_jax").rglob("*.py")
  names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
  return sorted(
    ".".join(parts).removesuffix(".__init__")
    for parts in names
    if not parts[-1].startswith("_") or parts[-1] == "__init__"
  )


@pytest.fixture(scope="module")
def build():
  """Builds the pages of a folder as `make docs` does."""
  for name in ("mkdocs", "mkdocstrings", "material", "mkdocs_api_autonav"):
    pytest.importorskip(name, reason=DOCS)

  def call(folder: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
      cwd=folder,
      env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
      capture_output=True,
      text=True,
    )

  return call


@pytest.fixture(scope="module")
def site(build, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("site")
  done = build(ROOT, folder)
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


@pytest.mark.parametrize(
  "page, docstring, warning",
  [
    ("Fine.", "Fine.", None),
    ("[A page](missing.md)", "Fine.", "missing.md"),
    ("[Here](#missing)", "Fine.", "missing"),
    ("Fine.", "One argument.\n\n  Args:\n    y: not there.", "'y'"),
  ],
)
def test_a_warning_ends_the_build(build, tmp_path, page, docstring, warning):
  (tmp_path / "docs").mkdir()
  (tmp_path / "engram_jax").mkdir()
  for name in ("mkdocs.yml", "docs/docstring_blocks.py"):
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / "docs" / "index.md").write_text(page)
  text = f'"""All."""\n\n\ndef f(x: int):\n  """{docstring}"""\n'
  (tmp_path / "engram_jax" / "__init__.py").write_text(text)
  done = build(tmp_path, tmp_path / "site")
  assert (done.returncode == 0) == (warning is None), done.stderr
  assert warning is None or warning in done.stderr


def test_every_module_has_a_page(site):
  for module in modules():
    path = site.joinpath("api", *module.split("."))
    page = path / "index.html" if path.is_dir() else path.with_suffix(".html")
    assert f'id="{module}"' in page.read_text(encoding="utf-8")


def test_the_flat_public_names_are_on_one_page(site):
  page = site / "api" / "engram_jax" / "index.html"
  text = page.read_text(encoding="utf-8")
  missing = [n for n in engram_jax.__all__ if f"engram_jax.{n}" not in text]
  assert not missing


def test_pages_fetch_nothing_from_elsewhere(site):
  loads = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="?(https?:[^">]+)')
  found = {
    address
    for page in site.rglob("*.html")
    for address in loads.findall(page.read_text(encoding="utf-8"))
  }
  assert not found


def public_objects() -> Iterator:
  """Public modules, classes, functions and methods, as Griffe reads them."""
  griffe = pytest.importorskip("griffe", reason=DOCS)

  def members(parent):
    for member in parent.members.values():
      if member.is_alias or member.name.startswith("_"):
        continue
      if member.kind.value in ("module", "class", "function"):
        yield member
      if member.kind.value in ("module", "class"):
        yield from members(member)

  package = griffe.load("engram_jax", search_paths=[ROOT])
  yield package
  yield from members(package)


def test_every_public_name_has_a_docstring():
  objects = list(public_objects())
  found = [item.path for item in objects if not item.docstring]
  assert len(objects) > len(modules())
  assert found == []


def test_functions_document_their_arguments():
  found = []
  for item in public_objects():
    if item.kind.value != "function" or not item.docstring:
      continue
    names = {parameter.name for parameter in item.parameters} - {"self", "cls"}
    sections = item.docstring.parse("google", warnings=False)
    documented = {
      entry.name.lstrip("*")
      for section in sections
      if section.kind.value == "parameters"
      for entry in section.value
    }
    if len(names) > 1 and names - documented:
      found.append((item.path, sorted(names - documented)))
  assert found == []


def written_pages() -> list[Path]:
  pages = [ROOT / "README.md", ROOT / "BUILD_NOTES.md"]
  return pages + sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", written_pages(), ids=lambda path: path.name)
def test_links_and_named_files_exist(page):
  text = page.read_text(encoding="utf-8")
  targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)", text)
  files = re.findall(r"experiments/results/[\w/]+\.\w+", text)
  missing = [name for name in files if not (ROOT / name).exists()]
  for target in targets:
    name, _, anchor = target.partition("#")
    if name.startswith("api/"):  # made by the build, which checks the link
      continue
    path = page.parent / name
    if not path.exists() or (anchor and anchor not in anchors(path)):
      missing.append(target)
  assert not missing


def anchors(page: Path) -> set[str]:
  """What a link into a Markdown page may name."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
  kept = (re.sub(r"[^\w\s-]", "", text.lower()) for text in headings)
  return {re.sub(r"\s+", "-", text.strip()) for text in kept}


def test_build_notes_are_an_index_of_every_page():
  text = (ROOT / "BUILD_NOTES.md").read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 150
  pages = (ROOT / "docs").rglob("*.md")
  names = [path.relative_to(ROOT).as_posix() for path in pages]
  assert [name for name in names if f"({name}" not in text] == []


def test_indented_blocks_keep_their_lines():
  pytest.importorskip("griffe", reason=DOCS)
  path = ROOT / "docs" / "docstring_blocks.py"
  spec = importlib.util.spec_from_file_location("docstring_blocks", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  text = (
    "One line.\n\n  a = b\n    + c\n\n  d = e\nAnd these:\n  - x,\n  - y.\n\n"
    "Args:\n  a: of it.\n    More.\n"
  )
  assert module.fence_blocks(text) == (
    "One line.\n\n\n```text\na = b\n  + c\n\nd = e\n```\nAnd these:\n\n"
    "- x,\n- y.\n\nArgs:\n  a: of it.\n    More.\n"
  )
