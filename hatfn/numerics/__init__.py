"""Tensors and numbers: trees, exact zeros, seeds, vmap. Nothing here knows of tasks."""
