"""Helpers for tensors and numbers: trees, exact zeros, seeds, vmap."""
