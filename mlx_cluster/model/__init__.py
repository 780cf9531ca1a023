"""Slices of mlx-lm models: checkpoints, caches, sampling, and the runner that executes microbatches.

``families``, ``checkpoint`` and ``hub`` never import mlx, so that agents may plan with them; everything else belongs to
the one thread that owns mlx.
"""
