"""Beam search and copies of a cache: what sharing pages saves.

Why: with a contiguous cache every beam holds the whole prompt, every step copies all beams into their new order, and
reusing a prompt takes a deep copy. Beams of a paged cache hold the prompt once and share what they have in common; a
copy holds no page of its own until it is written.

How: `python examples/beams.py`, with `--num-beams`, `--prompt-length`, `--max-new-tokens`. It takes some minutes on
two cores: beams are slow.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache, StoppingCriteria

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.tools.lab.provenance import provenance, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-beams", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--prompt-length", type=int, default=1000, help="in tokens (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per beam (default: %(default)s)")
    parser.add_argument("--copied-length", type=int, default=4000, help="tokens of the cache to copy (%(default)s)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_packaged_model()
    results = provenance() | {"beams": beams(model, tokenizer, args), "copies": copies(model, tokenizer, args)}
    if args.json:
        write_results(args.json, results)


def beams(model, tokenizer, args) -> dict:
    """The same beam search with both caches."""
    ids = torch.tensor(prompts(tokenizer, [args.prompt_length]))
    print(f"{args.num_beams} beams of {args.max_new_tokens} new tokens from {args.prompt_length} ...")
    outputs, seconds = {}, {}
    paged, dynamic = PagedCache.from_model(model, page_size=args.page_size), DynamicCache(config=model.config)
    watch = Watch(paged)
    for attention, cache in (("paged_flex", paged), ("sdpa", dynamic)):
        model.set_attn_implementation(attention)
        start = time.perf_counter()
        outputs[attention] = model.generate(
            ids,
            past_key_values=cache,
            num_beams=args.num_beams,
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            stopping_criteria=[watch] if cache is paged else None,
        )
        seconds[attention] = time.perf_counter() - start
    ours, theirs = outputs["paged_flex"], outputs["sdpa"]
    same = torch.equal(ours.sequences, theirs.sequences)
    score_difference = (ours.sequences_scores - theirs.sequences_scores).abs().max().item()
    dynamic_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    copied = watch.max_copied_pages / args.num_beams
    print(f"same sequences: {'yes' if same else 'no'}; scores differ by at most {score_difference:.1e}")
    print(f"peak of the KV cache: {watch.peak_bytes / 2**20:.1f} MiB; DynamicCache {dynamic_bytes / 2**20:.1f} MiB")
    print(f"ratio {watch.peak_bytes / dynamic_bytes:.3f}; at most {copied:.2f} pages copied per row and step")
    print(f"{seconds['paged_flex']:.1f} s; DynamicCache {seconds['sdpa']:.1f} s")
    if not same:
        sys.exit(1)
    return {
        "num_beams": args.num_beams,
        "prompt_length": args.prompt_length,
        "num_new_tokens": args.max_new_tokens,
        "page_size": args.page_size,
        "same_sequences": same,
        "largest_score_difference": score_difference,
        "peak_MiB": {"PagedCache": watch.peak_bytes / 2**20, "DynamicCache": dynamic_bytes / 2**20},
        "peak_ratio": watch.peak_bytes / dynamic_bytes,
        "max_copied_pages_per_row_and_step": copied,
        "seconds": {"PagedCache": seconds["paged_flex"], "DynamicCache": seconds["sdpa"]},
    }


def copies(model, tokenizer, args) -> dict:
    """A deep copy of both caches, in turn."""
    ids = torch.tensor(prompts(tokenizer, [args.copied_length]))
    paged, dynamic = PagedCache.from_model(model, page_size=args.page_size), DynamicCache(config=model.config)
    seconds = {}
    for attention, cache in (("paged_flex", paged), ("sdpa", dynamic)):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        seconds[cache] = []
    num_held = paged.pool.stats().num_active_pages
    kept = []
    for _ in range(5):
        for cache, times in seconds.items():
            start = time.perf_counter()
            kept.append(copy.deepcopy(cache))
            times.append(time.perf_counter() - start)
        kept = [other for other in kept if isinstance(other, PagedCache)]
    num_new = paged.pool.stats().num_active_pages - num_held
    ours, theirs = statistics.median(seconds[paged]), statistics.median(seconds[dynamic])
    print(f"copy.deepcopy of {args.copied_length} tokens: {1e3 * ours:.3f} ms; DynamicCache {1e3 * theirs:.1f} ms")
    print(f"ratio {theirs / ours:.0f}; {num_new} new pages")
    return {
        "num_tokens": args.copied_length,
        "milliseconds": {"PagedCache": 1e3 * ours, "DynamicCache": 1e3 * theirs},
        "ratio": theirs / ours,
        "num_new_pages": num_new,
    }


class Watch(StoppingCriteria):
    """Looks at the pages after each step; never stops anything."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.peak_bytes = self.max_copied_pages = self.num_copied_pages = 0

    def __call__(self, input_ids, scores, **kwargs):
        stats = self.cache.stats()
        self.peak_bytes = max(self.peak_bytes, stats.active_bytes)
        self.max_copied_pages = max(self.max_copied_pages, stats.num_copied_pages - self.num_copied_pages)
        self.num_copied_pages = stats.num_copied_pages
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


if __name__ == "__main__":
    main()
