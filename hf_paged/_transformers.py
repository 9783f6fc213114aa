"""What differs between the supported versions of Transformers."""

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The argument in which models and mask functions take a cache; 5.24 renamed it, and warns of the old name."""
