"""The page of findings says what the committed results say."""

from experiments.lab import findings
from experiments.lab.__main__ import STUDIES


def test_the_page_has_the_table_of_the_results():
  page = findings.PAGE.read_text()
  assert findings.with_table(page, findings.read_results()) == page
  for name in STUDIES:
    assert f"experiments.lab.{name} --scale=cpu" in page


def test_a_study_without_a_result_says_so():
  result = {
    "verdict": "not seen",
    "finding": "Nothing.",
    "runs": {"finished": 3, "all": 4, "hours": 0.26},
  }
  table = findings.table({"ablation": result})
  assert "| Nothing. | 3 of 4 | 0.3 | **not seen** |" in table
  assert table.count("not run yet") == len(STUDIES) - 1
