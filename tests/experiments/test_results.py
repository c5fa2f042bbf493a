"""A result that cannot be written is refused before the work begins."""

import pytest

from engram_jax.errors import InputError
from experiments.results import require_place


def test_missing_folders_are_made(tmp_path):
  path = tmp_path / "a" / "b" / "x.json"
  assert require_place(path) == path
  assert path.parent.is_dir() and not path.exists()


def test_places_that_cannot_be_are_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for path, match in (
    (tmp_path, "^out: .*; valid: a file: this is a folder"),
    (tmp_path / "file" / "x.json", "^out: .*; valid: a file in a folder"),
    ("nul\0/x.json", "^out: .*; valid: a file in a folder"),
    (tmp_path / ("n" * 300) / "x", "^out: .*; valid: a file in a folder"),
  ):
    with pytest.raises(InputError, match=match) as error:
      require_place(path)
    assert "\n" not in str(error.value)
  with pytest.raises(InputError, match=r"^output: "):
    require_place(tmp_path, "output")


@pytest.mark.parametrize(
  "arguments",
  [
    ["count", "--preset=small", "--out="],
    ["pack_memory", "--workdir=nowhere", "--output="],
  ],
)
def test_the_programs_refuse_them_first(program, tmp_path, arguments):
  (tmp_path / "file").write_text("")
  *given, last = arguments
  done = program(*given, f"{last}{tmp_path}/file/x", configured=False)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: out") and "Trace" not in done.stderr
