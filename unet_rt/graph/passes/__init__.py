"""Rewrites of a graph, one per file. Each is idempotent, changes no more than rounding, and says how much it changed."""
