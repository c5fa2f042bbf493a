"""Imports run one way, read off the sources, and a plain import is light."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "engram_jax"
# From below; a module imports from its own line's group, or from lines above.
LEVELS = (
  (
    "config",
    "config_dicts",
    "errors",
    "files",
    "identity",
    "norms",
    "parameters",
    "presets",
    "progress",
    "run_config",
    "types",
  ),
  ("sharding", "data"),
  ("memory", "stores"),
  ("fusion",),
  ("backbone",),
  ("training", "decoding"),
  ("attach", "analysis", "interop"),
)
LEVEL = {group: i for i, groups in enumerate(LEVELS) for group in groups}
# One level that is one circle of packages, though of no modules: a memory opens
# its stores, and stores are told whose rows they hold.
TOGETHER = {("memory", "stores"), ("stores", "memory")}
# What `import engram_jax` must not need: each is for one part of it only.
HEAVY = (
  "absl.app",
  "grain",
  "matplotlib",
  "ml_collections",
  "orbax",
  "safetensors",
  "tensorboardX",
  "tensorflow",
  "tensorflow_datasets",
  "tokenizers",
  "torch",
  "tqdm",
)


def sources():
  """Path of each module of the package, by its name."""
  found = {}
  for path in (ROOT / PACKAGE).rglob("*.py"):
    parts = path.relative_to(ROOT).with_suffix("").parts
    found[".".join(p for p in parts if p != "__init__")] = path
  return found


def imported_names(tree):
  """What the import statements name, wherever they stand."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name, modules):
  """The module of the package that a name is of; None for another's."""
  while name and name not in modules:
    name = name.rpartition(".")[0]
  return name or None


@functools.cache
def imports():
  """The modules of the package that each module of it imports."""
  modules = sources()
  found = {}
  for name, path in modules.items():
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = {module_of(x, modules) for x in imported_names(tree)}
    found[name] = targets - {None, name}
  return found


def group(module):
  """`memory` of `engram_jax.memory.hashing`; empty for the package itself."""
  return ".".join(module.split(".")[1:2])


def may_import(importer, imported):
  one, other = group(importer), group(imported)
  if one == other or (one, other) in TOGETHER or not one:
    return True
  if one not in LEVEL or other not in LEVEL:
    return False
  return LEVEL[other] < LEVEL[one] or LEVEL[one] == LEVEL[other] == 0


def test_every_module_has_its_level():
  groups = {group(module) for module in sources()} - {""}
  assert groups <= set(LEVEL)
  assert len(sources()) > 80 and sum(map(len, imports().values())) > 200


def test_imports_run_one_way():
  wrong = [
    f"{module} imports {target}"
    for module, targets in imports().items()
    for target in sorted(targets)
    if not may_import(module, target)
  ]
  assert not wrong


@pytest.mark.parametrize(
  "importer, imported, allowed",
  [
    ("memory.hashing", "types", True),
    ("memory.memory", "stores.store", True),
    ("stores.store", "memory.table", True),
    ("memory.memory", "fusion.engram", False),
    ("fusion.engram", "backbone.layers", False),
    ("config", "sharding", False),
    ("training.step", "decoding.decoders", False),
    ("decoding.decoders", "training.step", False),
    ("interop.modules", "analysis.gates", False),
    ("sharding", "new_module", False),
  ],
)
def test_the_rule_itself(importer, imported, allowed):
  names = f"{PACKAGE}.{importer}", f"{PACKAGE}.{imported}"
  assert may_import(*names) is allowed


def test_no_circles_between_modules():
  # Names from the package's own __init__.py would be a circle too.
  tuple(graphlib.TopologicalSorter(imports()).static_order())


def test_the_package_knows_of_nothing_around_it():
  wrong = []
  for module, path in sources().items():
    for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
      if name.split(".")[0] in ("experiments", "tests", "docs"):
        wrong.append(f"{module} imports {name}")
  assert not wrong


def test_import_is_light():
  program = (
    "import sys, engram_jax; "
    f"print([name for name in {HEAVY} if name in sys.modules])"
  )
  command = (sys.executable, "-c", program)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr
