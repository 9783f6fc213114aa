"""Threads that generate while another one compiles: every result is compared with `DynamicCache`.

    python -m tests.stress_threads [generations]

Four threads generate from caches of their own, every other time on a pool that they share, and two of them enter and
leave `compiled(model)` all the time. A fifth compiles other things. It prints what came out and how often.
"""

import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from itertools import count

import torch
from transformers import DynamicCache

from hf_paged import PagedCache, PagePool, compiled
from tests.models import generate, left_padded, random_ids, tiny_llama

NUM_THREADS = 4
PROMPTS = [(1, [9]), (1, [33]), (3, [20, 1, 16]), (2, [17, 15]), (4, [5, 40, 16, 2]), (1, [64])]
"""Rows, and the length of each: on both sides of the edges of a page."""


class Stress:
    """Generations by several threads.

    Args:
        num_generations: of all threads together.
        backend: what to compile other things with.
        max_new_tokens: of a generation.
    """

    def __init__(self, num_generations: int, backend: str = "inductor", max_new_tokens: int = 6) -> None:
        self.seen: Counter[str] = Counter()
        self.num_compiled = 0
        self._tickets = iter(range(num_generations))
        self._backend = backend
        self._arguments = {"max_new_tokens": max_new_tokens}
        self._model = tiny_llama()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._inputs, self._expected = [], []
        for seed, (num_rows, lengths) in enumerate(PROMPTS):
            ids, mask = random_ids(num_rows, max(lengths), seed), left_padded(max(lengths), lengths)
            cache = DynamicCache(config=self._model.config)
            self._inputs.append((ids, mask))
            self._expected.append(generate(self._model, "sdpa", cache, ids, attention_mask=mask, **self._arguments))
        self._model.set_attn_implementation("paged_flex")
        self._pool = PagePool(self._model.config, page_size=16)

    def run(self) -> Counter[str]:
        """Run all threads; return how often each result came out."""
        with compiled(self._model):  # the weights must not move while a thread runs the model
            pass
        users = [threading.Thread(target=self._generate, args=(number,)) for number in range(NUM_THREADS)]
        compiler = threading.Thread(target=self._compile)
        for thread in (*users, compiler):
            thread.start()
        for thread in users:
            thread.join()
        self._is_over.set()
        compiler.join()
        self._pool.check_integrity()
        if self._model.generation_config.compile_config is not None:
            self.seen["left compiled"] += 1
        return self.seen

    def _generate(self, number: int) -> None:
        for turn in count():
            with self._lock:
                if next(self._tickets, None) is None:
                    return
            which = (turn + number) % len(PROMPTS)
            try:
                result = self._one(which, is_shared=turn % 2 == 1, is_compiled=number < 2)
            except Exception as error:
                result = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            with self._lock:
                self.seen[result] += 1
                if sum(self.seen.values()) % 100 == 0:
                    print(dict(self.seen), self.num_compiled, flush=True)

    def _one(self, which: int, is_shared: bool, is_compiled: bool) -> str:
        ids, mask = self._inputs[which]
        cache = PagedCache(pool=self._pool) if is_shared else PagedCache.from_model(self._model, page_size=16)
        with compiled(self._model) if is_compiled else nullcontext():
            if which % 2:
                cache.prefill(self._model, ids, mask)
            tokens = self._model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                disable_compile=not is_compiled,
                **self._arguments,
            )
        return "same tokens" if torch.equal(tokens, self._expected[which]) else "OTHER TOKENS"

    def _compile(self) -> None:
        while not self._is_over.is_set():
            size = 8 + self.num_compiled % 40
            layers = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.GELU(), torch.nn.Linear(size, size))
            x = torch.randn(3, size)
            with torch.no_grad():
                torch.testing.assert_close(torch.compile(layers, backend=self._backend)(x), layers(x))
            self.num_compiled += 1


def main() -> None:
    """Run it, and print what came out."""
    warnings.simplefilter("ignore")
    stress = Stress(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    begin = time.perf_counter()
    for result, times in stress.run().most_common():
        print(f"{times:6}  {result}")
    print(f"{stress.num_compiled} other compilations, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
