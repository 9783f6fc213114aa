"""What is measured, how long, and on which model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_paged.bench.memory import kv_bytes
from hf_paged.packaged import load_packaged_model, prompts

_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What the command line says; None leaves the choice to the scenario.

    Attributes:
        model: name or path for `from_pretrained`; None: the packaged SmolLM2-135M-Instruct.
        random_llama: measure a tiny Llama with random weights and 131,072 positions instead.
        dtype: of the weights, by its name in torch.
        device: where the model runs.
        num_threads: CPU threads; None: torch's choice.
        page_size: tokens per page of the paged contenders.
        rounds: times that each figure is taken.
        max_new_tokens: generated per row; the first of them is that of the prompt.
        contexts: tokens in the cache where the time of a token is taken.
        prompt_lengths: of the batch of `mixed`, in tokens.
        baselines: contenders, by name.
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


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and text for it.

    Attributes:
        name: for people.
        model: in eval mode.
        tokenizer: None for a model with random weights, which is given random tokens.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def max_length(self) -> int:
        """Positions that the model knows."""
        positions: int = self.model.config.get_text_config(decoder=True).max_position_embeddings
        return positions

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Distinct prompts: equal ones would share their pages."""
        if self.tokenizer is not None:
            return prompts(self.tokenizer, lengths)
        generator = torch.Generator().manual_seed(_SEED)
        vocab_size = self.model.config.vocab_size
        return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]

    def prompt(self, length: int) -> Tensor:
        """One prompt, `(1, length)`."""
        return torch.tensor(self.prompts([length]), device=self.device)

    def padded(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Distinct prompts, padded on the left: token ids and mask, each `(len(lengths), max(lengths))`."""
        ids, mask = torch.zeros((2, len(lengths), max(lengths)), dtype=torch.long)
        for row, prompt in enumerate(self.prompts(lengths)):
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def contexts(self, asked: Sequence[int] | None, default: Sequence[int], max_new_tokens: int) -> list[int]:
        """The context lengths asked for, or else the default ones, that leave room for the new tokens."""
        chosen = sorted(set(default if asked is None else asked))
        return [context for context in chosen if context + max_new_tokens <= self.max_length]

    def token_bytes(self) -> int:
        """Keys and values of one token in all layers, bytes."""
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(self.prompt(1), past_key_values=cache)
        return kv_bytes(cache)


def load(settings: Settings) -> Subject:
    """Load the model that the settings name, and set the number of threads.

    Raises:
        ValueError: for a dtype that torch doesn't have, or a model beside `random_llama`.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    dtype = getattr(torch, settings.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={settings.dtype!r} was asked for; give one of torch's, such as float32 or bfloat16.")
    if settings.random_llama:
        if settings.model is not None:
            raise ValueError(f"model={settings.model!r} was asked for beside random_llama; give one of the two.")
        return random_llama(settings)
    if settings.model is None:
        model, tokenizer = load_packaged_model(dtype)
        return Subject("SmolLM2-135M-Instruct", _place(model, settings), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    return Subject(Path(settings.model).name, _place(model, settings), AutoTokenizer.from_pretrained(settings.model))


def random_llama(settings: Settings) -> Subject:
    """Make a Llama that is small enough for prompts of 100,000 tokens; its weights are the same in all runs."""
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=131072,
            initializer_range=0.2,  # keeps the logits apart, so that greedy tokens are well defined
            pad_token_id=0,
        )
    )
    return Subject("random Llama", _place(model, settings))


def _place(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(settings.device, getattr(torch, settings.dtype)).eval()
    return model
