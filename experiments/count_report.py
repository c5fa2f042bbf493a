"""The figures of `count`, and how they are printed."""

from typing import Any

from engram_jax.analysis.accounting import (
  PARTS,
  count_parameters_by_part,
  counting_hash,
  sparsity,
)
from engram_jax.analysis.costs import PRODUCTS, bytes_of, flops_per_token
from engram_jax.run_config import ExperimentConfig
from experiments import cli


def count(config: ExperimentConfig) -> dict[str, Any]:
  """All figures of one config, by group."""
  model, train = config.model, config.train
  hashing = counting_hash(model)
  return {
    "parameters": count_parameters_by_part(model, hashing),
    "sparsity": sparsity(model, hashing),
    "flops_per_token": flops_per_token(model, train.seq_len),
    "bytes": bytes_of(model, hashing, train),
  }


def report(found: dict[str, Any], seq_len: int) -> str:
  """The figures as tables for the terminal; parts that are 0 are left out."""
  rows = list(found["parameters"].items())
  rows = [(name, f"{n:,}") for name, n in rows if n or name not in PARTS]
  tables = [cli.table(rows, "Parameters")]

  sparse = found["sparsity"]
  rows = [
    ("P_tot, without vocabulary", f"{sparse['total']:,}"),
    ("  with one vocabulary matrix", f"{sparse['total_with_vocabulary']:,}"),
    ("P_act, without vocabulary", f"{sparse['activated']:,}"),
    ("P_sparse", f"{sparse['sparse']:,}"),
    ("rho, share of the experts", f"{sparse['rho']:.2%}"),
    ("1 - rho, share of the memory", f"{sparse['memory_share']:.2%}"),
  ]
  tables.append(cli.table(rows, "Sparsity"))

  rows = [
    (name, f"{n / 1e6:,.3f}")
    for name, n in found["flops_per_token"].items()
    if n or name not in PRODUCTS
  ]
  title = f"MFLOP per token, {seq_len:,} tokens a sequence"
  tables.append(cli.table(rows, title))

  rows = [(name, f"{n / 1e9:,.3f}") for name, n in found["bytes"].items()]
  tables.append(cli.table(rows, "GB over all devices, without activations"))
  return "\n\n".join(tables)
