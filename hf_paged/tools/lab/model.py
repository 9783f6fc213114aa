"""A model that is measured, and text for it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_paged.packaged import load_packaged_model, prompts

_SEED = 0
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_3 = _LLAMA | {"vocab_size": 128256, "intermediate_size": 14336}
_ATTENTION_OF_LFM2 = 2, 5, 8, 10, 12, 14

SHAPES: dict[str, dict[str, Any]] = {
    # Small enough for prompts of 100,000 tokens on a CPU; its weights keep the logits apart.
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-3.2-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama-3-8b": _LLAMA_3,
    "llama-2-7b": _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
    # Layers that convolve beside layers of attention.
    "lfm2-350m": {"model_type": "lfm2", "vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 6656}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    | {"layer_types": ["full_attention" if layer in _ATTENTION_OF_LFM2 else "conv" for layer in range(16)]}
    | {"num_hidden_layers": 16},
    # A recurrent state and attention in each layer.
    "falcon-h1-0.5b": {"model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024, "intermediate_size": 2048}
    | {"num_hidden_layers": 36, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    | {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
    # Latent attention as large as DeepSeek-V3's, in two layers with a small MLP.
    "deepseek-v3-2-layers": {"model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 7168}
    | {"intermediate_size": 2048, "num_hidden_layers": 2, "first_k_dense_replace": 2, "num_attention_heads": 128}
    | {"num_key_value_heads": 128},
}
"""Configurations of models that are measured with random weights, Llamas unless they say otherwise; `tiny` is for
trying out."""


@dataclass(frozen=True)
class MeasuredModel:
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
        """Positions that the model knows; without a bound the largest number that an index may be."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", sys.maxsize)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def prompt(self, length: int) -> Tensor:
        """One prompt, `(1, length)`."""
        return self.padded([length])[0]

    def padded(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Distinct prompts, padded on the left: token ids and mask, each `(len(lengths), max(lengths))`."""
        if self.tokenizer is not None:
            return padded(prompts(self.tokenizer, lengths), self.device)
        generator = torch.Generator().manual_seed(_SEED)
        vocab_size = self.model.config.vocab_size
        return padded(
            [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths], self.device
        )

    def contexts(self, asked: Sequence[int] | None, default: Sequence[int], max_new_tokens: int) -> list[int]:
        """The context lengths asked for, or else the default ones that leave room for the new tokens.

        Raises:
            ValueError: if one that is asked for leaves none, or none of the default ones does.
        """
        chosen = sorted(set(default if asked is None else asked))
        fitting = [context for context in chosen if context + max_new_tokens <= self.max_length]
        if asked is not None or not fitting:
            self.check_room(chosen, max_new_tokens)
        return fitting

    def check_room(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Raise ValueError unless the model has positions for prompts of these lengths and the new tokens."""
        room = self.max_length - max_new_tokens
        if beyond := [length for length in lengths if length > room]:
            raise ValueError(
                f"Prompts of {', '.join(map(str, beyond))} tokens and {max_new_tokens} new ones were asked for, but "
                f"{self.name} has {self.max_length} positions. Ask for {room} tokens at most, or for fewer new ones."
            )


def padded(prompts: Sequence[Sequence[int]], device: torch.device, side: str = "left") -> tuple[Tensor, Tensor]:
    """Lay prompts out as rows: token ids and mask, each `(len(prompts), longest)`; padding is 0 in both."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids, mask = (
        pad_sequence(each, batch_first=True, padding_side=side) for each in (rows, list(map(torch.ones_like, rows)))
    )
    return ids.to(device), mask.to(device)


def load_model(name: str | None = None, dtype: str = "float32", device: str | torch.device = "cpu") -> MeasuredModel:
    """Load a model and its tokenizer.

    Args:
        name: name or path for `from_pretrained`; None: the packaged SmolLM2-135M-Instruct.
        dtype: of the weights, by its name in torch.
        device: where the model goes.

    Raises:
        ValueError: for a dtype that torch doesn't have, or a model that can't be loaded.
    """
    torch_dtype = _read_dtype(dtype)
    if name is None:
        model, tokenizer = load_packaged_model(torch_dtype)
        return MeasuredModel("SmolLM2-135M-Instruct", _place(model, device), tokenizer)
    try:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype),
            AutoTokenizer.from_pretrained(name),
        )
    except (OSError, ValueError) as error:
        is_missing = name.startswith((".", "/", "~")) and not Path(name).exists()
        reason = "there is no such folder." if is_missing else str(error).partition("\n")[0]
        raise ValueError(f"The model {name!r} can't be loaded: {reason}") from error
    return MeasuredModel(Path(name).name, _place(model, device), tokenizer)


def random_model(dtype: str = "float32", device: str | torch.device = "cpu", shape: str = "tiny") -> MeasuredModel:
    """Make a model of 131,072 positions on a device; its random weights are the same in all runs there."""
    sizes: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 131072, "pad_token_id": 0}
    config = AutoConfig.for_model(**sizes | SHAPES[shape])
    torch_dtype = _read_dtype(dtype)
    torch.manual_seed(_SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)  # type: ignore[no-untyped-call]
    return MeasuredModel("random Llama" if shape == "tiny" else shape, model.eval())


def _read_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={name!r} was asked for; give one of torch's, such as float32 or bfloat16.")
    return dtype


def _place(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(device).eval()
    return model
