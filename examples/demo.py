"""Generate with a paged KV cache, and see that it gives the same tokens in less memory.

Why: a contiguous cache pads every row of a batch to the longest, and so stores keys and values for tokens that do not
exist. A paged cache stores real tokens only, wherever a page is free. This script puts the two side by side on a real
model: the same tokens, their speed, and their bytes.

How: `make demo`, or `python examples/demo.py --max-new-tokens 64 --page-size 128 --rounds 3`. It needs no network
and no GPU. The first run converts the packaged model (about half a minute); every run compiles FlexAttention once.
"""

import argparse
import platform
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache

import hf_paged
from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prompts

QUESTION = "Why do operating systems use paged memory? Answer in two sentences."
PROMPT_LENGTHS = (40, 80, 120, 170, 230, 310, 430, 600)


def main() -> None:
    args = parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"hf-paged {hf_paged.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads"
    )
    print("Loading SmolLM2-135M-Instruct in float32 ...")
    model, tokenizer = load_packaged_model()
    answer_question(model, tokenizer, args)
    compare_ragged_batch(model, tokenizer, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=64, help="generated per row (default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=128, help="tokens per page (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each cache (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, help="CPU threads (default: torch's choice)")
    return parser.parse_args()


def answer_question(model, tokenizer, args) -> None:
    """One chat question, with both caches."""
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    lengths = {"max_new_tokens": args.max_new_tokens}

    print("\nThe first paged call compiles FlexAttention: 15 to 40 seconds, once ...")
    cache = PagedCache.from_model(model, page_size=args.page_size)
    paged, seconds = timed_generate(model, "paged_flex", inputs, cache, lengths)
    contiguous, _ = timed_generate(model, "sdpa", inputs, DynamicCache(config=model.config), lengths)

    print(f"took {seconds:.1f} s\n\nQ: {QUESTION}")
    print(f"A: {tokenizer.decode(paged[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}\n")
    require_same_tokens(paged, contiguous)


def compare_ragged_batch(model, tokenizer, args) -> None:
    """Prompts of very different lengths in one batch: speed and bytes of both caches."""
    batch = {"input_ids": prompts(tokenizer, PROMPT_LENGTHS)}
    inputs = tokenizer.pad(batch, return_tensors="pt")
    # No row may stop early: both caches shall do the same work.
    lengths = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens}
    num_new_tokens = len(PROMPT_LENGTHS) * args.max_new_tokens
    cache = PagedCache.from_model(model, page_size=args.page_size)

    print(
        f"\nA batch of {len(PROMPT_LENGTHS)} prompts of {PROMPT_LENGTHS} tokens, {args.max_new_tokens} new tokens each"
    )
    paged, paged_seconds = timed_generate(model, "paged_flex", inputs, cache, lengths)
    dynamic = DynamicCache(config=model.config)
    contiguous, contiguous_seconds = timed_generate(model, "sdpa", inputs, dynamic, lengths)
    print(f"Warm-up: paged {paged_seconds:.1f} s, with compilation; contiguous {contiguous_seconds:.1f} s")
    require_same_tokens(paged, contiguous)

    paged_speeds, contiguous_speeds = [], []
    for _ in range(args.rounds):
        cache.reset()
        _, seconds = timed_generate(model, "paged_flex", inputs, cache, lengths)
        paged_speeds.append(num_new_tokens / seconds)
        dynamic = DynamicCache(config=model.config)
        _, seconds = timed_generate(model, "sdpa", inputs, dynamic, lengths)
        contiguous_speeds.append(num_new_tokens / seconds)
    print_comparison(
        cache, dynamic, statistics.median(paged_speeds), statistics.median(contiguous_speeds), args.rounds
    )


def print_comparison(cache, dynamic, paged_speed: float, contiguous_speed: float, rounds: int) -> None:
    stats = cache.stats()
    contiguous_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    print(f"\n{'':36}{'paged_flex':>14}{'DynamicCache':>14}{'ratio':>8}")
    rows = [
        (f"new tokens/s, median of {rounds}", paged_speed, contiguous_speed, ".1f"),
        ("KV cache, MiB", stats.active_bytes / 2**20, contiguous_bytes / 2**20, ".1f"),
    ]
    for name, ours, theirs, form in rows:
        print(f"{name:36}{ours:>14{form}}{theirs:>14{form}}{ours / theirs:>8.2f}")
    print(f"\nReal tokens alone need {stats.minimum_bytes / 2**20:.1f} MiB; paging adds {stats.overhead:.1%}.\n")
    print(cache.memory_map())


def timed_generate(model, attn_implementation, inputs, cache, lengths) -> tuple[torch.Tensor, float]:
    """Generate greedily; give the tokens, and the seconds with prefill."""
    model.set_attn_implementation(attn_implementation)
    start = time.perf_counter()
    tokens = model.generate(**inputs, past_key_values=cache, do_sample=False, **lengths)
    return tokens, time.perf_counter() - start


def require_same_tokens(paged: torch.Tensor, contiguous: torch.Tensor) -> None:
    same = torch.equal(paged, contiguous)
    print(f"same tokens: {'yes' if same else 'no'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
