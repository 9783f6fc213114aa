"""Prompts: what of one is known, and what is left to compute."""
