"""What benchmarks and evaluation share: a model to measure, caches beside it, bytes, tables, pictures, sources."""
