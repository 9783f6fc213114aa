"""A search tree over forks: the most promising text is continued in several ways, again and again.

Why: a node of a tree of thoughts is the text of its parent and some words more. A copy of a contiguous cache for each
node holds all of that text once more; a fork holds what is new. What is given up gives its pages back at once.

How: `python examples/tree.py`.
"""

from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prose

TASK = prose()[:1200] + "\n\nWrite a story about a computer that runs out of memory."
NUM_EXPANSIONS, NUM_CHILDREN, NUM_KEPT, NUM_TOKENS = 8, 3, 6, 10


class Leaf(NamedTuple):
    """A text that may be continued."""

    ids: Tensor
    cache: PagedCache
    log_probs: list[float]  # of all tokens behind the task

    @property
    def score(self) -> float:
        return sum(self.log_probs) / len(self.log_probs)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    messages = [{"role": "user", "content": TASK}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    task = PagedCache.from_model(model, page_size=16)
    task.prefill(model, ids)
    leaves = [Leaf(ids, task, [])]
    for _ in range(NUM_EXPANSIONS):
        leaves = leaves[1:] + expand(model, leaves[0])  # the best one is the first
        leaves = sorted(leaves, key=lambda leaf: leaf.score, reverse=True)[:NUM_KEPT]
        stats = task.pool.stats()
        copies = stats.active_bytes + stats.shared_bytes
        print(f"{len(leaves)} leaves: {stats.active_bytes / 2**20:.1f} MiB, as copies {copies / 2**20:.1f} MiB")
    for leaf in leaves[:3]:
        text = tokenizer.decode(leaf.ids[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"\n{leaf.score:.2f} per token: {text}")


def expand(model, leaf: Leaf) -> list[Leaf]:
    """Continue a text in several ways."""
    cache = leaf.cache.fork()
    found = model.generate(
        leaf.ids,
        past_key_values=cache,
        do_sample=True,
        num_return_sequences=NUM_CHILDREN,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_probs = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True).tolist()
    children = []
    for row in range(NUM_CHILDREN):
        child = cache.fork()
        child.batch_select_indices(torch.tensor([row]))
        children.append(Leaf(found.sequences[row : row + 1], child, leaf.log_probs + log_probs[row]))
    return children


if __name__ == "__main__":
    main()
