"""Requests behind one system prompt: how soon the first token comes, with a prefix cache and without.

Why: a service computes its system prompt, with its tools and examples, again for each request. In a pool with a prefix
cache a prompt finds the pages of all that it begins with, and computes only the rest.

How: `python examples/shared_prefix.py`.
"""

import time

import transformers

from hf_paged import PagedCache, PagePool, sample
from hf_paged.packaged import load_packaged_model, prose

SYSTEM = "You answer questions about this manual.\n\n" + prose()[:2500]
QUESTIONS = ("What does assert do?", "When is an error raised?", "What is a target list?", "Name one statement.")


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    beginning = tokenizer(SYSTEM[:400], return_tensors="pt")
    tried = PagePool.from_model(model, page_size=16, prefix_cache=True)
    for _ in range(2):  # compiles attention: that of a decoding step, then that of a prompt that finds its beginning
        with PagedCache(pool=tried) as cache:
            model.generate(**beginning, past_key_values=cache, max_new_tokens=2, custom_generate=sample)
    pools = {
        "with": PagePool.from_model(model, num_pages=200, page_size=16, prefix_cache=True),
        "without": PagePool.from_model(model, num_pages=200, page_size=16),
    }
    for question in QUESTIONS:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        seconds, answers = {}, {}
        for name, pool in pools.items():
            with PagedCache(pool=pool) as cache:
                settings = {"past_key_values": cache, "do_sample": False, "custom_generate": sample}
                start = time.perf_counter()
                tokens = model.generate(**inputs, max_new_tokens=1, **settings)
                seconds[name] = time.perf_counter() - start
                tokens = model.generate(tokens, max_new_tokens=15, **settings)
            answers[name] = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        print(f"{question} {answers['with']}")
        print("first token: " + ", ".join(f"{1e3 * taken:.0f} ms {name}" for name, taken in seconds.items()))
        if answers["with"] != answers["without"]:
            raise SystemExit("The answers differ.")

    stats = pools["with"].stats()
    print(f"\n{stats.num_hit_tokens} of {stats.num_looked_up_tokens} tokens were found, not computed.")
    print(f"{stats.num_cached_pages} pages are kept for the next request, until others need them.")


if __name__ == "__main__":
    main()
