"""Texts whose answers are known: facts, idioms in noise, needles, variables.

  facts     invented entities, how often each fact is stated, two-hop questions
  idioms    fixed phrases in random words, with an exact floor of the loss
  needles   what a long text said once: one, many keys, many values, many asked
  tracking  which variables have a value, through chains of assignments

Every task is a frozen config; functions of it give documents to train on and
questions to ask, the same ones from the same seed. `folder.write_folder` makes
files of documents. Every task has an oracle that reads only the text.
"""
