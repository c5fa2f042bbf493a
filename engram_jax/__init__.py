"""Conditional memory for JAX and Flax: hashed n-gram tables, and a gate."""
