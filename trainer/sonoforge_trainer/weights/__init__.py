"""Weights that others published: reading their layouts, fitting them to our backbone, and writing ours in theirs."""
