"""The Transformers `Cache` over pages."""
