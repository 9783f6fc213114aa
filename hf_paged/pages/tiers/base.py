"""What every tier can do: keep the content of pages, found by the tokens that they hold."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PageKey:
    """What the tokens of a page, and all before it, are. Keys are equal if all is; the digest says where to look.

    Attributes:
        digest: of `parent` and `tokens`.
        parent: what these stand behind: by what model, in which layers, for whom they were computed.
        tokens: of the row up to the end of the page: int32, little-endian, one after the other.
    """

    digest: bytes
    parent: bytes
    tokens: bytes

    def __hash__(self) -> int:
        return hash(self.digest)


class PageTier(Protocol):
    """Bounded memory for the content of pages, each `(page_bytes,)` uint8 on the host. Threads may share it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages that are kept."""

    def put(self, key: PageKey, content: Tensor) -> None:
        """Keep the content of a page, as long as there is room for it; others may be dropped."""

    def get(self, key: PageKey) -> Tensor | None:
        """The content of a page, not to be changed; None if it isn't here, for whatever reason."""

    def __contains__(self, key: PageKey) -> bool:
        """Whether the content of a page is likely to be here."""
