"""Threads that generate at the same time, each with a cache of its own, in one pool.

Why: the memory for keys and values is bounded once, for the whole process, and not for each request. Pages go to
whoever needs them now, what one request has computed is found by the others, and a request that ends, or fails, gives
its pages back at once.

How: `python examples/threads.py`. These threads share the cores of one machine, so that they are no faster than one.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import transformers

from hf_paged import OutOfPagesError, PagedCache, PagePool, sample
from hf_paged.packaged import load_packaged_model

INSTRUCTIONS = "Answer in one short sentence. Be friendly, be exact, and if you don't know the answer, say so."
QUESTIONS = (
    "What is the capital of France?",
    "How many legs has a spider?",
    "What do bees make?",
    "Which planet is the largest?",
    "What is ice made of?",
    "Who wrote Hamlet?",
    "What colour is grass?",
    "How many days has a week?",
)
NUM_THREADS = 4


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    pool = PagePool.from_model(model, num_pages=8, page_size=16, prefix_cache=True)  # not enough for all

    def answer(question: str) -> str:
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        while True:
            try:
                with PagedCache(pool=pool) as cache:
                    tokens = model.generate(
                        **inputs, past_key_values=cache, max_new_tokens=16, do_sample=False, custom_generate=sample
                    )
                return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            except OutOfPagesError:  # its pages are free again, and it fits once others are done
                print(f"  {threading.current_thread().name} waits for pages")
                time.sleep(0.5)

    alone = [answer(question) for question in QUESTIONS]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        together = list(threads.map(answer, QUESTIONS))
    for question, text in zip(QUESTIONS, together, strict=True):
        print(f"{question} {text}")
    pool.check_integrity()
    stats = pool.stats()
    print(f"\nthe answers that one thread gives: {'yes' if together == alone else 'no'}")
    print(f"{stats.num_hit_tokens} of {stats.num_looked_up_tokens} tokens of the prompts were found")
    print(f"{stats.num_active_pages} pages are held, {stats.num_cached_pages} of {stats.num_pages} can be found")
    if together != alone:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
