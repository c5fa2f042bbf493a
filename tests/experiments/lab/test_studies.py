"""Every study as its program makes it, at smoke scale."""

import importlib
import json

import pytest

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
