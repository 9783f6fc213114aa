"""Compiled steps: what `compiled(model)` does."""
