"""Generation from a row file that is larger than the machine's memory.

  python -m experiments.benchmarks.larger_than_memory --file=rows.bin

A model with a memory of --gib in a row file on disk (made first if it is not
there: as long as the disk takes to write it), reading text: prompts from
different places of a corpus, each continued with its own next tokens, so that
the n-grams are those of real text and the same in every case. Per size of the
row cache on the device, and always with prefetch:

  cold    nothing of the file in the page cache at the start
  warm    the same tokens again, from a row cache that starts empty, of
          a file whose pages for these tokens are in the page cache

Before the tokens that are timed the model reads --before others, which fill
the row cache. The scale is the same model with small tables on the
device: what a step costs without any fetch; the median of as many runs, each
beside one of the others.
"""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.analysis.accounting import counting_hash
from engram_jax.config import ModelConfig
from engram_jax.data.pipeline import windows
from engram_jax.data.prepared import prepare
from engram_jax.decoding.decoders import Decoder
from engram_jax.errors import require
from engram_jax.memory.memory import Memory
from engram_jax.stores.host_stores import FileStore
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_cache import CachedStore
from engram_jax.stores.row_files import RowFile
from experiments.benchmarks import fixtures, harness
from experiments.benchmarks.models import preset_with_memory, random_model
from experiments.configs.preset import experiment_of

#: Rows of a head in the resident tables, which are the scale.
FEW = 4096
RUNS = ("cold", "warm")
FLAGS = {
  "file": (None, "The row file; made if it is not there."),
  "keep": (False, "Do not remove a file that was made."),
  "preset": ("small", "Of engram_jax/presets.py."),
  "gib": (40.0, "Of packed rows."),
  "row_format": ("fp8", "Of the packed rows."),
  "width": (256, "Numbers of a row."),
  "batch": (8, "Sequences at a time."),
  "prompt": (64, "Tokens read at once at the start."),
  "before": (192, "Tokens read one by one, not timed."),
  "tokens": (128, "Tokens read one by one, timed."),
  "caches_mib": ([0.0, 4.0, 16.0, 64.0, 256.0], "Row caches; 0 for none."),
}


def read_text(preset: str, batch: int, length: int) -> np.ndarray:
  """int32 [B, L], tokens from different places of the preset's corpus."""
  prepared = prepare(experiment_of(preset).data)
  text = windows(prepared, "train", seq_len=length)
  valid = f"at most {text.windows}, as there are {text.tokens} tokens"
  require(text.windows >= batch, "batch", batch, valid)
  stride = (text.tokens - length) // batch
  return np.stack(
    [text.read(i * stride, i * stride + length) for i in range(batch)]
  )


def timed(
  decoder: Decoder,
  text: np.ndarray,
  *,
  prompt: int,
  before: int,
  at_mark: Callable[[], None] = lambda: None,
) -> float:
  """Reads a text, int32 [B, L]: a prompt, and then token by token.

  Returns:
    Tokens/s of those that are timed; `at_mark` is called before the first.
  """
  batch, length = text.shape
  lengths = jnp.full(batch, prompt, jnp.int32)
  state = decoder.init_state(batch, length)
  logits, state = decoder.start(state, jnp.asarray(text[:, :prompt]), lengths)()
  for i in range(prompt, length):
    # As if the token came of these.
    jax.block_until_ready(logits)
    if i == prompt + before:
      at_mark()
      start = time.perf_counter()
    logits, state = decoder.start(state, text[:, i])()
  jax.block_until_ready(logits)
  count = batch * (length - prompt - before)
  return count / (time.perf_counter() - start)


def compare(
  model: ModelConfig,
  path: pathlib.Path,
  text: np.ndarray,
  *,
  caches_mib: Sequence[float],
  prompt: int,
  before: int,
  few: int = FEW,
) -> harness.Figures:
  """Throughput against the size of the cache.

  Args:
    model: a model with a memory of the file's rows.
    path: path of the row file.
    text: int32 [B, L]; the others as the flags.
    few: rows of a head of the resident tables.
  """
  weights, parts = random_model(model), dict(prompt=prompt, before=before)
  memory, small = (
    Memory.create(of.engram, vocab_size=of.vocab_size)
    for of in (model, fixtures.with_rows(model, few))
  )
  hashing = memory.hashing
  row_format = RowFile(path, hashing=hashing).header.row_format
  tables = fixtures.make_rows(small.num_rows, row_format)
  tables = fixtures.to_tables(tables, row_format)
  resident = Decoder(weights, small, TableStore(tables))
  timed(resident, text, **parts)  # compiles
  count = text[:, prompt + before :].size
  points, scales = [], []

  def run(mib: float, *, cold: bool) -> harness.Figures:
    store = FileStore(RowFile(path, hashing=hashing))
    cache = mib and CachedStore(store, capacity_bytes=int(mib * harness.MIB))
    marks = []

    def counts() -> np.ndarray:
      layers = cache.by_layer.values() if cache else ()
      hits = sum(layer.hits for layer in layers)
      misses = sum(layer.misses for layer in layers)
      return np.array([store.statistics.rows_read, hits, misses])

    def at_mark():
      if cold:
        fixtures.forget_pages(store)
      marks.append(counts())

    with Decoder(weights, memory, cache or store) as decoder:
      speed = timed(decoder, text, at_mark=at_mark, **parts)
    read, hits, misses = (counts() - marks[0]).tolist()
    found = {"tokens_per_s": speed, "rows_read_per_token": read / count}
    if cache:
      found["hit_rate"] = hits / max(1, hits + misses)
    return found

  for mib in caches_mib:
    run(mib, cold=False)  # compiles all programs of this size
    point = {"cache_mib": mib}
    for name in RUNS:
      point[name] = run(mib, cold=name == "cold")
      scales.append(timed(resident, text, **parts))
    points.append(point)
  scale = statistics.median(scales)
  for point in points:
    for name in RUNS:
      point[name]["of_resident"] = point[name]["tokens_per_s"] / scale
  return {"resident_tokens_per_s": sorted(scales), "caches": points}


def measure(
  *,
  file: str,
  keep: bool,
  preset: str,
  gib: float,
  row_format: str,
  width: int,
  batch: int,
  tokens: int,
  **parts,
) -> harness.Figures:
  """The file, the text, and `compare`; arguments as the flags."""
  require(parts["caches_mib"], "caches_mib", "none", "one or more sizes")
  require(tokens >= 1, "tokens", tokens, "an integer >= 1")
  rows, path = RowFormat(row_format, width), pathlib.Path(file)
  model = preset_with_memory(preset).model
  model = fixtures.with_memory_of(model, gib, rows)
  text = read_text(preset, batch, parts["prompt"] + parts["before"] + tokens)
  own, start = not path.exists(), time.perf_counter()
  opened = fixtures.make_row_file(path, counting_hash(model), rows)
  size, spent = opened.header.file_bytes, time.perf_counter() - start
  del opened  # who maps it keeps its pages
  try:
    result = compare(model, path, text, **parts)
  finally:
    if own and not keep:
      path.unlink()
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return {
    "file_gib": size / harness.GIB,
    "machine_gib": memory / harness.GIB,
    "write_s": spent if own else None,
    "peak_gib": harness.peak_memory() / harness.GIB,
    **harness.resident_memory(),
    **result,
  }


def tables(result: harness.Figures) -> list[str]:
  about = {
    "file, GiB": "file_gib",
    "machine, GiB": "machine_gib",
    "process, MiB": "anonymous_mib",
    "and of files, MiB": "mapped_mib",
    "small table, tokens/s": lambda r: statistics.median(
      r["resident_tokens_per_s"]
    ),
  }
  columns = {
    "cache, MiB": "cache_mib",
    "hit rate": "warm.hit_rate",
    "rows read/token": "warm.rows_read_per_token",
  }
  for name in RUNS:
    columns[f"{name} tokens/s"] = f"{name}.tokens_per_s"
    columns[f"{name} of resident"] = f"{name}.of_resident"
  return [
    harness.table(about, [result]),
    harness.table(columns, result["caches"]),
  ]


PICTURE = harness.Picture(
  "caches",
  x="cache_mib",
  lines={name: f"{name}.of_resident" for name in RUNS},
  title="Rows in a file larger than memory",
  xlabel="row cache on the device (MiB)",
  ylabel="throughput (% of resident)",
  log_x=True,
)
BENCHMARK = harness.Benchmark(
  measure, tables, FLAGS, picture=PICTURE, required=("file",)
)

if __name__ == "__main__":
  harness.run(BENCHMARK)
