"""The table of `docs/findings.md`, from the results that are committed.

  python -m experiments.lab.findings

Each study's line says what the paper found, what came out here, how sure that
is, how long it took and a verdict. The page's other words are written by hand.
"""

import json
import pathlib
from typing import Any

from experiments import cli
from experiments.lab.__main__ import STUDIES
from experiments.lab.study import RESULTS
from experiments.results import ROOT

PAGE = ROOT / "docs/findings.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

#: What the paper found, in a line.
PAPER = {
  "sparsity_allocation": "U-shaped in the share, best at 20 to 25 %, 0.014 "
  "nats better than experts alone",
  "memory_scaling": "linear in the logarithm of the rows, steeper than "
  "OverEncoding",
  "ablation": "keys per stream, compression and gate matter most, the "
  "convolution least; block 2 is the best place",
  "mechanism": "early blocks predict sooner; block 5 with a memory is like "
  "block 12 without; silenced, facts fall to 29 to 44 %, reading to 81 to 93 %",
  "knowledge": "factual recall gains most",
  "knowledge_editing": "not studied",
  "speculation": "not studied",
  "long_context": "at equal loss multi-query needles 84 to 97 %, tracking 77 "
  "to 87 %",
}
HEADER = """| Study | The paper | Here | Runs | Hours | Verdict |
| --- | --- | --- | --- | --- | --- |
"""


def read_results(folder: pathlib.Path = RESULTS) -> dict[str, dict[str, Any]]:
  """The committed results of cpu scale, by study."""
  paths = {name: folder / f"{name}.json" for name in STUDIES}
  return {
    name: json.loads(path.read_text())
    for name, path in paths.items()
    if path.exists()
  }


def table(results: dict[str, dict[str, Any]]) -> str:
  """The table in Markdown; a study without a result says so."""
  lines = []
  for name in STUDIES:
    link = f"[{name}](#{name})"
    if name not in results:
      lines.append(f"| {link} | {PAPER[name]} | not run yet | | | |")
      continue
    result = results[name]
    runs = result["runs"]
    count = f"{runs['finished']} of {runs['all']}"
    verdict = f"**{result['verdict']}**"
    cells = (
      link, PAPER[name], result["finding"], count, f"{runs['hours']:.1f}",
      verdict,
    )  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
  return HEADER + "\n".join(lines) + "\n"


def with_table(page: str, results: dict[str, dict[str, Any]]) -> str:
  """The page with its table made anew."""
  before, _, rest = page.partition(BEGIN)
  _, _, after = rest.partition(END)
  return before + BEGIN + table(results) + END + after


def main(argv) -> None:
  del argv
  PAGE.write_text(with_table(PAGE.read_text(), read_results()))
  print(table(read_results()))


if __name__ == "__main__":
  cli.run(main)
