"""A small checkpoint in V4.1's layout, written by the safetensors library."""

import json
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engram_jax.memory.hashing import NgramHash

FIELDS = {
  "hidden_size": 12,
  "hc_mult": 2,
  "rms_norm_eps": 1e-6,
  "engram_layer_ids": [1, 14],
  "engram_max_ngram_size": 4,
  "engram_n_heads": 2,
  "engram_head_dim": 32,
  "engram_vocab_size": 40,
  "engram_pad_token_id": 2,
  "engram_compressed_vocab_size": 50,
  "engram_compressed_pad_token_id": 3,
}


def write_checkpoint(folder):
  """Writes it; gives back what went in."""
  random = np.random.default_rng(0)
  hashing = NgramHash.create(
    vocab_size=50, rows_per_head=(40,) * 3, heads=2, layers=(1, 14), pad_id=3
  )
  rows = list(hashing.num_rows.values())
  text = FIELDS | {"engram_num_embeddings": rows}
  config = {
    "text_config": text,
    "quantization_config": {
      "quant_method": "fp8",
      "weight_block_size": [32, 32],
      "scale_fmt": "ue8m0",
      "expert_dtype": "fp4",
    },
  }
  tensors, shards = {}, {}
  for layer, count in hashing.num_rows.items():
    start = f"layers.{layer}.engram."

    def codes(*shape, low=0, high=256):
      return random.integers(low, high, shape, dtype=np.uint8)

    tensors[start + "embed.weight"] = codes(count, 32, high=127)
    tensors[start + "embed.scale"] = codes(count, 1, low=110, high=140)
    tensors[start + "wkv.weight"] = codes(36, 192, high=127)
    tensors[start + "wkv.scale"] = codes(2, 6, low=110, high=130)
    gain = random.normal(size=(2, 12))
    tensors[start + "q_weight"] = gain.astype(np.float32)
    tensors[start + "k_weight"] = (gain + 1).astype(ml_dtypes.bfloat16)
    shards[f"model-0000{len(shards) + 1}-of-00002.safetensors"] = [
      name for name in tensors if name.startswith(start)
    ]
  kinds = {
    ".weight": ml_dtypes.float8_e4m3fn,
    ".scale": ml_dtypes.float8_e8m0fnu,
  }
  for shard, names in shards.items():
    content = {"unrelated": np.arange(5)}
    for name in names:
      array = tensors[name]
      suffix = name[name.rindex(".") :]
      content[name] = array.view(kinds[suffix]) if suffix in kinds else array
    safetensors.numpy.save_file(content, folder / shard)
  weight_map = {
    name: shard for shard, names in shards.items() for name in names
  }
  index = json.dumps({"metadata": {}, "weight_map": weight_map})
  (folder / "model.safetensors.index.json").write_text(index)
  (folder / "config.json").write_text(json.dumps(config))
  return types.SimpleNamespace(
    folder=folder,
    config=config,
    hashing=hashing,
    tensors=tensors,
    weight_map=weight_map,
    shards=list(shards),
  )


@pytest.fixture
def small(tmp_path):
  return write_checkpoint(tmp_path)
