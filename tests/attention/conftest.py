from types import SimpleNamespace

import pytest

from hf_paged.attention import dispatch


@pytest.fixture
def block_lists(monkeypatch):
    """Several queries of a row are FlexAttention's, as on a GPU, or where `varlen_sdpa` is switched off."""
    monkeypatch.setattr(dispatch, "VARLEN_SDPA", SimpleNamespace(is_on=False))
