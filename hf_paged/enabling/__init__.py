"""One call that turns it on for a model: every `generate()` of it takes a paged cache by itself."""
