"""What is measured, how long, and on which model."""

from dataclasses import dataclass

import torch

from hf_paged.tools.lab.subject import Subject, load_subject, random_llama


@dataclass(frozen=True)
class Settings:
    """What the command line says; None leaves the choice to the scenario.

    Attributes:
        model: name or path for `from_pretrained`; None: the packaged SmolLM2-135M-Instruct.
        random_llama: measure a tiny Llama with random weights and 131,072 positions instead.
        dtype: of the weights, by its name in torch.
        device: where the model runs.
        num_threads: CPU threads; None: torch's choice.
        page_size: tokens per page of the paged baselines.
        rounds: times that each figure is taken.
        max_new_tokens: generated per row; the first of them is that of the prompt.
        contexts: tokens in the cache where the time of a token is taken.
        prompt_lengths: of the batch of `mixed`, in tokens.
        baselines: baselines, by name.
        chunk_size: tokens of a long prompt that are run at a time.
    """

    model: str | None = None
    random_llama: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    num_threads: int | None = None
    page_size: int = 128
    rounds: int = 3
    max_new_tokens: int = 32
    contexts: tuple[int, ...] | None = None
    prompt_lengths: tuple[int, ...] | None = None
    baselines: tuple[str, ...] | None = None
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.max_new_tokens < 2 or self.chunk_size < 1:
            raise ValueError(
                f"rounds={self.rounds}, max_new_tokens={self.max_new_tokens} and chunk_size={self.chunk_size} were "
                "asked for; there must be at least 1 round, 2 new tokens (the first is that of the prompt) and 1 "
                "token in a chunk."
            )


def load(settings: Settings) -> Subject:
    """Load the model that the settings name, and set the number of threads.

    Raises:
        ValueError: for a dtype that torch doesn't have, or a model beside `random_llama`.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    if not settings.random_llama:
        return load_subject(settings.model, settings.dtype, settings.device)
    if settings.model is not None:
        raise ValueError(f"model={settings.model!r} was asked for beside random_llama; give one of the two.")
    return random_llama(settings.dtype, settings.device)
