"""Generate with a paged KV cache, and see that it gives the same tokens in less memory.

Why: a contiguous cache pads every row of a batch to the longest, and so stores keys and values for tokens that do not
exist. A paged cache stores real tokens only, wherever a page is free. This script puts the two side by side on a real
model: the same tokens, their speed, and their bytes.

How: `make demo`, or `python examples/demo.py --max-new-tokens 32 --page-size 128 --rounds 3`. It needs no network
and no GPU. Let nothing else run meanwhile: threads that wait for a busy core say little about a cache. The first run
converts the packaged model (about half a minute) and compiles FlexAttention (about as long); later runs find both on
disk.
"""

import argparse
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache, StoppingCriteria

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.tools.lab.provenance import provenance, write_results

QUESTION = "Why do operating systems use paged memory? Answer in two sentences."
PROMPT_LENGTHS = (20, 40, 60, 85, 115, 155, 215, 300)


def main() -> None:
    args = parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    transformers.utils.logging.disable_progress_bar()
    setting = provenance()
    print(", ".join(f"{name} {version}" for name, version in setting["versions"].items()))
    print(f"{setting['machine']}, {setting['num_threads']} threads")
    print("Loading SmolLM2-135M-Instruct in float32 ...")
    model, tokenizer = load_packaged_model()
    answer_question(model, tokenizer, args)
    results = compare_ragged_batch(model, tokenizer, args)
    if args.json:
        write_results(args.json, setting | {"ragged_batch": results})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=32, help="generated per row (default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=128, help="tokens per page (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each cache (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures of the batch to FILE")
    return parser.parse_args()


def answer_question(model, tokenizer, args) -> None:
    """One chat question, with both caches."""
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    lengths = {"max_new_tokens": 2 * args.max_new_tokens}

    print("\nThe first paged decoding step compiles FlexAttention, once per machine ...")
    cache = PagedCache.from_model(model, page_size=args.page_size)
    paged, clock = timed_generate(model, "paged_flex", inputs, cache, lengths)
    contiguous, _ = timed_generate(model, "sdpa", inputs, DynamicCache(config=model.config), lengths)

    print(f"took {clock.seconds:.1f} s\n\nQ: {QUESTION}")
    print(f"A: {tokenizer.decode(paged[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}\n")
    require_same_tokens(paged, contiguous)


def compare_ragged_batch(model, tokenizer, args) -> dict:
    """Prompts of very different lengths in one batch: speed and bytes of both caches."""
    batch = {"input_ids": prompts(tokenizer, PROMPT_LENGTHS)}
    inputs = tokenizer.pad(batch, return_tensors="pt")
    # No row may stop early: both caches shall do the same work.
    lengths = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens}
    print(f"\nA batch of {len(PROMPT_LENGTHS)} prompts of {PROMPT_LENGTHS} tokens, {args.max_new_tokens} new each")
    cache = PagedCache.from_model(model, page_size=args.page_size)
    clocks = {"paged_flex": [], "sdpa": []}
    for turn in range(args.rounds + 1):  # the first is a warm-up
        tokens = {}
        for attention in clocks:
            cache.reset()
            dynamic = DynamicCache(config=model.config)
            used = cache if attention == "paged_flex" else dynamic
            tokens[attention], clock = timed_generate(model, attention, inputs, used, lengths)
            clocks[attention].append(clock)
            if attention == "paged_flex":
                stats, picture = cache.stats(), cache.memory_map()
        print(f"round {turn} of {args.rounds}: " + ("warm-up" if turn == 0 else "timed"))
        require_same_tokens(tokens["paged_flex"], tokens["sdpa"])

    def median(attention: str, figure: str) -> float:
        return statistics.median(getattr(clock, figure) for clock in clocks[attention][1:])

    contiguous_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    table = [
        ("first token, s", median("paged_flex", "to_first_token"), median("sdpa", "to_first_token")),
        ("ms per decoding step", median("paged_flex", "ms_per_step"), median("sdpa", "ms_per_step")),
        ("new tokens/s, decoding", *(1e3 * len(PROMPT_LENGTHS) / median(name, "ms_per_step") for name in clocks)),
        ("KV cache, MiB", stats.active_bytes / 2**20, contiguous_bytes / 2**20),
    ]
    print(f"\n{'medians of ' + str(args.rounds):28}{'PagedCache':>14}{'DynamicCache':>14}{'ratio':>8}")
    for name, ours, theirs in table:
        print(f"{name:28}{ours:>14.2f}{theirs:>14.2f}{ours / theirs:>8.2f}")
    print(f"\nReal tokens alone need {stats.minimum_bytes / 2**20:.1f} MiB; pages add {stats.overhead:.1%}.\n")
    print(picture)
    return {
        "prompt_lengths": PROMPT_LENGTHS,
        "num_new_tokens": args.max_new_tokens,
        "page_size": args.page_size,
        "rounds": args.rounds,
        "same_tokens": True,
        "minimum_MiB": round(stats.minimum_bytes / 2**20, 2),
        "overhead": round(stats.overhead, 4),
        "PagedCache": {name: round(ours, 3) for name, ours, _ in table},
        "DynamicCache": {name: round(theirs, 3) for name, _, theirs in table},
    }


class Clock(StoppingCriteria):
    """Looks at the time after each new token; never stops anything."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]

    @property
    def to_first_token(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def ms_per_step(self) -> float:
        steps = [1e3 * (after - before) for before, after in zip(self.times[1:], self.times[2:], strict=False)]
        return statistics.median(steps)


def timed_generate(model, attn_implementation, inputs, cache, lengths) -> tuple[torch.Tensor, Clock]:
    """Generate greedily; give the tokens, and a clock that ran along."""
    model.set_attn_implementation(attn_implementation)
    clock = Clock()
    tokens = model.generate(**inputs, past_key_values=cache, do_sample=False, stopping_criteria=[clock], **lengths)
    return tokens, clock


def require_same_tokens(paged: torch.Tensor, contiguous: torch.Tensor) -> None:
    same = torch.equal(paged, contiguous)
    print(f"same tokens: {'yes' if same else 'no'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
