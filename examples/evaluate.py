"""Does paging change what a model says, and what does it save?

Why: anyone can check both claims on a model and a text of their own. Perplexity is computed through both caches
on the same chunks; the audit accounts for the memory after every forward pass, and asks the system whether it is so.

How: `python examples/evaluate.py [TEXT_FILE]`; without a file, on the packaged prose.
"""

import sys

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.tools.evaluation import MemoryAudit, perplexity
from hf_paged.tools.evaluation.texts import load_texts

PROMPT_LENGTHS = (5, 40, 200)


def main(file: str | None = None) -> None:
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    result = perplexity(model, tokenizer, load_texts(file), max_length=512, chunk_size=64, max_tokens=256)
    contiguous, paged = result["dynamic"], result["paged"]
    print(f"{result.num_tokens} tokens: perplexity {contiguous.perplexity:.6f}, paged {paged.perplexity:.6f}")
    print(f"largest difference of a logit {paged.max_logit_difference:.1e}, KL divergence {paged.kl:.1e} nats\n")

    batch = tokenizer.pad({"input_ids": prompts(tokenizer, PROMPT_LENGTHS)}, return_tensors="pt")
    cache = PagedCache.from_model(model, page_size=16)
    with MemoryAudit(model, cache) as audit:
        model.generate(**batch, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(audit.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
