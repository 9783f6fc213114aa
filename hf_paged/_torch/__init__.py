"""Everything of torch that is not public, and memory from the system itself."""
