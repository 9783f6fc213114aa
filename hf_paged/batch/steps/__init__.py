"""One forward pass: which tokens are new, where they go, what each query sees."""
