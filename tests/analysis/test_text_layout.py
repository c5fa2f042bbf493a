"""Tests of the layout of tokens as text."""

import pytest

from engram_jax.analysis.text_layout import Box, layout_tokens
from engram_jax.errors import InputError


def test_tokens_stand_where_an_editor_would_put_them():
  layout = layout_tokens(["def", " f", "():", "\n    ", "return", " 1", "\n"])
  assert layout.boxes == (
    Box(0, 0, 0, "def"),
    Box(1, 0, 3, " f"),
    Box(2, 0, 5, "():"),
    Box(3, 0, 8, "\u21b5"),
    Box(3, 1, 0, "    "),
    Box(4, 1, 4, "return"),
    Box(5, 1, 10, " 1"),
    Box(6, 1, 12, "\u21b5"),
  )
  assert layout.numbers == (1, 2)
  assert layout.columns == 13


def test_newlines_of_one_token_have_a_box_each_and_blank_lines_count():
  layout = layout_tokens(["a\n\n\n", "b"])
  assert layout.boxes == (
    Box(0, 0, 0, "a\u21b5"),
    Box(0, 1, 0, "\u21b5"),
    Box(0, 2, 0, "\u21b5"),
    Box(1, 3, 0, "b"),
  )
  assert layout.numbers == (1, 2, 3, 4)


def test_a_tab_reaches_to_the_next_stop():
  layout = layout_tokens(["\t", "a", "\tb\t"], tab_size=4)
  assert layout.boxes == (
    Box(0, 0, 0, "    "),
    Box(1, 0, 4, "a"),
    Box(2, 0, 5, "   b   "),
  )


def test_a_long_line_is_continued_without_a_number():
  layout = layout_tokens(["abc", "defg", "\n", "h"], max_columns=5)
  assert layout.boxes == (
    Box(0, 0, 0, "abc"),
    Box(1, 0, 3, "de"),
    Box(1, 1, 0, "fg"),
    Box(2, 1, 2, "\u21b5"),
    Box(3, 2, 0, "h"),
  )
  assert layout.numbers == (1, None, 2)


def test_the_newline_of_a_full_line_hangs_over():
  layout = layout_tokens(["abcd\n", "e"], max_columns=4)
  assert layout.boxes == (Box(0, 0, 0, "abcd\u21b5"), Box(1, 1, 0, "e"))
  assert layout.columns == 5


def test_a_tab_at_the_end_of_a_page_is_continued_whole():
  layout = layout_tokens(["abcd", "\t", "e"], max_columns=6, tab_size=4)
  assert layout.boxes == (
    Box(0, 0, 0, "abcd"),
    Box(1, 1, 0, "    "),
    Box(2, 1, 4, "e"),
  )


@pytest.mark.parametrize("tokens", [[], [""], ["", ""]])
def test_no_text_gives_an_empty_page(tokens):
  assert layout_tokens(tokens) == ((), (), 0)


def test_an_empty_token_has_no_box_and_keeps_the_count():
  layout = layout_tokens(["a", "", "b"])
  assert [box.token for box in layout.boxes] == [0, 2]


def test_any_split_of_a_text_covers_the_same_cells():
  text = "if x:\n\t\ty = '漢字' * 3  # wide\r\n\n" + "z" * 30 + "\n  end"

  def cells(tokens):
    return [
      (box.line, box.column + i, character)
      for box in layout_tokens(tokens, max_columns=12).boxes
      for i, character in enumerate(box.text)
    ]

  whole = cells([text])
  assert len(set(whole)) == len(whole)  # no two characters in one place
  for size in (1, 2, 3, 7):
    tokens = [text[i : i + size] for i in range(0, len(text), size)]
    assert cells(tokens) == whole


@pytest.mark.parametrize("options", [{"tab_size": 0}, {"max_columns": 3}])
def test_bad_sizes_are_refused(options):
  with pytest.raises(InputError, match=next(iter(options))):
    layout_tokens(["a"], **options)
