"""Rows as prompts, and the order in which a run draws them."""
