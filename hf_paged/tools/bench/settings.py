"""What is measured, how long, and on which model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from hf_paged.pages.pool import check_page_size
from hf_paged.tools.bench.whole import WHOLE
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import BASELINES, line_up
from hf_paged.tools.lab.model import SHAPES, MeasuredModel, load_model, random_model
from hf_paged.tools.lab.options import count, counts, names, option


@dataclass(frozen=True)
class Settings:
    """What the command line says; None leaves the choice to the scenario."""

    model: str | None = None
    random_llama: bool = option(False, "a tiny random model of 131,072 positions instead")
    shape: str | None = option(None, f"random weights in the shape of {', '.join(SHAPES)}", metavar="SHAPE")
    dtype: str = "float32"
    device: str = "cpu"
    num_threads: int | None = None
    page_size: int = option(128, "tokens per page", count)
    rounds: int = option(3, "times that each figure is taken", count)
    max_new_tokens: int = option(32, "of each row, that of the prompt included", count)
    contexts: tuple[int, ...] | None = option(None, "prompt tokens (default: the scenario's own)", counts)
    prompt_lengths: tuple[int, ...] | None = option(
        None, "tokens, of mixed (default: 16 prompts of 16 to 1024)", counts
    )
    caches: tuple[str, ...] | None = option(
        None, "see below (default: the scenario's own)", names, old_name="--baselines"
    )
    chunk_size: int = option(1024, "tokens of a prompt run at once", count)
    whole: bool = option(False, "let calls of generate() take turns instead of steps, on a GPU with their profile")

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        if self.rounds < 1 or self.max_new_tokens < 2 or self.chunk_size < 1:
            raise ValueError(
                f"rounds={self.rounds}, max_new_tokens={self.max_new_tokens} and chunk_size={self.chunk_size} were "
                "asked for; there must be at least 1 round, 2 new tokens (the first is that of the prompt) and 1 "
                "token in a chunk."
            )
        if self.random_llama and self.model is not None:
            raise ValueError(f"model={self.model!r} was asked for beside random_llama; give one of the two.")
        if self.shape is not None and (self.random_llama or self.model is not None):
            raise ValueError(f"shape={self.shape!r} was asked for beside another model; give one of the two.")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} was asked for; there are {', '.join(SHAPES)}.")

    @property
    def model_name(self) -> str:
        """Of the model that `load` loads, for people."""
        if self.random_llama or self.shape is not None:
            return self.shape or "random Llama"
        return "SmolLM2-135M-Instruct" if self.model is None else Path(self.model).name


def load(settings: Settings) -> MeasuredModel:
    """Load the model that the settings name, once, and set the number of threads.

    Raises:
        ValueError: for a dtype that torch doesn't have.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    shape = "tiny" if settings.random_llama else settings.shape
    return _load(settings.model, shape, settings.dtype, settings.device)


@lru_cache(maxsize=1)
def _load(model: str | None, shape: str | None, dtype: str, device: str) -> MeasuredModel:
    return load_model(model, dtype, device) if shape is None else random_model(dtype, device, shape)


def line_up_for(
    settings: Settings, model: MeasuredModel, default: Sequence[str]
) -> AbstractContextManager[list[Baseline]]:
    """Make the baselines that are asked for, or the default ones; an unknown name raises ValueError."""
    kinds = WHOLE if settings.whole else BASELINES
    return line_up(model.model, settings.caches or default, settings.page_size, kinds)
