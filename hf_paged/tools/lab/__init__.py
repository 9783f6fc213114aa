"""What benchmarks and evaluation share: a model and its text, baselines, bytes, tables, pictures, provenance."""
