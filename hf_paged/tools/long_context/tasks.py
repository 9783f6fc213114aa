"""Tasks over long contexts that need no download: facts hidden in the packaged prose.

Their shapes are those of LongBench's and RULER's: retrieval, a question about one of several documents, and a copy.
Each is made for a `context`, the most tokens of the prompt, which falls short of it by less than one more word would
take; a `seed` chooses facts and prose; `depth` is the share of the prose that comes before what is asked for, 0 to 1.
A context without room for the question and a depth beyond 0 and 1 raise a `ValueError`.
"""

import random
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import partial

from transformers import PreTrainedTokenizerBase

from hf_paged.packaged import prose
from hf_paged.tools.long_context.example import Example, Prompt, Task, compose, fill

NUM_DOCUMENTS = 5
NUM_PASSAGE_WORDS = 48
NUM_GIVEN_WORDS = 8
"""Words of a passage that the answer begins with, which tell a small model what to do."""

_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Vienna", "Dublin", "Delhi", "Madrid", "Quito", "Sydney")
_LONGEST_WORD = 20  # characters; the rules of a table would make lengths jump


def passkey(tokenizer: PreTrainedTokenizerBase, context: int, depth: float, seed: int = 0) -> Example:
    """Hide a number in prose and ask for it at the end (Mohtashami and Jaggi, 2023)."""
    generator = random.Random(f"passkey {seed}")
    key = str(generator.randrange(10000, 100000))
    needle = f"The special magic number is {key}. Remember it: the special magic number is {key}."

    def make(words: Sequence[str]) -> Prompt:
        text = _insert(words, depth, needle)
        message = (
            "An important fact is hidden in a long text that has nothing to do with it. Find the fact and remember "
            f"it.\n\n{text}\n\nWhat is the special magic number?"
        )
        return compose(tokenizer, message, "The special magic number is")

    return Example(fill(make, _words(generator, context), context), key)


def documents(tokenizer: PreTrainedTokenizerBase, context: int, seed: int = 0) -> Example:
    """Plant a fact in each of several numbered documents, and ask for one of them."""
    generator = random.Random(f"documents {seed}")
    cities = generator.sample(_CITIES, NUM_DOCUMENTS)
    numbers = [str(number) for number in generator.sample(range(10000, 100000), NUM_DOCUMENTS)]
    depths = [generator.random() for _ in cities]
    asked = generator.randrange(NUM_DOCUMENTS)

    def make(words: Sequence[str]) -> Prompt:
        parts = []
        for index, (city, number, depth) in enumerate(zip(cities, numbers, depths, strict=True)):
            own = words[index * len(words) // NUM_DOCUMENTS : (index + 1) * len(words) // NUM_DOCUMENTS]
            fact = f"The number of the safe in {city} is {number}."
            parts.append(f"Document {index + 1}:\n{_insert(own, depth, fact)}")
        text = "\n\n".join(parts)
        message = (
            f"Answer the question from these documents.\n\n{text}\n\n"
            f"Question: What is the number of the safe in {cities[asked]}?"
        )
        return compose(tokenizer, message, f"The number of the safe in {cities[asked]} is")

    return Example(fill(make, _words(generator, context), context), numbers[asked])


def copy(tokenizer: PreTrainedTokenizerBase, context: int, depth: float, seed: int = 0) -> Example:
    """Ask for a passage that stands somewhere in prose, word for word; its first words are given."""
    generator = random.Random(f"copy {seed}")
    words = _words(generator, context + NUM_PASSAGE_WORDS)
    passage, filler = words[:NUM_PASSAGE_WORDS], words[NUM_PASSAGE_WORDS:]
    given, asked = " ".join(passage[:NUM_GIVEN_WORDS]), " ".join(passage[NUM_GIVEN_WORDS:])

    def make(words: Sequence[str]) -> Prompt:
        text = _insert(words, depth, f"<passage>\n{given} {asked}\n</passage>")
        message = f"{text}\n\nRepeat the text between <passage> and </passage> word for word."
        return compose(tokenizer, message, given)

    return Example(fill(make, filler, context), asked)


def string_match(prediction: str, reference: str) -> float:
    """1 if the reference stands in the prediction, not as a part of a longer word or number; letter case aside."""
    return float(re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", prediction, re.IGNORECASE) is not None)


def word_similarity(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction begins with, in order.

    What comes after as many words as the reference has does not count. `"a b x d e"` beside `"a b c d"` gives 3/4.
    """
    wanted = reference.split()
    return SequenceMatcher(None, prediction.split()[: len(wanted)], wanted, autojunk=False).ratio()


def _at_all_depths(
    task: Callable[..., Example], tokenizer: PreTrainedTokenizerBase, context: int, limit: int, seed: int
) -> list[Example]:
    """Examples whose depths go evenly from 0 to 1."""
    depths = [index / (limit - 1) for index in range(limit)] if limit > 1 else [0.5]
    return [task(tokenizer, context, depth, seed * limit + index) for index, depth in enumerate(depths)]


def _documents(tokenizer: PreTrainedTokenizerBase, context: int, limit: int, seed: int) -> list[Example]:
    return [documents(tokenizer, context, seed * limit + index) for index in range(limit)]


def _words(generator: random.Random, count: int) -> list[str]:
    """Consecutive words of the prose from a random place on; after its end it begins anew."""
    words = [word for word in prose().split() if len(word) <= _LONGEST_WORD]
    start = generator.randrange(len(words))
    return [words[(start + index) % len(words)] for index in range(count)]


def _insert(words: Sequence[str], depth: float, needle: str) -> str:
    """The words with a paragraph of its own after the share `depth` of them."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} was asked for; give a share of the text, 0 to 1.")
    place = round(depth * len(words))
    return "\n\n".join(filter(None, (" ".join(words[:place]), needle, " ".join(words[place:]))))


OFFLINE = (
    Task("passkey", "a number hidden in prose", string_match, 16, partial(_at_all_depths, passkey)),
    Task("documents", "a question about one of several documents", string_match, 16, _documents),
    Task("copy", "a passage, word for word", word_similarity, 96, partial(_at_all_depths, copy)),
)
"""Tasks made from the packaged prose."""
