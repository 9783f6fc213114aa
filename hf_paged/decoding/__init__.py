"""Loops over decoding steps: for Transformers' `custom_generate`, and for many prompts."""
