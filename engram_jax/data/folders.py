"""Which files of a folder are text, and what is left out of it, and why.

What a program of this library writes is no text to train on, wherever inside
the folder it lies: a run would otherwise read its own checkpoints, and find
other text at each start. It is recognised by what it holds:

  a run           config.json, and checkpoints/, metrics.jsonl or a run's config
  a checkpoint    the files by which Orbax marks one
  prepared text   prepared.json and tokenizer.json
  a TFDS dataset  dataset_info.json and features.json
  a result        a JSON file that begins with the command that made it

and so is the file that the program's own output goes to.

Nothing else is missing without a word: what cannot be read is refused, and what
is left out is counted.
"""

import dataclasses
import errno
import json
import os
import pathlib
import stat
from collections.abc import Collection, Iterable

from engram_jax.errors import InputError, require

#: Never text: Python's bytecode, and what a file system finds after a crash.
NEVER_TEXT = ("__pycache__", "lost+found")

_ORBAX = {
  "_CHECKPOINT_METADATA",
  "_METADATA",
  "commit_success.txt",
  "manifest.ocdbt",
}
_RESULT = b'{\n  "command": "python -m experiments.'
_VANISHED = (errno.ENOENT, errno.ENOTDIR)


@dataclasses.dataclass
class Listing:
  """What was found under a folder.

  Attributes:
    files: path relative to the folder, size in bytes and time of the last
      change in nanoseconds of each text file; in no order.
    left_out: paths of what was left out, by the reason in words.
  """

  files: list[tuple[str, int, int]]
  left_out: dict[str, list[str]]

  def describe(self) -> str:
    """What was left out, in one line; empty if nothing was."""
    parts = []
    for reason, paths in sorted(self.left_out.items()):
      first = printable(min(paths))
      first = first if len(first) <= 60 else f"...{first[-57:]}"
      more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
      parts.append(f"{reason}: {first}{more}")
    return "; ".join(" ".join(part.split()) for part in parts)


def printable(path: str) -> str:
  """A path that can be printed and stored; a file's name need not be UTF-8."""
  return os.fsencode(path).decode("utf-8", "backslashreplace")


def expand(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path, which may begin with `~`.

  Args:
    field: name of the field or flag that gave the path.
    path: the path as it was given.

  Raises:
    InputError: no such home, or what no path can hold; `field` is blamed.
  """
  require("\0" not in os.fspath(path), field, repr(path), "a path without NUL")
  try:
    return pathlib.Path(path).expanduser().absolute()
  except RuntimeError as error:
    valid = f"a path that can be looked up ({error})"
    raise InputError(field, path, valid) from None
  except FileNotFoundError:
    valid = "an absolute path: the current folder is no longer there"
    raise InputError(field, path, valid) from None


def output_kind(folder: str | os.PathLike[str], names: Collection[str]) -> str:
  """Which output of this library a folder is; empty if it is none.

  Args:
    folder: its path.
    names: names of the files and folders in it.
  """
  if "config.json" in names and (
    "checkpoints" in names
    or "metrics.jsonl" in names
    or _is_config_of_a_run(os.path.join(folder, "config.json"))
  ):
    return "the folder of a run"
  unfinished = ".orbax-checkpoint-tmp" in os.path.basename(folder)
  if unfinished or not _ORBAX.isdisjoint(names):
    return "a checkpoint"
  if "prepared.json" in names and "tokenizer.json" in names:
    return "prepared text"
  if "dataset_info.json" in names and "features.json" in names:
    return "a TFDS dataset"
  return ""


def list_files(
  root: pathlib.Path,
  *,
  glob: str,
  never: Collection[str] = NEVER_TEXT,
  exclude: Iterable[pathlib.Path] = (),
) -> Listing:
  """The text files under `root`, at any depth.

  Args:
    root: a folder, resolved.
    glob: pattern for the end of a path.
    never: names of folders that hold no text.
    exclude: further folders that are outputs, such as the run's own.

  Raises:
    InputError: `root` is itself an output, or something under it cannot be
      read.
  """
  excluded = {os.path.realpath(path) for path in exclude}
  own_output = _files_of_own_output()
  found, unreadable = Listing([], {}), []
  known: dict[str, str] = {}  # kinds of the folders that links lead into

  def leave_out(reason: str, path: str) -> None:
    relative = os.path.relpath(path, root)
    found.left_out.setdefault(reason, []).append(relative)

  for base, folders, files in os.walk(root, onerror=unreadable.append):
    if base != os.fspath(root) and base in excluded:
      leave_out("the program's own folder", base)
      folders.clear()
      continue
    kind = output_kind(base, {*folders, *files})
    if kind:
      valid = f"a folder of text: this is {kind}"
      require(base != os.fspath(root), "folder", printable(base), valid)
      leave_out(kind, base)
      folders.clear()
      continue
    for name in list(folders):
      path = os.path.join(base, name)
      hidden, linked = name.startswith("."), os.path.islink(path)
      if name in never or hidden or linked:
        folders.remove(name)
      if name not in never and hidden:
        leave_out("hidden", path)
      elif name not in never and linked:
        leave_out("a link to a folder", path)
    for name in files:
      path = os.path.join(base, name)
      relative = os.path.relpath(path, root)
      if not pathlib.PurePosixPath(relative).match(glob):
        continue
      if name.startswith("."):
        leave_out("hidden", path)
        continue
      try:
        status = os.stat(path)
      except OSError as error:
        if os.path.islink(path) and error.errno != errno.EACCES:
          leave_out("a broken link", path)
        elif error.errno not in _VANISHED:
          unreadable.append(error)
        continue
      reason = _not_text(path, status, own_output, excluded, known, root)
      if reason:
        leave_out(reason, path)
      elif not _readable(path):
        unreadable.append(PermissionError(errno.EACCES, "no access", path))
      else:
        found.files.append((relative, status.st_size, status.st_mtime_ns))
  if unreadable:
    first = min(unreadable, key=lambda error: os.fsdecode(error.filename))
    where = printable(os.fsdecode(first.filename))
    reason = os.strerror(first.errno)
    more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
    valid = "text that can be read, or a folder without it: nothing is left out"
    raise InputError("folder", f"{where} ({reason}{more})", valid)
  return found


def _not_text(
  path: str,
  status: os.stat_result,
  own_output: set[tuple[int, int]],
  excluded: set[str],
  known: dict[str, str],
  root: pathlib.Path,
) -> str:
  """Why a file is left out; empty if it is text."""
  if not stat.S_ISREG(status.st_mode):
    return "neither file nor folder"
  if (status.st_dev, status.st_ino) in own_output:
    return "where the program's own output goes"
  if os.path.islink(path):
    real = pathlib.Path(os.path.realpath(path))
    for parent in real.parents:
      # What holds the text itself is no output, whatever lies beside it.
      if parent == root or parent in root.parents:
        break
      where = os.fspath(parent)
      if where not in known:
        try:
          known[where] = output_kind(where, set(os.listdir(where)))
        except OSError:
          known[where] = ""
      if where in excluded or known[where]:
        return "a link into what a program wrote"
  if path.endswith(".json"):
    try:
      with open(path, "rb") as file:
        if file.read(len(_RESULT)) == _RESULT:
          return "a result"
    except OSError:
      return ""  # found to be unreadable by the caller
  return ""


def _readable(path: str) -> bool:
  # By the user that opens it, who need not be the one that began the process.
  effective = os.access in os.supports_effective_ids
  return os.access(path, os.R_OK, effective_ids=effective)


def _files_of_own_output() -> set[tuple[int, int]]:
  """Device and inode of the files behind standard output and error."""
  found = set()
  for descriptor in (1, 2):
    try:
      status = os.fstat(descriptor)
    except OSError:  # closed
      continue
    if stat.S_ISREG(status.st_mode):
      found.add((status.st_dev, status.st_ino))
  return found


def _is_config_of_a_run(path: str) -> bool:
  """Whether a file is the config of a run that has not begun to save."""
  try:
    with open(path, encoding="utf-8") as file:
      found = json.loads(file.read(1 << 20))
  except (OSError, ValueError, RecursionError):
    return False
  groups = ("model", "data", "train")
  return isinstance(found, dict) and all(
    isinstance(found.get(group), dict) for group in groups
  )
