"""Weights and models in: files that other tools wrote become plain arrays and patterns.

Every reader checks claimed sizes against the file before it allocates, and nothing that is read is ever executed.
"""
