"""Does the memory's own n-gram, alone, draft tokens?

The rows of the last n-grams are read before any block runs. If what the Engram
layer makes of them names the next token, they are a draft for nothing: no
second model, and no second read, as the rows that verify a draft are those that
made it. (Serving engines report that drafts *cost* 8 to 32 % where a table is
read twice.) The paper does not ask. Here, against plain n-gram caches:

  table          LogitLens of the value projection of the rows
  table, fitted  the same with a linear map from rows to last hidden states
  corpus         what mostly followed the n-gram in the training text
  text           what followed it earlier in the text itself (prompt lookup)
  text, table    the first, where it finds something; else the fitted table
  commonest      the commonest token, always: a control

Agreement is how often a drafter's first token is the model's own choice, on
held-out text: generated text repeats itself, and flatters `text`. Acceptance,
tokens per pass and reads are of generated text, which must be that of plain
greedy decoding, token by token.

  python -m experiments.lab.speculation --scale=cpu
"""

import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.data.pipeline import spread_batches
from engram_jax.decoding.drafters import (
  corpus_drafter,
  first_of,
  memory_logits,
  prompt_lookup,
  table_drafter,
)
from engram_jax.decoding.generate import generate_all
from engram_jax.decoding.speculation import Drafter, speculate
from engram_jax.decoding.weights import for_decoding
from engram_jax.stores.program_stores import TableStore
from experiments.lab.figures import Bars, Lines, draw_panels
from experiments.lab.labelled_text import training_windows
from experiments.lab.runs import Laboratory, Run, Trained, by_group
from experiments.lab.statistics import mean_interval, paired_difference
from experiments.lab.study import Study, tuned_learning_rate

#: Prompts that are continued, new tokens of each, and lengths of drafts.
SIZES = {
  "smoke": (1, 12, (1, 3)),
  "cpu": (4, 48, (1, 2, 4, 8)),
  "gpu": (24, 128, (1, 2, 4, 8)),
}
PROMPT_TOKENS = 24
#: Ridge of the fitted map, as a share of the rows' mean square.
RIDGE = 1e-3
#: The plain n-gram caches that the tables are compared with.
CACHES, TABLES = ("corpus", "text"), ("table", "table, fitted")


def runs(lab: Laboratory) -> list[Run]:
  """The memory's model at every length but the longest; short runs first."""
  scale, rate = lab.scale, tuned_learning_rate(lab)
  lengths = scale.tokens[:-1] or scale.tokens
  return [
    Run(
      f"memory {tokens}",
      lab.config(
        scale.with_memory(), tokens=tokens, seed=seed, learning_rate=rate
      ),
      {"tokens": tokens},
    )
    for tokens, seed in itertools.product(lengths, scale.seeds)
  ]


@jax.jit
def _forward(model, rows, batch):
  """The last hidden states, and the ids of the model's choices."""
  out = model(batch["inputs"], rows, breaks=batch["breaks"])
  return out.hidden, jnp.argmax(out.logits, axis=-1)


@jax.jit
def _table_choices(model, rows, lens):
  return jnp.argmax(memory_logits(model, rows, lens), axis=-1)


def _training_text(trained: Trained) -> np.ndarray:
  """Every window that the run has read, [n, L + 1]."""
  text = training_windows(trained.data, trained.config.train)
  inputs, last = text["inputs"], text["targets"][:, -1:]
  return np.concatenate([inputs, last], axis=1)


def _spread(lab: Laboratory, trained: Trained, split: str):
  train = trained.config.train
  found = spread_batches(
    trained.data,
    split,
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    count=max(lab.scale.eval_windows // 4, 1),
  )
  return [jax.tree.map(jnp.asarray, batch) for batch in found]


def _rows(trained: Trained, batch) -> dict[int, Any]:
  return trained.memory.lookup(
    trained.tables, batch["inputs"], breaks=batch["breaks"]
  ).rows


def fit_lens(trained: Trained, text) -> dict[int, np.ndarray]:
  """The linear map from rows to normed last hidden states, by least squares.

  Args:
    trained: a model with a memory.
    text: batches to fit it on; not those of an evaluation.

  Returns:
    [M, D] per Engram layer; all layers are fitted together.
  """
  layers = trained.memory.layers
  inner, outer = 0, 0
  for batch in text:
    rows = _rows(trained, batch)
    hidden, _ = _forward(trained.model, rows, batch)
    # The lens comes before the norm's gain.
    hidden = np.asarray(hidden, np.float64)[np.asarray(batch["loss_mask"])]
    hidden = hidden / np.asarray(trained.model.norm.scale[...], np.float64)
    entry = np.concatenate(
      [np.asarray(rows[i]).reshape(*rows[i].shape[:2], -1) for i in layers],
      axis=-1,
    )[np.asarray(batch["loss_mask"])].astype(np.float64)
    inner, outer = inner + entry.T @ entry, outer + entry.T @ hidden
  ridge = RIDGE * np.trace(inner) / len(inner) * np.eye(len(inner))
  whole = np.linalg.solve(inner + ridge, outer).astype(np.float32)
  parts = np.split(whole, len(layers))
  return dict(zip(layers, parts))


def _drafters(
  trained: Trained, seen: np.ndarray, lens: Mapping[int, np.ndarray]
) -> dict[str, Drafter]:
  commonest = int(np.bincount(seen.reshape(-1)).argmax())
  vocab = trained.memory.vocab_size
  table = functools.partial(table_drafter, trained.model, vocab_size=vocab)
  fitted = table(lens=jax.tree.map(jnp.asarray, lens))
  lookup = functools.partial(prompt_lookup, longest=3)
  return {
    "table": table(),
    "table, fitted": fitted,
    "corpus": corpus_drafter(seen, longest=3),
    "text": lookup,
    "text, table": first_of(functools.partial(lookup, shortest=2), fitted),
    "commonest": lambda text, limit, rows: [commonest] * limit,
  }


def agreement(
  trained: Trained,
  text,
  drafters: Mapping[str, Drafter],
  lens: Mapping[int, np.ndarray],
) -> dict[str, float]:
  """Share of positions at which a drafter's token is the model's choice.

  Args:
    trained: a model with a memory.
    text: batches of held-out text.
    drafters: by name.
    lens: projections of the fitted table.
  """
  right: dict[str, list[np.ndarray]] = {name: [] for name in drafters}
  for batch in text:
    rows, mask = _rows(trained, batch), np.asarray(batch["loss_mask"])
    choices = np.asarray(_forward(trained.model, rows, batch)[1])
    found = {
      name: np.asarray(_table_choices(trained.model, rows, given))
      for name, given in (("table", None), ("table, fitted", lens))
    }
    inputs = np.asarray(batch["inputs"]).tolist()
    for name in ("corpus", "text", "commonest"):
      found[name] = np.array(
        [
          [
            next(iter(drafters[name](line[: i + 1], 1, None)), -1)
            for i in range(len(line))
          ]
          for line in inputs
        ]
      )
    short = functools.partial(prompt_lookup, longest=3, shortest=2)
    first = np.array(
      [
        [(short(line[: i + 1], 1) or [-1])[0] for i in range(len(line))]
        for line in inputs
      ]
    )
    found["text, table"] = np.where(first < 0, found["table, fitted"], first)
    for name, tokens in found.items():
      right[name].append((tokens == choices)[mask])
  return {name: float(np.concatenate(x).mean()) for name, x in right.items()}


def _generated(
  trained: Trained, prompts, drafters, *, new_tokens: int, lengths
) -> dict[str, Any]:
  """Acceptance, passes and reads by drafter and draft length."""
  model, memory = for_decoding(trained.model), trained.memory
  plain = [
    generate_all(
      model,
      memory,
      TableStore(trained.tables),
      [prompt],
      max_new_tokens=new_tokens,
      key=jax.random.key(0),
    )[0]
    for prompt in prompts
  ]
  columns = sum(len(memory.hashing.primes[i]) for i in memory.layers)
  found: dict[str, Any] = {"repeated": _repeated(prompts, plain)}
  for name, length in itertools.product(drafters, lengths):
    # Of what a program reads, as at the prompt, nothing is counted.
    store, passes, same = TableStore(trained.tables), [], True
    for prompt, expected in zip(prompts, plain):
      new = list(
        speculate(
          model,
          memory,
          store,
          prompt,
          drafter=drafters[name],
          draft_length=length,
          max_new_tokens=new_tokens,
        )
      )
      same &= [token for one in new for token in one.tokens] == expected
      passes += new[1:]  # the first is the prompt's
    tokens = sum(len(one.tokens) for one in passes)
    drafted = sum(one.drafted for one in passes)
    found.setdefault(name, {})[str(length)] = {
      "acceptance": sum(one.accepted for one in passes) / max(drafted, 1),
      "drafted": drafted / len(passes),
      "tokens_per_pass": tokens / len(passes),
      "reads_per_token": store.statistics.rows_asked / columns / tokens,
      "identical": same,
    }
  return found


def _repeated(prompts, texts) -> float:
  """Share of new tokens whose trigram stood in the text before."""
  again = []
  for prompt, text in zip(prompts, texts):
    joined, seen = [*prompt, *text], set()
    for i in range(2, len(joined)):
      trigram = tuple(joined[i - 2 : i + 1])
      if i >= len(prompt):
        again.append(trigram in seen)
      seen.add(trigram)
  return float(np.mean(again))


def measure(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Agreement on held-out text, and all of the generated text."""
  lens = fit_lens(trained, _spread(lab, trained, "train"))
  drafters = _drafters(trained, _training_text(trained), lens)
  text = _spread(lab, trained, "validation")
  lines = np.concatenate([np.asarray(batch["inputs"]) for batch in text])
  count, new_tokens, lengths = SIZES[lab.scale.name]
  step = max(len(lines) // count, 1)
  prompts = lines[::step][:count, :PROMPT_TOKENS].tolist()
  return {
    "agreement": agreement(trained, text, drafters, lens),
    "generated": _generated(
      trained, prompts, drafters, new_tokens=new_tokens, lengths=lengths
    ),
  }


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Intervals over seeds by length of training; the tables' lead."""
  points = []
  for found in by_group(records).values():
    agree = {
      name: [r["agreement"][name] for r in found]
      for name in found[0]["agreement"]
    }
    figures = {
      name: {
        length: {
          key: mean_interval([r["generated"][name][length][key] for r in found])
          for key in found[0]["generated"][name][length]
          if key != "identical"
        }
        for length in found[0]["generated"][name]
      }
      for name in agree
    }
    # The better of each kind by its mean: no fixed rival is a strong one.
    table, cache = (
      max(names, key=lambda name: np.mean(agree[name]))
      for names in (TABLES, CACHES)
    )
    points.append(
      {
        "tokens": found[0]["labels"]["tokens"],
        "agreement": {n: mean_interval(x) for n, x in agree.items()},
        "generated": figures,
        "repeated": mean_interval([r["generated"]["repeated"] for r in found]),
        "identical": all(
          r["generated"][name][length]["identical"]
          for r in found
          for name in agree
          for length in r["generated"][name]
        ),
        "best_table": table,
        "best_cache": cache,
        "lead": paired_difference(agree[table], agree[cache]),
        "over_commonest": paired_difference(agree[table], agree["commonest"]),
      }
    )
  return {"points": points, **_verdict(points)}


def _verdict(points: list[dict[str, Any]]) -> dict[str, str]:
  """On the claim that rows alone draft better than an n-gram cache."""
  if not points:
    finding = "No run is finished."
    return {"verdict": "too weak to tell", "finding": finding}
  last = max(points, key=lambda point: point["tokens"])
  table, cache, lead = last["best_table"], last["best_cache"], last["lead"]
  share = {n: x["mean"] for n, x in last["agreement"].items()}
  same = "is" if all(p["identical"] for p in points) else "is NOT always"
  finding = (
    f"The rows alone ({table}) name the model's choice at {share[table]:.0%} "
    f"of held-out positions, the better n-gram cache ({cache}) at "
    f"{share[cache]:.0%}, the commonest token at {share['commonest']:.0%}; the "
    f"text {same} that of plain greedy decoding."
  )
  verdict = "not seen"
  if lead["low"] is None:
    verdict = "too weak to tell"
  elif lead["low"] > 0:
    verdict = "reproduced"
  elif lead["high"] < 0:
    verdict = "contradicted"
  return {"verdict": verdict, "finding": finding}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Agreement, tokens per pass and reads, at the longest training."""
  last = max(result["points"], key=lambda point: point["tokens"])

  def lines(key: str):
    return {
      name: [(int(k), figures[key]) for k, figures in by_length.items()]
      for name, by_length in last["generated"].items()
    }

  percent = {
    name: {
      k: 100 * v if k != "n" and v is not None else v for k, v in x.items()
    }
    for name, x in last["agreement"].items()
  }
  panels = [
    Bars(
      percent,
      title="Held-out text: first token is the model's choice",
      xlabel="share of positions (%)",
    ),
    Lines(
      lines("tokens_per_pass"),
      title="Generated text: tokens per pass",
      xlabel="longest draft (tokens)",
      ylabel="new tokens per forward pass",
    ),
    Lines(
      lines("reads_per_token"),
      title="Generated text: what is read",
      xlabel="longest draft (tokens)",
      ylabel="positions read per new token",
    ),
  ]
  title = (
    f"Drafts by the memory's rows and by n-gram caches after "
    f"{last['tokens'] / 1e6:g} M tokens (bars: 95 % over seeds)"
  )
  draw_panels(panels, path, title=title)


STUDY = Study("speculation", runs, measure, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
