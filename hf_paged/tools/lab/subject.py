"""A model that is measured, and text for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.tools.lab.memory import token_bytes

_SEED = 0


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
        return token_bytes(self.model)


def load_subject(name: str | None = None, dtype: str = "float32", device: str = "cpu") -> Subject:
    """Load a model and its tokenizer.

    Args:
        name: name or path for `from_pretrained`; None: the packaged SmolLM2-135M-Instruct.
        dtype: of the weights, by its name in torch.
        device: where the model goes.

    Raises:
        ValueError: for a dtype that torch doesn't have.
    """
    torch_dtype = _read_dtype(dtype)
    if name is None:
        model, tokenizer = load_packaged_model(torch_dtype)
        return Subject("SmolLM2-135M-Instruct", _place(model, device), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
    return Subject(Path(name).name, _place(model, device), AutoTokenizer.from_pretrained(name))


def random_llama(dtype: str = "float32", device: str = "cpu") -> Subject:
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
    torch_dtype = _read_dtype(dtype)
    for weight in model.parameters():  # not the buffers: the frequencies of rotary embeddings stay in float32
        weight.data = weight.data.to(torch_dtype)
    return Subject("random Llama", _place(model, device))


def _read_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={name!r} was asked for; give one of torch's, such as float32 or bfloat16.")
    return dtype


def _place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(device).eval()
    return model
