"""All studies of the laboratory, one after the other.

  python -m experiments.lab --scale=smoke
  python -m experiments.lab --scale=cpu --workers=2

Each worker is a process with one thread for its products, which gets more out
of two cores than one process with two. The workers share the runs of a study;
a second call goes on where the first one stopped.
"""

import os
import subprocess
import sys

from absl import flags

from engram_jax.errors import require
from engram_jax.training.stopping import StoppedError
from experiments import cli
from experiments.lab.scales import SCALES

#: In the order in which they are made; each is a module of this package.
STUDIES = (
  "sparsity_allocation",
  "memory_scaling",
  "ablation",
  "mechanism",
  "knowledge",
  "knowledge_editing",
  "speculation",
  "long_context",
)


def worker_environment() -> dict[str, str]:
  """This process's, with one thread for products, and huge pages on Linux.

  The allocator reads its tunables before a process begins.
  """
  flag = "--xla_cpu_multi_thread_eigen=false"
  given = os.environ.get("XLA_FLAGS", "")
  found = {**os.environ, "XLA_FLAGS": f"{given} {flag}".strip()}
  if sys.platform == "linux":
    found.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  return found


def main(argv) -> None:
  del argv
  valid = f"one or more of {', '.join(STUDIES)}"
  for name in _STUDIES.value:
    require(name in STUDIES, "studies", name, valid)
  require(_WORKERS.value > 0, "workers", _WORKERS.value, "a number above 0")
  failed = []
  for name in _STUDIES.value:
    command = [sys.executable, "-m", f"experiments.lab.{name}"]
    command += [f"--scale={_SCALE.value}"]
    command += [f"--folder={_FOLDER.value}"] if _FOLDER.value else []
    workers = [
      subprocess.Popen(command, env=worker_environment())
      for _ in range(_WORKERS.value)
    ]
    try:
      statuses = [worker.wait() for worker in workers]
    except BaseException:
      for worker in workers:
        worker.terminate()
      for worker in workers:
        worker.wait()
      raise
    if any(statuses):
      failed.append(name)
  if failed:
    raise StoppedError(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
  _SCALE = flags.DEFINE_enum("scale", "smoke", [*SCALES], "Size of the runs.")
  _FOLDER = flags.DEFINE_string("folder", None, "See `study.py`.")
  _WORKERS = flags.DEFINE_integer("workers", 1, "Processes side by side.")
  _STUDIES = flags.DEFINE_list("studies", list(STUDIES), "Those to be made.")
  cli.run(main)
