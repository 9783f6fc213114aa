"""Measurements of this package beside what Transformers has, each scenario a file in `scenarios`.

How: `hf-paged bench SCENARIO ...`; `hf-paged bench --help` lists them. Baselines take turns step by step in one
process (`race`), so that a machine that slows down slows all of them down.
"""
