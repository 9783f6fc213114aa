"""How good an answer is: functions of a prediction and a reference that give 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher

Metric = Callable[[str, str], float]


def string_match(prediction: str, reference: str) -> float:
    """1 if the reference stands in the prediction, not as a part of a longer word or number; letter case aside."""
    return float(re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", prediction, re.IGNORECASE) is not None)


def word_similarity(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction begins with, in order.

    What comes after as many words as the reference has does not count. `"a b x d e"` beside `"a b c d"` gives 3/4.
    """
    wanted = reference.split()
    return SequenceMatcher(None, prediction.split()[: len(wanted)], wanted, autojunk=False).ratio()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words; letter case, punctuation and articles aside.

    Source:
        SQuAD: Rajpurkar et al., 2016; LongBench's questions are scored by it.
    """
    said, wanted = _plain_words(prediction), _plain_words(reference)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def number_precision(prediction: str, reference: str) -> float:
    """Share of the prediction's numbers that are the reference's one: LongBench's score for retrieval and counting."""
    wanted, *_ = re.findall(r"\d+", reference)
    said = re.findall(r"\d+", prediction)
    return said.count(wanted) / len(said) if said else 0.0


def choice_accuracy(prediction: str, reference: str) -> float:
    """1 if `The correct answer is (A)`, brackets or not, names the reference's letter: LongBench v2's score."""
    match = re.search(r"The correct answer is (?:\(([A-D])\)|([A-D]))", prediction.replace("*", ""))
    return float(match is not None and (match[1] or match[2]) == reference)


def _plain_words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
