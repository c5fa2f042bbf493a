"""What a model holds and costs: parameters, sparsity, operations, bytes.

  python -m experiments.count --preset=engram_27b
  python -m experiments.count --config=experiments/configs/tiny.py \
    --config.train.optimizer=muon --out=count.json

By formula: nothing is allocated, and no accelerator is needed.
"""

from absl import flags

from engram_jax import progress
from engram_jax.config_dicts import to_dict
from engram_jax.presets import preset
from experiments import cli
from experiments.configs.preset import chosen
from experiments.count_report import count, report
from experiments.results import require_place, write_result

_CONFIG = cli.define_config()
_PRESET = flags.DEFINE_string("preset", "", "Instead of --config.")
_OUT = flags.DEFINE_string("out", "", "Also write the figures to this JSON.")


def main(argv) -> None:
  del argv
  name = _PRESET.value
  if _OUT.value:
    require_place(_OUT.value)
  config = chosen(name, _CONFIG.value)
  with progress.waiting("counting", announce=False):
    found = count(config)
  print(report(found, config.train.seq_len))
  if name:
    about = preset(name)
    print(f"\nSource: {about.source}")
    print("".join(f"  - {item}\n" for item in about.assumptions), end="")
  if _OUT.value:
    write_result(_OUT.value, {"config": to_dict(config), **found})


if __name__ == "__main__":
  cli.run(main)
