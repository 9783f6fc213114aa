"""A file of prompts on several devices: each Ray actor holds a model and a pool, and answers what it is handed.

Why: `generate_many` keeps one device busy. To share prompts out among devices and machines, to start actors again that
died, and to hand their prompts to others is what Ray Data is for; nothing of it is written here.

How: `pip install 'ray[data]'`, then `python examples/ray_batch.py --actors 2`. `--prompts FILE` takes JSON lines with
a "prompt" each, and `--out FOLDER` writes JSON lines with an "answer" beside it. Each actor takes one GPU where there
are any, else its share of the processors. On a cluster, set RAY_ADDRESS. An actor that dies takes at most one batch of
prompts with it, which another one answers.
"""

import argparse
import os
from typing import Any

import numpy as np
import ray
import torch

from hf_paged import PagePool, generate_many
from hf_paged.packaged import load_packaged_model

BATCH = 16  # prompts that an actor is handed, and that are answered anew if it dies
SUBJECTS = ("iterators", "generators", "dictionaries", "exceptions", "modules", "decorators", "threads", "files")
QUESTIONS = ("What are {} for?", "Show me {} in one line.", "Who needs {}?", "What is hard about {}?")


class Answerer:
    """A model and a pool, which stay from one batch of prompts to the next.

    Args:
        max_new_tokens: of each answer.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        model, self._tokenizer = load_packaged_model(attn_implementation="paged_flex")
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._pool = PagePool.from_model(self._model, page_size=32, prefix_cache=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chats = [[{"role": "user", "content": str(prompt)}] for prompt in batch["prompt"]]
        prompts = self._tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True).input_ids
        settings = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
        with generate_many(self._model, prompts, pool=self._pool, **settings) as answers:
            results = answers.in_order()
        texts = [self._tokenizer.decode(result.tokens, skip_special_tokens=True) for result in results]
        errors = [str(result.error or "") for result in results]
        return batch | {
            "answer": np.array(texts, dtype=object),
            "error": np.array(errors, dtype=object),
            "actor": np.full(len(results), os.getpid()),
        }


def answered(
    prompts: ray.data.Dataset, actors: int, max_new_tokens: int, answerer: Any = Answerer
) -> ray.data.Dataset:
    """Prompts with their answers, which are computed when they are asked for."""
    has_gpu = torch.cuda.is_available()
    return prompts.map_batches(
        answerer,
        fn_constructor_kwargs={"max_new_tokens": max_new_tokens},
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if has_gpu else 0,
        num_cpus=1 if has_gpu else (os.cpu_count() or 1) // (actors + 1),  # one share reads prompts and writes answers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", help='JSON lines with a "prompt" each (default: some questions)')
    parser.add_argument("--out", help="folder for JSON lines with the answers (default: they are printed)")
    parser.add_argument("--actors", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of each answer (default: %(default)s)")
    args = parser.parse_args()
    if args.prompts:
        prompts = ray.data.read_json(args.prompts, lines=True)
    else:
        texts = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
        prompts = ray.data.from_items(
            [{"prompt": text} for text in texts], override_num_blocks=-(-len(texts) // BATCH)
        )
    answers = answered(prompts, args.actors, args.max_new_tokens)
    if args.out:
        answers.write_json(args.out)
        return
    for row in answers.iter_rows():
        print(f"{row['actor']}: {row['prompt']} {row['error'] or row['answer']!r}")


if __name__ == "__main__":
    main()
