"""What a bug report needs: versions, devices, and which tricks are on."""

import platform

import torch
import transformers

from hf_paged._torch.private import NAMES
from hf_paged._torch.tricks import TRICKS


def support() -> str:
    """What hf_paged runs on, and how: versions, devices, and a line for each of its tricks.

    A trick is on, or off (`HF_PAGED_DISABLE=name,...` in the environment), or something else is done in its place,
    since this torch lacks something. To find out, the compiler is imported, which takes some seconds; nothing is
    compiled.

    Returns:
        The lines, for a bug report.
    """
    from hf_paged import __version__  # not before it is there

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    width = max(map(len, TRICKS))
    return "\n".join(
        [
            f"hf_paged {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}, {platform.platform()}",
            f"devices: {', '.join([f'cpu ({torch.get_num_threads()} threads)', *gpus])}",
            *(f"{name:{width}}  {trick.status()}  ({trick.what})" for name, trick in sorted(TRICKS.items())),
            *(f"missing: {name}" for name in NAMES if name.is_missing),
        ]
    )
