"""The rows of one cache, and the step that they are in."""
