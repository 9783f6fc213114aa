"""Prompts computed row after row: what is found, and what is left to compute."""
