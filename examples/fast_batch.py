"""A ragged batch as fast as it goes: prompts packed without padding, and everything compiled.

Why: a padded batch computes its padding too, and a decoding step on a CPU reads the weights at half of what the memory
gives. `cache.prefill()` computes the real tokens alone; within `compiled(model)` both the prompts and the decoding
steps are compiled graphs that read each weight once.

How: `python examples/fast_batch.py`, with `--max-new-tokens`. The first run compiles for about a minute; later runs
find the graphs on disk.
"""

import argparse
import sys
import time

import torch
import transformers
from transformers import DynamicCache

from hf_paged import PagedCache, compiled, gather_weights
from hf_paged.packaged import load_packaged_model, prompts

PROMPT_LENGTHS = (30, 60, 110, 200, 300, 400, 500, 600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=32, help="generated per row (default: %(default)s)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_packaged_model()
    inputs = tokenizer.pad({"input_ids": prompts(tokenizer, PROMPT_LENGTHS)}, return_tensors="pt")
    lengths = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens, "do_sample": False}

    print(f"{len(PROMPT_LENGTHS)} prompts of {PROMPT_LENGTHS} tokens, {args.max_new_tokens} new each")
    model.set_attn_implementation("sdpa")
    start = time.perf_counter()
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **lengths)
    padded = time.perf_counter() - start
    print(f"DynamicCache, padded: {padded:.1f} s")

    model.set_attn_implementation("paged_flex")
    gather_weights(model)
    with compiled(model):
        for turn in ("compiling or looking up", "compiled"):
            start = time.perf_counter()
            cache = PagedCache.from_model(model)
            cache.prefill(model, **inputs)
            tokens = model.generate(**inputs, past_key_values=cache, **lengths)
            packed = time.perf_counter() - start
            print(f"PagedCache, packed, {turn}: {packed:.1f} s")
    same = torch.equal(tokens, expected)
    print(f"{padded / packed:.1f} times as fast, same tokens: {'yes' if same else 'no'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
