"""Every study as its program makes it, at smoke scale."""

import importlib
import json

import pytest

from experiments.lab import knowledge, knowledge_editing
from experiments.lab.__main__ import STUDIES, worker_environment
from experiments.lab.study import VERDICTS


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_its_result_and_its_picture(name, lab, capsys):
  study = importlib.import_module(f"experiments.lab.{name}").STUDY
  assert study.name == name
  out = lab.folder / f"{name}.json"
  study.make(lab, out)
  result = json.loads(out.read_text())
  assert result["verdict"] in VERDICTS and result["finding"]
  assert result["runs"]["finished"] == result["runs"]["all"]
  assert result["runs"]["diverged"] == []
  assert out.with_suffix(".png").stat().st_size > 10_000
  assert result["verdict"] in capsys.readouterr().out
  # Nothing is made twice: the result of what is there is the same.
  study.make(lab, out, report_only=True)
  again = json.loads(out.read_text())
  assert {**again, "environment": 0} == {**result, "environment": 0}


def test_workers_have_one_thread_for_their_products(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--one")
  flags = worker_environment()["XLA_FLAGS"]
  assert flags == "--one --xla_cpu_multi_thread_eigen=false"


def test_knowledge_compares_equal_parameters(lab):
  result = knowledge.STUDY.make(lab, lab.folder / "knowledge.json")
  groups = {point["group"] for point in result["points"]}
  assert groups == {"experts", "memory", "one row"}
  for point in result["points"]:
    assert {"other wordings", "two hops, composed"} <= set(point["accuracy"])
    assert set(point["by_frequency"]) == {"2", "8"}
  assert set(result["gain_over_experts"]) == {"memory", "one row"}
  totals = {r["group"]: r["parameters"]["total"] for r in result["records"]}
  assert max(totals.values()) < 1.02 * min(totals.values()), totals


def test_a_memory_is_edited_swapped_and_grown(lab):
  out = lab.folder / "knowledge_editing.json"
  result = knowledge_editing.STUDY.make(lab, out)
  methods = result["edits"]["methods"]
  assert set(methods) == {
    "before", "rows of the names", "all rows read", "LoRA"
  }  # fmt: skip
  numbers = {n: m["trained_numbers"]["mean"] for n, m in methods.items()}
  assert numbers["before"] == 0
  assert 0 < numbers["rows of the names"] < numbers["all rows read"]
  assert methods["before"]["divergence"]["mean"] < 1e-6
  assert methods["LoRA"]["divergence"]["mean"] > 1e-6
  assert set(result["swap"]) == {"before", "taught A", "taught B"}
  for name, grown in result["growth"].items():
    if name != "before":
      assert grown["largest_change_by_growth"]["mean"] < 1e-4, name
