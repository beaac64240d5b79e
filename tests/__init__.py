"""Tests of knife_jax and its games."""
