"""Which drafted tokens are right, and which token follows them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.batch.padding import Counts
from hf_paged.decoding.speculate.drafts import Drafts
from hf_paged.decoding.speculate.ends import Ends
from hf_paged.decoding.speculate.processing import process, takes_rows_apart
from hf_paged.decoding.speculate.text import Text


def choose(scores: Tensor, drafted: Tensor, probabilities: Tensor | None, is_random: bool) -> Tensor:
    """Choose tokens as greedy decoding or sampling would; a guess is right if it is what was chosen.

    A guess that was not drawn changes nothing: whether a drawn token equals it has the probability of the guess, and
    if it does not, it is drawn from the others. One that was drawn with probability `q` is taken with `min(1, p / q)`,
    and otherwise another one is drawn in proportion to `max(0, p - q)`.

    Args:
        scores: `(n, vocab_size)`.
        drafted: `(n,)` guesses; anything where there is none.
        probabilities: `(n, vocab_size)` with which the guesses were drawn, 0 where there is none; None: not drawn.
        is_random: whether to sample.

    Returns:
        `(n,)` tokens.

    Source:
        Speculative sampling: Leviathan et al., 2023, Algorithm 1 and Appendix A.1.
    """
    if not is_random:
        return scores.argmax(dim=-1)
    wanted = torch.softmax(scores, dim=-1)
    if probabilities is None:
        return _draw(wanted)
    own, given = (tensor.gather(1, drafted[:, None])[:, 0] for tensor in (wanted, probabilities))
    is_taken = (given > 0) & (torch.rand_like(own) * given < own)
    left = (wanted - probabilities).clamp(min=0)
    return torch.where(is_taken, drafted, _draw(torch.where(left.sum(dim=-1, keepdim=True) > 0, left, wanted)))


def _draw(weights: Tensor) -> Tensor:
    return torch.multinomial(weights, num_samples=1).squeeze(1)


class Verdict:
    """Decides which drafted tokens are right, and what follows them.

    Args:
        text: of the rows.
        ends: of the rows.
        processors: what changes scores.
        is_random: whether to sample.

    Attributes:
        is_in_step: whether all rows go on by equally many tokens, since there is something that has to be asked about
            all of them, token after token.
    """

    def __init__(self, text: Text, ends: Ends, processors: Any, is_random: bool) -> None:
        self._text = text
        self._ends = ends
        self._processors = processors
        self._is_random = is_random
        self.is_in_step = not (takes_rows_apart(processors) and ends.are_of_rows)

    def pass_on(self, logits: Tensor, drafts: Drafts) -> Counts:
        """Add the tokens that a pass gives, and return how many drafted ones of each row were right, `(num_rows,)`.

        Args:
            logits: `(num_rows, num_new, vocab_size)`, behind the last token of each row and behind those drafted.
            drafts: of the same number for all rows if they are in step.
        """
        return (self._in_step if self.is_in_step else self._apart)(logits, drafts)

    def _apart(self, logits: Tensor, drafts: Drafts) -> Counts:
        counts = np.where(self._ends.are_going, drafts.counts + 1, 0)
        order = np.arange(int(counts.max()))
        rows, places = np.nonzero(order < counts[:, None])
        self._text.guess(drafts.tokens)
        # One entry more, which is compared with nothing.
        drafted = np.pad(drafts.tokens, ((0, 0), (0, 1)))
        given = logits[rows, places].to(torch.float32)
        scores = process(self._processors, self._text, rows, self._text.known[rows] + places, given)
        tokens = np.zeros((len(counts), len(order)), dtype=np.int64)
        tokens[rows, places] = self._choose(scores, drafted[rows, places], drafts, (rows, places))
        is_right = (tokens == drafted[:, : len(order)]) & (order < drafts.counts[:, None])
        accepted: Counts = np.asarray(np.logical_and.accumulate(is_right, axis=1).sum(axis=1))
        self._ends.add(tokens, np.where(counts > 0, accepted + 1, 0))
        return accepted

    def _in_step(self, logits: Tensor, drafts: Drafts) -> Counts:
        ends, num_drafted = self._ends, int(drafts.counts.max(initial=0))
        drafted = np.pad(drafts.tokens, ((0, 0), (0, 1)))
        accepted = 0
        while True:
            given = logits[:, accepted].to(torch.float32, copy=True)
            scores = self._processors(self._text.up_to(int(self._text.known[0])), given)
            at = slice(None), accepted
            tokens = self._choose(scores, drafted[at], drafts if accepted < num_drafted else None, at)
            tokens = np.where(ends.are_going, tokens, ends.pad_token)
            is_right = accepted < num_drafted and bool((tokens == drafted[at])[ends.are_going].all())
            ends.add_column(tokens, None)
            if ends.length is not None or not is_right:
                return np.full(len(tokens), accepted)
            accepted += 1

    def _choose(self, scores: Tensor, drafted: Counts, drafts: Drafts | None, at: Any) -> Counts:
        probabilities = None
        if drafts is not None and drafts.probabilities is not None:
            probabilities = torch.nn.functional.pad(drafts.probabilities, (0, 0, 0, 1))[at]
        guesses = torch.from_numpy(drafted).to(scores.device)
        chosen: Counts = choose(scores, guesses, probabilities, self._is_random).cpu().numpy()
        return chosen
