"""Sparse budgets for a checkpoint: how much of its attention columns and diagonals keep, and which are enough."""
