"""Tiny random models, and the plain path that the paged one is compared with."""

import random
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_paged import PagedCache


def tiny_llama(num_heads=6, num_kv_heads=2, head_dim=16, num_layers=2, dtype=torch.float32) -> LlamaForCausalLM:
    return tiny_model(
        LlamaForCausalLM,
        LlamaConfig,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        num_hidden_layers=num_layers,
    ).to(dtype)


def tiny_model(model_class, config_class, **changes) -> PreTrainedModel:
    """A random model whose logits lie far enough apart for its greedy tokens to be well defined."""
    sizes = {
        "vocab_size": 200,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return model_class(config_class(**(sizes | changes))).eval()


def tiny_gemma(window: int) -> PreTrainedModel:
    """Two layers with a sliding window, and one without between them."""
    return tiny_model(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        sliding_window=window,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,  # as in Llama, so that they share kernels
    )


def paged_cache(model: PreTrainedModel, page_size: int = 16, **arguments) -> PagedCache:
    """An empty cache for a model, which gets the attention for it."""
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, page_size=page_size, **arguments)


def random_ids(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))


def left_padded(num_columns: int, lengths: list[int]) -> Tensor:
    mask = torch.zeros(len(lengths), num_columns, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, num_columns - length :] = 1
    return mask


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, ids: Tensor, splits: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all columns, `(num_rows, num_columns, vocab_size)`, computed in passes of `splits` columns."""
    assert sum(splits) == ids.shape[1]
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits, start = [], 0
    for size in splits:
        stop = start + size
        output = model(
            ids[:, start:stop],
            past_key_values=cache,
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop],
        )
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, dim=1)


def plain(model: PreTrainedModel, ids: Tensor, splits: list[int], mask: Tensor | None = None) -> Tensor:
    """The same with `DynamicCache` and `sdpa`."""
    model.set_attn_implementation("sdpa")
    return run(model, DynamicCache(config=model.config), ids, splits, mask)


def generate(model: PreTrainedModel, attention: str, cache: Cache, ids: Tensor, **arguments) -> Tensor:
    """Greedy tokens."""
    model.set_attn_implementation(attention)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
    return model.generate(ids, past_key_values=cache, **(settings | arguments))


def plain_tokens(model: PreTrainedModel, ids: Tensor, **arguments) -> Tensor:
    """The same with `DynamicCache`, by the fastest attention that the model has."""
    attention = "sdpa" if model._supports_sdpa else "eager"
    return generate(model, attention, DynamicCache(config=model.config), ids, **arguments)


def letter_tokenizer(has_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each letter, space and full stop, of the 200 that tiny models know."""
    vocab = {"<unk>": 0, "<s>": 1} | {letter: 100 + index for index, letter in enumerate(ascii_lowercase + " .")}
    letters = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    if has_bos:
        letters.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", unk_token="<unk>")


def letters(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(ascii_lowercase + " .", k=count))
