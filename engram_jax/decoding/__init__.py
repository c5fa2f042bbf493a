"""Decoding: explicit caches, rows from any store, slots, sampling, text."""
