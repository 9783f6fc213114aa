"""Read a long prompt once, ask several questions about it.

Why: with a contiguous cache every further use of a prefilled prompt takes a deep copy of its keys and values. A fork
of a paged cache shares the pages; a page is copied only when one of the holders writes to it, and that is at most the
last one.

How: `python examples/reuse_prompt.py`.
"""

import time

import torch

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prose

QUESTIONS = ("What is this text about?", "Which programming language is it about?", "Give one keyword that occurs.")


def main() -> None:
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    text = tokenizer(prose()[:3000], return_tensors="pt").input_ids
    prompt = PagedCache.from_model(model, page_size=64)
    start = time.perf_counter()
    with torch.no_grad():
        model(text, past_key_values=prompt, logits_to_keep=1)
    print(f"{text.shape[1]} tokens read in {time.perf_counter() - start:.2f} s: {held(prompt)}")

    answers = []
    for question in QUESTIONS:
        start = time.perf_counter()
        cache = prompt.fork()
        seconds = time.perf_counter() - start
        words = tokenizer(f"\n\nQuestion: {question}\nAnswer:", return_tensors="pt").input_ids
        ids = torch.cat([text, words], dim=1)
        tokens = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0]
        print(f"\nfork took {1e3 * seconds:.2f} ms\n{question} {answer}")
        answers.append(cache)  # keeps its pages

    print(f"\nthe prompt and {len(answers)} continuations: {held(prompt)}")
    print(f"sharing saves {prompt.pool.stats().shared_bytes / 2**20:.1f} MiB")


def held(cache: PagedCache) -> str:
    stats = cache.pool.stats()
    return f"{stats.num_active_pages} pages, {stats.active_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
