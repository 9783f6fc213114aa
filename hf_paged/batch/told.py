"""What a decoding loop says of the pass that it is about to make."""

from dataclasses import dataclass

from torch import Tensor

from hf_paged.batch.padding import BoolMatrix


@dataclass(frozen=True)
class ToldPass:
    """A pass over one new column, as the loop knows it without asking the device.

    Attributes:
        ids: `(num_rows, num_columns)` of all columns up to its end; not to be changed any more.
        mask: `(num_rows, any)`, the attention mask that the mask function is going to be given; None without padding.
            Where anybody makes another one of it, that is another tensor.
        mask_on_host: what is in it; None if that is not known.
    """

    ids: Tensor
    mask: Tensor | None
    mask_on_host: BoolMatrix | None


def mask_on_host(mask: Tensor | None, told: ToldPass | None) -> BoolMatrix | None:
    """What is in an attention mask; the device is asked unless it was told."""
    if mask is None:
        return None
    if told is not None and mask is told.mask and told.mask_on_host is not None:
        return told.mask_on_host
    return mask.bool().cpu().numpy()
