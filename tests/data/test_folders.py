"""Tests of which files are text, and that nothing is missing without a word."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import tempfile

import pytest

from engram_jax.data.folders import expand, list_files, output_kind
from engram_jax.data.prepared import prepare
from engram_jax.data.sources import folder_source
from engram_jax.errors import InputError
from engram_jax.run_config import DataConfig


def names(root, glob="*", **options):
  listing = list_files(pathlib.Path(root), glob=glob, **options)
  return sorted(path for path, _, _ in listing.files), listing.left_out


@contextlib.contextmanager
def nobody(folder):
  """A user whom permissions stop; the superuser is not."""
  superuser = os.geteuid() == 0
  if superuser:
    for base, folders, files in os.walk(folder):
      for path in (base, *(os.path.join(base, x) for x in (*folders, *files))):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
  try:
    yield
  finally:
    if superuser:
      os.seteuid(0)


@pytest.fixture
def public():
  """A folder that every user reaches, unlike pytest's own."""
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o755)
  yield folder
  for base, folders, _ in os.walk(folder):
    for path in (base, *(os.path.join(base, name) for name in folders)):
      os.chmod(path, 0o700)
  shutil.rmtree(folder)


def run_folder(path):
  (path / "checkpoints" / "8").mkdir(parents=True)
  (path / "config.json").write_text("{}")
  (path / "sample.txt").write_text("once upon a time")


def run_that_has_only_begun(path):
  path.mkdir()
  config = {"model": {}, "data": {}, "train": {}, "mesh": {}}
  (path / "config.json").write_text(json.dumps(config))


def metrics_alone(path):
  path.mkdir()
  (path / "config.json").write_text("damaged")
  (path / "metrics.jsonl").write_text("{}")


def checkpoint(path):
  (path / "backbone").mkdir(parents=True)
  (path / "_CHECKPOINT_METADATA").write_text("{}")
  (path / "backbone" / "manifest.txt").write_text("text")


def unfinished_checkpoint(path):
  folder = path / "8.orbax-checkpoint-tmp-1"
  folder.mkdir(parents=True)
  (folder / "notes.txt").write_text("text")


def prepared_text(path):
  path.mkdir()
  for name in ("prepared.json", "tokenizer.json"):
    (path / name).write_text("{}")


def tfds_dataset(path):
  path.mkdir()
  for name in ("dataset_info.json", "features.json"):
    (path / name).write_text("{}")


@pytest.mark.parametrize(
  "write",
  (
    run_folder,
    run_that_has_only_begun,
    metrics_alone,
    checkpoint,
    unfinished_checkpoint,
    prepared_text,
    tfds_dataset,
  ),
)
@pytest.mark.parametrize("where", ("out", "deep/er/out"))
def test_outputs_are_no_input_wherever_they_lie(tmp_path, write, where):
  (tmp_path / "input.txt").write_text("text")
  (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
  write(tmp_path / where)
  found, left_out = names(tmp_path)
  assert found == ["input.txt"]
  (paths,) = left_out.values()
  assert [path.startswith(where) for path in paths] == [True]


def test_a_file_called_config_is_not_a_run(tmp_path):
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "config.json").write_text('{"model": "T"}')
  (tmp_path / "site" / "page.txt").write_text("text")
  assert names(tmp_path)[0] == ["site/config.json", "site/page.txt"]
  assert output_kind(tmp_path, ["config.json"]) == ""


def test_an_output_is_no_folder_of_text(tmp_path):
  run_folder(tmp_path / "run")
  with pytest.raises(InputError, match=r"^folder: .*/run; .* folder of a run$"):
    names(tmp_path / "run")


def test_results_and_redirected_output(tmp_path, capfd):
  (tmp_path / "input.json").write_text('{"text": "once"}')
  result = {"command": "python -m experiments.compare --out=x", "loss": 3.0}
  (tmp_path / "x.json").write_text(json.dumps(result, indent=2))
  (tmp_path / "log").write_text("")
  before = os.dup(2)
  try:
    with open(tmp_path / "log", "a") as log:
      os.dup2(log.fileno(), 2)
      found, left_out = names(tmp_path)
  finally:
    os.dup2(before, 2)
    os.close(before)
  assert found == ["input.json"]
  assert sorted(left_out.values()) == [["log"], ["x.json"]]


def test_links_lead_into_no_output(tmp_path):
  run_folder(tmp_path / "run")
  text, outside = tmp_path / "text", tmp_path / "outside.txt"
  text.mkdir()
  outside.write_text("text")
  (text / "sample.txt").symlink_to(tmp_path / "run" / "sample.txt")
  (text / "outside.txt").symlink_to(outside)
  (text / "run").symlink_to(tmp_path / "run")
  found, left_out = names(text)
  assert found == ["outside.txt"]
  assert sorted(left_out.values()) == [["run"], ["sample.txt"]]


def test_what_is_left_out_is_counted(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / ".b.txt").write_text("text")
  (tmp_path / ".git").mkdir()
  (tmp_path / "__pycache__").mkdir()
  (tmp_path / "broken.txt").symlink_to("nowhere")
  (tmp_path / "loop.txt").symlink_to("loop.txt")
  os.mkfifo(tmp_path / "fifo.txt")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(tmp_path / "socket.txt"))
  (tmp_path / "broken.md").symlink_to("nowhere")  # the glob does not ask for it
  found, left_out = names(tmp_path, glob="*.txt")
  assert found == ["a.txt"]
  assert {reason: sorted(paths) for reason, paths in left_out.items()} == {
    "hidden": [".b.txt", ".git"],
    "a broken link": ["broken.txt", "loop.txt"],
    "neither file nor folder": ["fifo.txt", "socket.txt"],
  }
  source = folder_source(str(tmp_path), glob="*.txt", validation_percent=5)
  assert "a broken link: broken.txt and 1 more" in source.left_out
  assert "\n" not in source.left_out


@pytest.mark.parametrize("mode", (0o000, 0o444, 0o111))
def test_a_closed_folder_is_one_line(public, mode):
  (public / "a.txt").write_text("text")
  closed = public / "closed"
  closed.mkdir()
  (closed / "b.txt").write_text("text")
  closed.chmod(mode)
  with nobody(public):
    with pytest.raises(InputError, match=r"^folder: .*/closed.*Permission de"):
      names(public, glob="*.txt")


def test_a_closed_file_is_one_line(public):
  for name in ("a.txt", "b.txt", "c.md"):
    (public / name).write_text("text")
    (public / name).chmod(0o000)
  (public / "d.rst").write_text("text")
  with nobody(public):
    with pytest.raises(InputError, match=r"a.txt .Permission.*, and 1 more"):
      names(public, glob="*.txt")
    # Not asked for: no one misses them.
    assert names(public, glob="*.rst")[0] == ["d.rst"]


def test_data_dir_of_another_user(public):
  """What is readable is used; what is not, or not writable, is one line."""
  text, data = public / "text", public / "data"
  text.mkdir()
  (text / "input.txt").write_text("one two three four\n" * 50)
  config = DataConfig(
    folder=str(text), glob="*.txt", data_dir=str(data), vocab_size=260
  )
  made = prepare(config)
  made.folder.chmod(0o555)
  data.chmod(0o555)
  with nobody(public):
    assert prepare(config).splits == made.splits
    other = dataclasses.replace(config, vocab_size=261)
    with pytest.raises(InputError, match=r"^data_dir: .*/data; .*written to"):
      prepare(other)
  for path in (made.folder, data):
    path.chmod(0o000)
    with nobody(public):
      with pytest.raises(InputError, match=r"^data_dir: .*Permission denied"):
        prepare(config)


def test_names_of_any_bytes(tmp_path, caplog):
  folder = tmp_path / os.fsdecode(b"caf\xe9 [1]*?%s\n" + b"x" * 200)
  folder.mkdir()
  name = os.fsdecode(b"\xff\n.txt")
  (folder / name).write_text("one two three four\n" * 50)
  (folder / os.fsdecode(b".\xfe.txt")).write_text("hidden")
  config = DataConfig(
    folder=str(folder), glob="*.txt", data_dir=str(tmp_path / "d [2]*%s")
  )
  prepared = prepare(config)
  assert prepared.splits["train"].tokens > 10
  assert "\\xfe" in caplog.text
  with pytest.raises(InputError, match=r"^data_dir: .*valid: a path in UTF-8"):
    prepare(DataConfig(data_dir=os.fsdecode(b"/tmp/caf\xe9")))


def test_paths_that_are_none(tmp_path):
  (tmp_path / "file").write_text("text")
  (tmp_path / "loop").symlink_to("loop")
  for path in ("file", "file/below", "loop", "none", "x" * 300):
    with pytest.raises(InputError, match=r"^folder: .*; valid: an existing f"):
      folder_source(str(tmp_path / path), glob="*", validation_percent=5)
  for path in ("a\0b", "~nobody-of-this-name/x"):
    with pytest.raises(InputError, match=r"^data_dir: .*; valid: a path"):
      expand("data_dir", path)


def test_a_file_larger_than_memory_is_one_line(tmp_path):
  with open(tmp_path / "sparse.txt", "wb") as file:
    file.truncate(1 << 43)
  source = folder_source(str(tmp_path), glob="*.txt", validation_percent=5)
  with pytest.raises(InputError, match=r"sparse.txt; .* memory.*8796093022208"):
    list(source.documents())
