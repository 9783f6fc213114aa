"""Plausible mistakes, and what each is answered: what was asked, what was found, what to do."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BartConfig, DynamicCache, EncoderDecoderCache, LlamaConfig, pipeline

from hf_paged import (
    PagedCache,
    PagedEncoderDecoderCache,
    PagePool,
    ReleaseFinished,
    compiled,
    enable,
    gather_weights,
    sample,
)
from tests.models import generate, left_padded, letter_tokenizer, random_ids, tiny_llama

IDS, MASK = random_ids(2, 20), left_padded(20, [20, 11])
BART = {
    "vocab_size": 200,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
MLLAMA = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
GPT_NEO = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]]}
GPT2 = {"n_layer": 2, "n_embd": 48, "n_head": 3}


def llama(attention="paged_flex", **sizes):
    model = tiny_llama(**sizes)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def bart():
    return transformers.BartForConditionalGeneration(BartConfig(**BART)).eval()


def checkpointed(attention="paged_flex"):
    model = llama(attention).train()
    model.gradient_checkpointing_enable()
    return model


def bart_checkpointed():
    model = bart().train()
    model.gradient_checkpointing_enable()
    return model


def cache_of(model, **arguments):
    return PagedCache.from_model(model, page_size=16, **arguments)


def run(model, cache, ids=IDS, **arguments):
    return generate(model, model.config._attn_implementation, cache, ids, max_new_tokens=3, **arguments)


def filled(cache):
    """Two rows of 17 tokens."""
    keys = torch.randn(2, 2, 17, 16)
    for layer in range(len(cache)):
        cache.update(keys, keys, layer)
    return cache


def gpt2_keys():
    return torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)


def with_pipeline():
    return pipeline("text-generation", model=llama(), tokenizer=letter_tokenizer())


def twice(cache, layer=0):
    keys = torch.randn(2, 2, 17, 16)
    cache.update(keys, keys, layer)
    cache.update(keys, keys, layer)


def written_with(**changes):
    """Give a layer keys that are made from ordinary ones."""

    def write():
        keys = torch.randn(1, 2, 5, 16)
        cache_of(llama()).update(changes["keys"](keys), changes.get("values", changes["keys"])(keys), 0)

    return write


def set_by_hand(model):
    model.config._attn_implementation = "paged_flex"
    return PagedCache.from_model(model)


MISTAKES = {
    # what was given to whom
    "PagedCache(model)": (lambda: PagedCache(llama()), "but a LlamaForCausalLM was given. Pass model.config, or call"),
    "PagedCache('gpt2')": (lambda: PagedCache("gpt2"), "A model's configuration is needed, but a str was given"),
    "PagedCache(dict)": (
        lambda: PagedCache({"num_hidden_layers": 2}),
        "configuration is needed, but a dict was given",
    ),
    "PagedCache()": (lambda: PagedCache(), "needs either a model's config or a pool"),
    "PagePool(model)": (lambda: PagePool(llama()), "but a LlamaForCausalLM was given. Pass model.config"),
    "pool=cache": (lambda: PagedCache(pool=cache_of(llama())), "was given a PagedCache, but it takes a PagePool"),
    "from_model(config)": (
        lambda: PagedCache.from_model(LlamaConfig()),
        "was given a LlamaConfig, but it takes a model of Transformers. With a configuration alone, use PagedCache(",
    ),
    "from_model(name)": (
        lambda: PagedCache.from_model("gpt2"),
        "was given a str, but it takes a model of Transformers. Load it: AutoModelForCausalLM.from_pretrained('gpt2'",
    ),
    "from_model(path)": (
        lambda: PagedCache.from_model(Path("a/b")),
        "Load it: AutoModelForCausalLM.from_pretrained(",
    ),
    "from_model(pipeline)": (
        lambda: PagedCache.from_model(with_pipeline()),
        "was given a TextGenerationPipeline, but it takes a model of Transformers. Pass the model that it h",
    ),
    "from_model(module)": (
        lambda: PagedCache.from_model(torch.nn.Linear(2, 2)),
        "was given a Linear, but it takes a model of Transformers. Pass the part of it that has a configuration",
    ),
    "from_model(None)": (
        lambda: PagedCache.from_model(None),
        "was given a NoneType, but it takes a model of Transformers. Pass what AutoModelForCausalLM.from_pretrained()",
    ),
    "PagePool.from_model(config)": (
        lambda: PagePool.from_model(LlamaConfig()),
        "PagePool.from_model() was given a LlamaConfig, but it takes a model",
    ),
    "prefill(pipeline)": (
        lambda: cache_of(llama()).prefill(with_pipeline(), IDS),
        "prefill() was given a TextGenerationPipeline, but it takes a model of Transformers. Pass the model that it h",
    ),
    "compiled(pipeline)": (
        lambda: compiled(with_pipeline()).__enter__(),
        "compiled() was given a TextGenerationPipeline, but it takes a model",
    ),
    "enable(pipeline)": (
        lambda: enable(with_pipeline()),
        "enable() was given a TextGenerationPipeline, but it takes a model of Transformers. Pass the model that it h",
    ),
    "gather_weights(name)": (
        lambda: gather_weights("gpt2"),
        "gather_weights() was given a str, but it takes a model of Transformers. Load it",
    ),
    "ReleaseFinished(model)": (
        lambda: ReleaseFinished(llama(), 2),
        "ReleaseFinished was given a LlamaForCausalLM, but it takes the cache that generate() is given",
    ),
    "a pool for a cache": (
        lambda: run(llama(), PagePool.from_model(llama())),
        "make one that holds pages of it: PagedCache(pool=pool)",
    ),
    # how many pages
    "num_pages=1.5": (lambda: cache_of(llama(), num_pages=1.5), "num_pages=1.5 was asked for, but a whole number"),
    "num_pages='8'": (lambda: cache_of(llama(), num_pages="8"), "num_pages='8' was asked for, but a whole number"),
    "num_pages=0": (
        lambda: cache_of(llama(), num_pages=0),
        "num_pages=0 was asked for, but a whole number of at leas",
    ),
    "page_size=100": (lambda: PagedCache.from_model(llama(), page_size=100), "choose one of 16, 32, 64, 128, 256"),
    "page_size=16.0": (lambda: PagedCache.from_model(llama(), page_size=16.0), "page_size=16.0 was asked for"),
    "num_pages=10**9": (
        lambda: cache_of(llama(), num_pages=10**9),
        "num_pages=1000000000 was asked for, which takes at least 3,814.7 GiB in pages of 16 tokens, but there are ",
    ),
    "num_pages=10**7 of a configuration in words of its own": (
        lambda: PagedCache(transformers.GPT2Config(**GPT2), num_pages=10**7).update(*gpt2_keys(), 0),
        "GiB of memory on cpu. Ask for fewer, or for a part of the memory: PagePool.from_model(model, ",
    ),
    "memory_fraction=90": (
        lambda: PagePool.from_model(llama(), memory_fraction=90),
        "memory_fraction=90 were asked for, but one of them is needed, and a fraction is above 0 and below 1",
    ),
    "watermark=-1": (lambda: PagePool(llama().config, watermark=-1), "watermark=-1 was asked for, but a whole number"),
    "num_pages beside a pool": (
        lambda: PagedCache(pool=PagePool(llama().config), num_pages=8),
        "were asked for beside a pool, which has 0 pages of 128 tokens. Give them to PagePool instead",
    ),
    # models
    "a codec's configuration": (
        lambda: PagedCache(transformers.EncodecConfig()),
        "this 'encodec' model says nothing of a decoder's layers",
    ),
    "recurrent state": (
        lambda: PagedCache(transformers.MambaConfig(num_hidden_layers=2)),
        "which keeps another state",
    ),
    "keys of images": (
        lambda: PagedCache(transformers.MllamaConfig(text_config=MLLAMA)),
        r"layers [1, 3] of this 'mllama' model keep those of its images instead. Use Transformers' DynamicCache(",
    ),
    "keys of images, the text part alone": (
        lambda: PagedCache(transformers.models.mllama.MllamaTextConfig(**MLLAMA)),
        "layers [1, 3] of this 'mllama_text_model' model keep those of its images instead",
    ),
    "an encoder, without room for it": (
        lambda: PagedCache(BartConfig(**BART)),
        "Use PagedCache.from_model(model), or",
    ),
    "a cache around the cache": (
        lambda: bart().generate(
            IDS, past_key_values=EncoderDecoderCache(PagedCache.from_model(bart()), DynamicCache()), max_new_tokens=2
        ),
        "it needs no EncoderDecoderCache around it",
    ),
    "an encoder's cache for a decoder": (
        lambda: run(llama(), PagedEncoderDecoderCache(BartConfig(**BART))),
        "Pass the cache to a model with an encoder",
    ),
    "a layer updated twice": (lambda: twice(cache_of(llama())), "Layer 0 was updated twice in one forward pass"),
    "attention by itself, set by hand": (
        lambda: set_by_hand(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**GPT_NEO))),
        "it computes attention by itself instead of through Transformers' attention interface",
    ),
    "attention weights": (
        lambda: run(llama(), cache_of(llama()), output_attentions=True, return_dict_in_generate=True),
        "output_attentions",
    ),
    # modes of torch
    "training with gradients": (
        lambda: llama().requires_grad_()(IDS, past_key_values=cache_of(llama())),
        "Keys that require gradients were given to a PagedCache",
    ),
    "checkpointing": (
        lambda: run(checkpointed(), cache_of(llama())),
        "on a LlamaForCausalLM in training mode with gradient checkpointing, where Transformers takes the cache away",
    ),
    "checkpointing, with sdpa": (
        lambda: run(checkpointed("sdpa"), cache_of(llama())),
        "every token would be computed without those before it. Call model.eval() before generating, and model.train(",
    ),
    "checkpointing, an encoder-decoder": (
        lambda: bart_checkpointed().generate(IDS, past_key_values=PagedCache.from_model(bart()), max_new_tokens=2),
        "on a BartForConditionalGeneration in training mode with gradient checkpointing",
    ),
    "checkpointing, enabled": (
        lambda: enable(checkpointed("sdpa")).generate(IDS, max_new_tokens=2),
        "on a LlamaForCausalLM in training mode with gradient checkpointing",
    ),
    "checkpointing, a pass": (
        lambda: checkpointed()(IDS, past_key_values=cache_of(llama())),
        "in training mode over keys that were not given to the PagedCache",
    ),
    "checkpointing, a padded pass": (
        lambda: checkpointed()(IDS, past_key_values=cache_of(llama()), attention_mask=MASK),
        "Call model.eval() before generating",
    ),
    "compiled in training mode": (lambda: compiled(llama().train()).__enter__(), "Call model.eval()"),
    "compiled(model).generate": (
        lambda: compiled(llama()).generate(IDS),
        "was asked for its 'generate', but it is a context. Write `with compiled(model): model.generate(...)`",
    ),
    "compiled(model)(ids)": (lambda: compiled(llama())(IDS), "was called like a model, but it is a context"),
    "sparse keys": (written_with(keys=lambda keys: keys.to_sparse()), "as a sparse tensor (torch.sparse_coo)"),
    "sparse values": (
        written_with(keys=lambda keys: keys, values=lambda values: values.to_sparse()),
        "as a sparse tensor (torch.sparse_coo)",
    ),
    "quantised keys": (
        written_with(keys=lambda keys: torch.quantize_per_tensor(keys, 0.1, 0, torch.qint8)),
        "as a quantised tensor (torch.qint8)",
    ),
    "nested keys": (
        written_with(keys=lambda keys: torch.nested.nested_tensor(list(keys), layout=torch.jagged)),
        "as a NestedTensor",
    ),
    "nested keys, strided": (
        written_with(keys=lambda keys: torch.nested.nested_tensor(list(keys))),
        "a nested tensor",
    ),
    # calls
    "prefill(text)": (
        lambda: cache_of(llama()).prefill(llama(), "hello"),
        "prefill() was given a str as input_ids, but it takes a tensor of token ids: cache.prefill(model, **",
    ),
    "prefill(inputs)": (
        lambda: cache_of(llama()).prefill(llama(), letter_tokenizer()("hello", return_tensors="pt")),
        "prefill() was given a BatchEncoding as input_ids",
    ),
    "prefill(max_new_tokens)": (
        lambda: cache_of(llama()).prefill(llama(), IDS, max_new_tokens=3),
        "prefill() was given max_new_tokens, but it only takes what the model is to be given",
    ),
    "prefill(one row)": (
        lambda: cache_of(llama()).prefill(llama(), IDS[0]),
        "input_ids has shape (20,), but prefill() needs (num_rows, num_columns)",
    ),
    "beams in the loop": (
        lambda: run(llama(), cache_of(llama()), custom_generate=sample, num_beams=2),
        "decodes greedily and samples, but this call asks for beam search",
    ),
    "a deeper model": (
        lambda: run(llama(num_layers=3), cache_of(llama())),
        "A model of 3 layers was given a PagedCache that was made for a model of 2 layers",
    ),
    "other heads": (
        lambda: run(llama(num_heads=8, num_kv_heads=4), filled(cache_of(llama()))),
        "Layer 0 was given key heads and head size (4, 16), but this cache holds (2, 16)",
    ),
    "a layer that there is not": (
        lambda: cache_of(llama()).gather(7),
        "Layer 7 stores no keys and values; th",
    ),
    "pickle": (
        lambda: pickle.dumps(cache_of(llama())),
        "A PagedCache can't be pickled: its pages belong to a pool",
    ),
    "crop(-1.0)": (lambda: filled(cache_of(llama())).crop(-1.0), "'float' object cannot be interpreted as an integer"),
    "release(7)": (lambda: filled(cache_of(llama())).release([7]), "Rows [7] were asked for, but this cache holds 2"),
    "crop(5)": (lambda: filled(cache_of(llama())).crop(5), "call crop(n - cache.get_seq_length())"),
    "crop(-18)": (lambda: filled(cache_of(llama())).crop(-18), "Give 0 or a negative number, not below -17"),
    "a row too many": (lambda: filled(cache_of(llama())).reorder_cache(torch.tensor([0, 2])), "holds 2 rows"),
    "crop of a layer": (lambda: filled(cache_of(llama())).layers[0].crop(-1), "the layers of a PagedCache share"),
    "another batch": (
        lambda: run(llama(), filled(cache_of(llama())), random_ids(3, 20)),
        "holds 2 rows, but a batch o",
    ),
    "nothing new": (lambda: run(llama(), filled(cache_of(llama())), IDS[:, :17]), "so no token is left to compute"),
    "no end": (lambda: ReleaseFinished(cache_of(llama())), "Pass eos_token_id=model.generation_config.eos_token_id"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises((ValueError, AttributeError, TypeError), match=re.escape(message)):
        call()
