"""Paged attention for Hugging Face Transformers: keys and values in pages, read in place by FlexAttention.

Importing this package registers `attn_implementation="paged_flex"` with Transformers; nothing else is changed.
"""

from hf_paged import _versions  # noqa: F401 (first: it may have something to say)
from hf_paged._support import support
from hf_paged._torch.tricks import check_switches
from hf_paged.attention.interface import register
from hf_paged.cache.encoder_decoder import PagedEncoderDecoderCache
from hf_paged.cache.paged import PagedCache
from hf_paged.compile.api import compiled
from hf_paged.compile.weights import gather_weights
from hf_paged.decoding.many.answers import generate_many
from hf_paged.decoding.sample import sample
from hf_paged.decoding.speculate.assistant import assisted
from hf_paged.decoding.speculate.lookup import prompt_lookup
from hf_paged.decoding.stopping import ReleaseFinished
from hf_paged.enabling.api import disable, enable, explain
from hf_paged.errors import OutOfPagesError, UnclearPassError
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.tiers.store import PrefixStore
from hf_paged.scoring.choices import score_choices
from hf_paged.scoring.packed_choices import Score

__version__ = "0.2.0"
__all__ = [
    "MemoryStats",
    "OutOfPagesError",
    "PagePool",
    "PagedCache",
    "PagedEncoderDecoderCache",
    "PrefixStore",
    "ReleaseFinished",
    "Score",
    "UnclearPassError",
    "assisted",
    "compiled",
    "disable",
    "enable",
    "explain",
    "gather_weights",
    "generate_many",
    "prompt_lookup",
    "sample",
    "score_choices",
    "support",
]

check_switches()
register()
