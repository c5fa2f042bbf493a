"""Continues prompts with a trained checkpoint, printing as it goes.

  python -m experiments.generate --workdir=runs/tiny --prompt='import os'
  python -m experiments.generate --workdir=runs/tiny --prompt='class ' \
    --prompt='def read(self' --temperature=0.8 --top_p=0.95
  python -m experiments.generate --workdir=runs/tiny --prompt='import os' \
    --store=file:runs/tiny/memory.rows --cache_mib=64

One prompt streams; several are one batch, printed when all have ended. With
--slots fewer are decoded at once, and who ends makes room for the next.
"""

import jax
from absl import flags

from engram_jax import progress
from engram_jax.data.tokenizers import END_ID
from engram_jax.decoding.generate import NO_TOKEN, generate
from engram_jax.decoding.text import TextStream
from engram_jax.errors import require, require_seed
from experiments import cli, console, stores

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
_PROMPT = flags.DEFINE_multi_string("prompt", ["def main("], "May be repeated.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "New tokens at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from this share of mass.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_MEMORY = flags.DEFINE_enum("memory", "on", ["on", "off"], "Use the memory.")
_SLOTS = flags.DEFINE_integer("slots", None, "Prompts at once; all if not set.")
_STORE = stores.define_store()
_PREFETCH = stores.define_prefetch()
flags.mark_flag_as_required("workdir")


def main(argv) -> None:
  del argv
  console.require_stdout()
  require_seed("seed", _SEED.value)
  prompts = [console.argument_text("prompt", text) for text in _PROMPT.value]
  for prompt in prompts:
    require(prompt, "prompt", repr(prompt), "some text to continue")
  jax.devices()  # what JAX_PLATFORMS names is refused before files are blamed
  trained, store = stores.load(_WORKDIR.value, step=_STEP.value, **_STORE())
  tokenizer = trained.tokenizer
  memory = trained.memory
  if _MEMORY.value == "off":
    memory = store = None
  steps = generate(
    trained.model,
    memory,
    store,
    [tokenizer.encode(prompt).ids for prompt in prompts],
    max_new_tokens=_TOKENS.value,
    key=jax.random.key(_SEED.value),
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    end_id=END_ID,
    vocab_size=tokenizer.get_vocab_size(),
    prefetch=_PREFETCH.value,
    slots=_SLOTS.value,
  )
  streams = [TextStream(tokenizer) for _ in prompts]
  texts = list(prompts)
  alone = len(prompts) == 1
  if alone:
    print(prompts[0], end="", flush=True)
  if not alone:
    waves = -(-len(prompts) // (_SLOTS.value or len(prompts)))
    most = _TOKENS.value * waves
    progress.say(f"{len(prompts)} prompts, at most {most} steps")
    steps = progress.counted(steps, "generating", total=most)
  for step in steps:
    for i, token in enumerate(step.tokens):
      piece = streams[i].push([token]) if token != NO_TOKEN else ""
      texts[i] += piece
      if alone:
        print(piece, end="", flush=True)
  texts = [t + stream.close() for t, stream in zip(texts, streams)]
  print("" if alone else "\n\n---\n\n".join(texts))


if __name__ == "__main__":
  cli.run(main)
