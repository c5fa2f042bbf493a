"""What a cache of memory rows would hit, on real text with the real V4.1 hash.

  python -m experiments.cache_study
  python -m experiments.cache_study --folder=docs --glob=*.md,*.txt

The tables are not needed: which rows a text reads follows from its tokens.
Layers, orders, heads, primes and multipliers are those of `v41_memory`, tokens
those of DeepSeek-V4. A row has 264 bytes; a token reads 48, 24 in each layer.

Corpora: `code`, the sources of the Python standard library; `prose`, the
READMEs of the installed packages; `folder`, any other. Equal documents count
once. Documents come in an order that has nothing to do with their content; the
first half of the tokens fills a cache (or chooses the hot rows), and hits are
counted over the second half.

The 8 heads of an order are accessed together, each in its own range, so that
but for collisions a cache of 8 C rows hits in all of them when one of C rows
does in the first. So only first heads are followed, and a cache's size is in
entries of 8 rows; the difference to all 24 columns is measured on the first
`CHECKED` tokens of every half.
"""

import bisect
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from engram_jax import progress
from engram_jax.analysis import collisions
from engram_jax.analysis.plots import plot_lines
from engram_jax.errors import InputError, require
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import RowFormat
from engram_jax.training.runs import make_memory
from experiments import cli
from experiments.benchmarks.harness import aligned
from experiments.configs.preset import experiment_of
from experiments.corpora import CORPORA, load_tokenizer, read_corpus, tokenize
from experiments.results import ROOT, require_place, write_result

BATCHES = (1, 32, 512, 4096, 32768)
#: Entries of a cache, each the 8 rows of one n-gram in one layer.
SIZES = tuple(2**k for k in range(8, 23))
CHECKED = 20_000


def chosen(named: Sequence[str], folder: str) -> list[str]:
  """The corpora to study: those named, and `folder` if there is one.

  Raises:
    InputError: none, or an unknown one.
  """
  names = [*named, *(["folder"] if folder else [])]
  known = all(name in CORPORA for name in named)
  valid = "code, prose or both, or none with --folder"
  require(known and names, "corpora", ",".join(named) or "none", valid)
  return names


# --- figures of a corpus ---


class Text:
  """A corpus in canonical ids, and its accesses to the tables.

  Attributes:
    name: name of the corpus.
    about: its size and digest.
    ngrams: int64 [n, N - 1], from `ngram_ids`.
    rows: per layer int32 [n, K].
    half: the first token that is counted: that of a document.
    orders: places int64 [n], in the order of access: `text`, one document after
      another, and `decode`, in a batch of documents, each half by itself.
  """

  def __init__(
    self,
    name: str,
    documents: Sequence[np.ndarray],
    about: dict[str, Any],
    hashing: NgramHash,
    slots: int,
  ):
    """Hashes the canonical ids of each document."""
    self.name, self.about = name, about
    lengths = [len(ids) for ids in documents]
    begins = np.cumsum([0, *lengths[:-1]])
    split = int(np.argmin(np.abs(begins[1:] - sum(lengths) / 2))) + 1
    self.half = int(begins[split])
    starts = np.zeros(sum(lengths), bool)
    starts[begins] = True
    self.ngrams = collisions.ngram_ids(
      np.concatenate(documents),
      starts,
      max_order=hashing.max_order,
      pad_id=hashing.pad_id,
    )
    # V4.1's tables have fewer than 2**31 rows.
    self.rows = {
      layer: np.concatenate(
        [
          hashing.row_ids_numpy(ids[None], layer)[0].astype(np.int32)
          for ids in documents
        ]
      )
      for layer in hashing.layers
    }
    order = [
      collisions.decode_order(part, slots)
      for part in (lengths[:split], lengths[split:])
    ]
    self.orders = {
      "text": np.arange(sum(lengths)),
      "decode": np.concatenate([order[0], order[1] + self.half]),
    }

  def first_heads(self, layer: int, heads: int) -> np.ndarray:
    """int32 [n, N - 1]: the rows of every order's first head."""
    return self.rows[layer][:, ::heads]


def describe(text: Text, heads: int) -> list[dict[str, Any]]:
  """Per order: distinct n-grams and rows, collisions, the Zipf exponent."""
  records = []
  for i, ngrams in enumerate(text.ngrams.T):
    columns = slice(i * heads, (i + 1) * heads)
    found = {
      layer: collisions.count_collisions(ngrams, rows[:, columns])._asdict()
      for layer, rows in text.rows.items()
    }
    try:
      zipf = collisions.zipf_exponent(ngrams)._asdict()
    except InputError:  # a short text repeats nothing
      zipf = None
    record = {"order": i + 2, "zipf": zipf, "collisions_by_layer": found}
    records.append(record)
  return records


def deduplicate(text: Text, layer: int, heads: int) -> list[dict[str, Any]]:
  """Distinct rows over rows asked, by order of access and tokens at a time."""
  records = []
  for access, order in text.orders.items():
    rows = text.first_heads(layer, heads)[order]
    for batch in (b for b in BATCHES if b <= len(rows)):
      shares = [
        collisions.distinct_share(rows[:, i : i + 1], batch)
        for i in range(rows.shape[1])
      ]
      record = {"access": access, "batch": batch, "by_order": shares}
      records.append({**record, "all": float(np.mean(shares))})
  return records


def sizes_for(texts: Sequence[Text], layer: int, heads: int) -> list[int]:
  """Entries of the caches to look at, up to one that holds all that is read."""
  most = max(
    sum(len(np.unique(column)) for column in text.first_heads(layer, heads).T)
    for text in texts
  )
  return list(SIZES[: bisect.bisect_left(SIZES, most) + 1])


def hit_rates(
  text: Text,
  others: Sequence[Text],
  sizes: Sequence[int],
  layer: int,
  heads: int,
) -> dict[str, dict[str, list[float]]]:
  """Hit rates by cache, then by which orders it serves, one for each size.

  Caches: `lru text`, `lru decode`; `static`, the hot rows of the first half;
  `static, other text`, those of the other corpora. Orders: each with a cache of
  its own, and `all` in one.
  """
  rows = text.first_heads(layer, heads)
  found: dict[str, dict[str, list[float]]] = {}

  def by_orders(cache, rate):
    columns = {str(i + 2): [i] for i in range(rows.shape[1])}
    columns["all"] = list(range(rows.shape[1]))
    found[cache] = {name: rate(c).tolist() for name, c in columns.items()}

  for access, order in text.orders.items():
    by_orders(
      f"lru {access}",
      lambda c, order=order: collisions.lru_hit_rates(
        rows[order][:, c].reshape(-1), sizes, start=text.half * len(c)
      ),
    )
  sources = {"static": [rows[: text.half]]}
  if others:
    elsewhere = [other.first_heads(layer, heads) for other in others]
    sources["static, other text"] = elsewhere
  for cache, parts in sources.items():
    train = np.concatenate(parts)
    by_orders(
      cache,
      lambda c, train=train: collisions.static_hit_rates(
        train[:, c].reshape(-1), rows[text.half :, c].reshape(-1), sizes
      ),
    )
  return found


def seen_before(text: Text, layer: int, heads: int) -> dict[str, float]:
  """Share of the counted accesses whose row was accessed before: the limit."""
  rows, seen = text.first_heads(layer, heads), {}
  for i, column in enumerate(rows.T):
    first = np.unique(column, return_index=True)[1]
    new = np.count_nonzero(first >= text.half)
    seen[str(i + 2)] = 1 - new / (len(rows) - text.half)
  return {**seen, "all": float(np.mean(list(seen.values())))}


def check_first_heads(text: Text, layer: int, heads: int) -> float:
  """Largest difference of LRU hit rates, first heads against all columns."""
  short = slice(max(0, text.half - CHECKED), text.half + CHECKED)
  start = text.half - short.start
  rates = []
  for step in (1, heads):
    rows = text.rows[layer][short, ::step]
    sizes = [size * heads // step for size in SIZES]
    rates.append(
      collisions.lru_hit_rates(
        rows.reshape(-1), sizes, start=start * rows.shape[1]
      )
    )
  return float(np.abs(rates[0] - rates[1]).max())


def study(
  texts: Sequence[Text], hashing: NgramHash, sizes: Sequence[int]
) -> dict[str, Any]:
  """All figures, by corpus, telling how it goes."""
  found: dict[str, Any] = {}
  total = len(texts) * (4 * len(hashing.layers) + 1)
  with progress.counting("counting", total=total, unit="tables") as shown:
    for text in texts:
      found[text.name] = _study_one(text, texts, hashing, sizes, shown)
  return found


def _study_one(text, texts, hashing, sizes, shown) -> dict[str, Any]:
  """The figures of one corpus, each counted when it is there."""
  heads, others = hashing.heads, [other for other in texts if other is not text]

  def counted(figures):
    shown(1)
    return figures

  layers = {
    str(layer): {
      "distinct_share": counted(deduplicate(text, layer, heads)),
      "hit_rates": counted(hit_rates(text, others, sizes, layer, heads)),
      "seen_before": counted(seen_before(text, layer, heads)),
      "first_heads_error": counted(check_first_heads(text, layer, heads)),
    }
    for layer in hashing.layers
  }
  return {
    **text.about,
    "counted_tokens": len(text.ngrams) - text.half,
    "orders": counted(describe(text, heads)),
    "layers": layers,
  }


# --- report ---


def size_name(size: float) -> str:
  """Bytes in words: 1.1 MB, 4.4 GB."""
  return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def report(result: dict[str, Any]) -> str:
  """The figures of the first layer as tables for the terminal."""
  tables, percent = [], "{:.1%}".format
  layer = str(result["hash"]["layers"][0])
  for name, corpus in result["corpora"].items():
    title = "{}: {:,} tokens, {:,} documents".format(
      name, corpus["tokens"], corpus["documents"]
    )
    rows = []
    for record in corpus["orders"]:
      found = list(record["collisions_by_layer"].values())
      zipf = record["zipf"]
      fit = "least_squares", "maximum_likelihood"
      rows.append(
        (
          record["order"],
          f"{found[0]['ngrams']:,}",
          *(f"{np.mean(one['rows']):,.0f}" for one in found),
          percent(1 - found[0]["by_shared_heads"][0] / found[0]["ngrams"]),
          found[0]["equal"],
          *(f"{zipf[key]:.3f}" if zipf else "-" for key in fit),
          percent(corpus["layers"][layer]["seen_before"][str(record["order"])]),
        )
      )
    header = ["order", "n-grams"]
    header += [f"rows, layer {i}" for i in result["hash"]["layers"]]
    header += ["share one of 8", "equal", "Zipf LS", "ML", "seen before"]
    tables.append(f"{title}\n{aligned(header, rows)}")

    records = corpus["layers"][layer]["distinct_share"]
    orders = [str(record["order"]) for record in corpus["orders"]]
    rows = [
      (r["access"], r["batch"], *map(percent, [*r["by_order"], r["all"]]))
      for r in records
    ]
    header = ["distinct", "tokens", *orders, "all"]
    tables.append(aligned(header, rows))

    rates = corpus["layers"][layer]["hit_rates"]
    columns = [(cache, "all") for cache in rates]
    columns += [("lru text", order) for order in orders]
    rows = [
      (
        f"{size:,}",
        size_name(total),
        *(percent(rates[c][o][i]) for c, o in columns),
      )
      for i, (size, total) in enumerate(
        zip(result["cache_entries"], result["cache_bytes"])
      )
    ]
    header = ["entries", "all layers"]
    header += [cache if o == "all" else f"order {o}" for cache, o in columns]
    tables.append(aligned(header, rows))
  return "\n\n".join(tables)


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Two pictures: all orders by cache, and LRU by order."""
  megabytes = np.array(result["cache_bytes"]) / 1e6
  layer = str(result["hash"]["layers"][0])
  kinds = {
    "lru text": "LRU",
    "lru decode": f"LRU, {result['documents_at_a_time']} texts at a time",
    "static": "hot set",
  }
  caches, orders = {}, {}
  for name, corpus in list(result["corpora"].items())[:2]:
    rates = corpus["layers"][layer]["hit_rates"]
    for kind, words in kinds.items():
      caches[f"{name}, {words}"] = megabytes, 100 * np.array(rates[kind]["all"])
    for order, values in rates["lru text"].items():
      if order != "all":
        orders[f"{name}, {order}-grams"] = megabytes, 100 * np.array(values)
  bounds = path.with_suffix(".png"), path.with_name(f"{path.stem}_orders.png")
  titles = "Row cache, all orders", "LRU row cache of one order"
  for lines, target, title in zip((caches, orders), bounds, titles):
    plot_lines(
      lines,
      target,
      title=f"{title}: V4.1's hash on real text",
      xlabel="size of the cache over both layers (MB)",
      ylabel="hit rate (%)",
      log_x=True,
    )


_FLAGS = cli.flag_values(__name__)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "File; the V4 one if not set.", flag_values=_FLAGS
)
_CORPORA = flags.DEFINE_list(
  "corpora", list(CORPORA), "Of code and prose.", flag_values=_FLAGS
)
_FOLDER = flags.DEFINE_string(
  "folder", "", "Another corpus.", flag_values=_FLAGS
)
_GLOB = flags.DEFINE_list(
  "glob", ["*.md", "*.rst", "*.txt"], "Its files.", flag_values=_FLAGS
)
_TOKENS = flags.DEFINE_integer(
  "max_tokens", 2_000_000, "Of each corpus.", lower_bound=2, flag_values=_FLAGS
)
_DOCUMENTS = flags.DEFINE_integer(
  "documents", 64, "Decoded at a time.", lower_bound=1, flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
  "out",
  str(ROOT / "experiments/results/cache_study.json"),
  "JSON; .png and _orders.png beside it.",
  flag_values=_FLAGS,
)


def main(argv) -> None:
  del argv
  path = require_place(_OUT.value)
  names = chosen(_CORPORA.value, _FOLDER.value)
  config = experiment_of("v41_memory")
  tokenizer = load_tokenizer(_TOKENIZER.value)
  most = f"{_TOKENS.value:,} tokens of each"
  progress.say(f"corpora {', '.join(names)}, at most {most}")
  memory = make_memory(config, tokenizer)
  hashing, compression = memory.hashing, memory.compression
  texts = []
  for name in names:
    source = read_corpus(name, _FOLDER.value, _GLOB.value)
    documents, size = tokenize(source, tokenizer, _TOKENS.value)
    documents = [compression(ids) for ids in documents]
    with progress.waiting(f"hashing {name}", announce=False):
      texts.append(Text(name, documents, size, hashing, _DOCUMENTS.value))
  row = RowFormat("fp8", memory.config.head_dim).bytes_per_row
  entry = row * hashing.heads * len(hashing.layers)
  sizes = sizes_for(texts, hashing.layers[0], hashing.heads)
  result = {
    "hash": {
      "layers": list(hashing.layers),
      "heads": hashing.heads,
      "canonical_ids": compression.size,
      "compression_digest": compression.digest,
      "num_rows": list(hashing.num_rows.values()),
    },
    "documents_at_a_time": _DOCUMENTS.value,
    "bytes_per_row": row,
    "bytes_of_tables": row * sum(hashing.num_rows.values()),
    "cache_entries": sizes,
    "cache_bytes": [entry * size for size in sizes],
    "corpora": study(texts, hashing, sizes),
  }
  write_result(path, result)
  draw(result, path)
  print(report(result))


if __name__ == "__main__":
  cli.run(main)
