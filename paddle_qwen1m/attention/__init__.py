"""Dual chunk attention: positions, the choice of critical keys, and one layer's attention over a step."""
