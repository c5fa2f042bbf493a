"""Decoding: caches as explicit values, one step at a time, sampling, text."""
