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
from hf_paged.tools.lab.model import SHAPES, MeasuredModel, load_model, random_llama
from hf_paged.tools.lab.options import names, numbers, option


@dataclass(frozen=True)
class Settings:
    """What the command line says; None leaves the choice to the scenario."""

    model: str | None = option(None, "a causal LM (default: the packaged SmolLM2-135M)", metavar="NAME_OR_PATH")
    random_llama: bool = option(False, "a tiny random model of 131,072 positions instead")
    shape: str | None = option(None, f"random weights in the shape of {', '.join(SHAPES)}", metavar="SHAPE")
    dtype: str = option("float32", "of the weights")
    device: str = option("cpu", "where the model runs")
    num_threads: int | None = option(None, "CPU threads (default: torch's choice)", int, "N")
    page_size: int = option(128, "tokens per page", int)
    rounds: int = option(3, "times that each figure is taken", int)
    max_new_tokens: int = option(32, "of each row, that of the prompt included", int)
    contexts: tuple[int, ...] | None = option(None, "tokens (default: the scenario's own)", numbers, "N,N,...")
    prompt_lengths: tuple[int, ...] | None = option(None, "of mixed (default: 16 to 1024)", numbers, "N,N,...")
    baselines: tuple[str, ...] | None = option(None, "see below (default: the scenario's own)", names, "NAME,...")
    chunk_size: int = option(1024, "tokens of a long prompt that are run at once", int)
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
    return load_model(model, dtype, device) if shape is None else random_llama(dtype, device, shape)


def line_up_for(
    settings: Settings, model: MeasuredModel, default: Sequence[str]
) -> AbstractContextManager[list[Baseline]]:
    """Make the baselines that are asked for, or the default ones; an unknown name raises ValueError."""
    kinds = WHOLE if settings.whole else BASELINES
    return line_up(model.model, settings.baselines or default, settings.page_size, kinds)
