"""JSON that any reader takes, and files that hold none."""

import json
import math

import pytest

from engram_jax.errors import InputError
from engram_jax.training.json_values import plain, read_object, to_text


def test_what_json_has_not_becomes_a_string():
  value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": True}}
  expected = {
    "a": ["NaN", ["Infinity", 1.5]],
    "b": {"c": "-Infinity", "d": True},
  }
  assert json.loads(to_text(value), parse_constant=pytest.fail) == expected
  assert plain(value) == expected


@pytest.mark.parametrize(
  "content", [b"", b'{"a": 1', b"[1]", b"null", b"\xff\xfe{", b"[" * 100_000]
)
def test_damaged_files_are_one_clear_line(tmp_path, content):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"^config\.json: .*; valid: an undam"):
    read_object(path, "config.json")


def test_what_is_no_file_is_one_clear_line(tmp_path):
  for path in (tmp_path, tmp_path / "none"):
    with pytest.raises(InputError, match=r"^config\.json: "):
      read_object(path, "config.json")
