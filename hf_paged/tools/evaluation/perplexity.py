"""Perplexity, computed through caches that are compared with one another."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_paged.pages.pool import check_page_size
from hf_paged.tools.evaluation.journal import Journal, Scores, fingerprint
from hf_paged.tools.evaluation.scoring import Score, score
from hf_paged.tools.evaluation.windows import Window, windows_of
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import CACHES, line_up
from hf_paged.tools.lab.memory import token_bytes
from hf_paged.tools.progress import progress

Batches = list[list[Window]]


@dataclass(frozen=True)
class CacheFigures:
    """What came out with one cache.

    Attributes:
        cache: its name.
        perplexity: exp of the mean negative log-likelihood per scored token.
        difference: of the perplexity from that of the reference, absolute.
        relative_difference: the same as a share of the reference's.
        standard_error: of the relative difference, what the scatter of the tokens' differences leaves open. A
            difference within two of it is as good as none: rounding in 16 bit takes every token another way.
        max_logit_difference: the largest difference of a logit from the reference's, over all scored tokens.
        kl: mean Kullback-Leibler divergence of the cache's predictions from the reference's per scored token, nats.
        agreement: share of the scored tokens for which both find the same token the likeliest.
        tokens_per_s: through the forward passes.
        kv_bytes: keys and values held at most.
        text_perplexities: perplexity of each text, by its index; texts of which no token was scored are left out.
    """

    cache: str
    perplexity: float
    difference: float
    relative_difference: float
    standard_error: float
    max_logit_difference: float
    kl: float
    agreement: float
    tokens_per_s: float
    kv_bytes: int
    text_perplexities: dict[int, float]


@dataclass(frozen=True)
class Perplexity:
    """What came out with all caches.

    Attributes:
        num_tokens: that were scored.
        num_windows: that they were scored in.
        max_length: tokens of the longest window.
        minimum_bytes: keys and values of the tokens that a batch holds at most, each stored once.
        figures: of each cache, the reference first.
    """

    num_tokens: int
    num_windows: int
    max_length: int
    minimum_bytes: int
    figures: tuple[CacheFigures, ...]

    def __getitem__(self, cache: str) -> CacheFigures:
        """The figures of a cache, by its name."""
        return {figures.cache: figures for figures in self.figures}[cache]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return asdict(self)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | Sequence[int]],
    *,
    caches: Sequence[str] = ("dynamic", "paged"),
    page_size: int = 128,
    max_length: int | None = None,
    stride: int | None = None,
    chunk_size: int = 256,
    batch_size: int = 1,
    max_tokens: int | None = None,
    journal: str | Path | None = None,
) -> Perplexity:
    """Compute the perplexity of texts through caches, all in one run.

    Each text is tokenized with the special tokens that the tokenizer adds, and cut into windows. The first token of a
    window has nothing before it and is never scored, be it a beginning-of-sequence token or not; a window scores all
    others that no window before has scored. So with `stride < max_length` only the first token of a text is left out.

    Each window is run through a new cache, chunk after chunk over the keys and values of those before, so that all
    but the first chunk depend on what the cache gives back. `chunk_size=1` is decoding. The caches take turns chunk
    by chunk. Before the first batch, its first tokens are run once to compile what has to be.

    Started by `accelerate launch` or `torchrun`, the processes share the batches, and all return the same. The
    figures, times aside, are the same to the last bit however often the run was interrupted and however many processes
    work, as long as each has as many threads.

    Args:
        model: a causal LM; is not changed.
        tokenizer: of the model.
        texts: documents, or their token ids, which are taken as they are. No window goes across two of them.
        caches: names out of dynamic, paged and static; the first is the reference.
        page_size: tokens per page of the paged cache.
        max_length: tokens in a window at most, 2 or more; None: as many as the model has positions.
        stride: tokens from the beginning of one window to that of the next, 1 to `max_length`; None: `max_length`.
        chunk_size: tokens of a window that are run at once.
        batch_size: windows that are run at once, padded on the right.
        max_tokens: tokens to score; None: all.
        journal: a path, where finished batches are kept; a later call with the same arguments computes the remaining
            ones only. None: keep nothing.

    Raises:
        ValueError: for arguments that can't be, texts without a token to score, or a journal of another run; nothing
            was computed.
    """
    max_length = _checked_length(model, max_length)
    stride = max_length if stride is None else stride
    settings = {
        "caches": caches,
        "page_size": check_page_size(page_size),
        "max_length": max_length,
        "stride": stride,
        "chunk_size": chunk_size,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
    }
    _check(texts, **settings)  # type: ignore[arg-type]
    with line_up(model, caches, page_size, CACHES) as baselines:
        for baseline in baselines:
            baseline.prepare()
            baseline.model.eval()  # type: ignore[no-untyped-call]
        windows = list(windows_of(tokenizer, texts, max_length, stride, max_tokens))
        if not windows:
            raise ValueError("There is no token to score: no text has two tokens. Give longer texts.")
        batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
        kept = None if journal is None else Journal(journal, fingerprint(model, windows, **settings))
        scores = _all_scores(baselines, batches, chunk_size, kept)
    return _summarize(caches, batches, scores, token_bytes(model))


def _checked_length(model: PreTrainedModel, max_length: int | None) -> int:
    config = model.config.get_text_config(decoder=True)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if max_length is None and positions is None:
        raise ValueError(
            f"max_length is to be the model's, but the configuration of {type(model).__name__} has no "
            "max_position_embeddings. Give max_length."
        )
    length = positions if max_length is None else max_length
    assert length is not None
    if length < 2 or (positions is not None and length > positions):
        raise ValueError(
            f"max_length={length} was asked for; a window has 2 tokens or more, and the model has "
            f"{positions} positions."
        )
    return length


def _check(
    texts: Iterable[str | Sequence[int]],
    caches: Sequence[str],
    stride: int,
    max_length: int,
    **counts: int | None,
) -> None:
    if isinstance(texts, str):
        raise ValueError("texts is one string, whose letters would be texts of their own. Give a list of strings.")
    if not caches or len(set(caches)) < len(caches):
        raise ValueError(f"caches={list(caches)} were asked for; name at least one, and none twice.")
    if not 1 <= stride <= max_length:
        raise ValueError(
            f"stride={stride} was asked for with windows of {max_length} tokens; give 1 to {max_length}, so that no "
            "token is left out."
        )
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} was asked for; it must be at least 1.")


def _all_scores(
    baselines: Sequence[Baseline], batches: Batches, chunk_size: int, journal: Journal | None
) -> list[Scores]:
    """The scores of all batches, in their order: those in the journal, and those computed by all processes."""
    processes = PartialState(cpu=baselines[0].model.device.type == "cpu")
    finished = {} if journal is None else journal.read()
    processes.wait_for_everyone()  # whoever writes first would change what the others read
    remaining = [number for number in range(len(batches)) if number not in finished]
    own = remaining[processes.process_index :: processes.num_processes]
    new: list[tuple[int, Scores]] = []
    if own:
        score(baselines, [window.first(2 * chunk_size + 2) for window in batches[own[0]]], chunk_size)
    for number in progress(own, "perplexity") if processes.is_main_process else own:
        new.append((number, score(baselines, batches[number], chunk_size)))
        if journal is not None:
            journal.append(*new[-1])
    finished |= dict(gather_object(new))
    return [finished[number] for number in range(len(batches))]


def _summarize(caches: Sequence[str], batches: Batches, scores: Sequence[Scores], token_bytes: int) -> Perplexity:
    windows = [window for batch in batches for window in batch]
    figures: list[CacheFigures] = []
    for name in caches:
        own = [batch[name] for batch in scores]
        figures.append(_figures(name, windows, own, figures[0].perplexity if figures else None))
    return Perplexity(
        num_tokens=sum(window.num_scored for window in windows),
        num_windows=len(windows),
        max_length=max(len(window.token_ids) for window in windows),
        minimum_bytes=token_bytes * max(sum(window.num_inputs for window in batch) for batch in batches),
        figures=tuple(figures),
    )


def _standard_error(scores: Sequence[Score], mean: float, num_tokens: int) -> float:
    """Of the mean difference of the NLL per token, which is the relative difference of the perplexity."""
    variance = math.fsum(score.squared_difference for score in scores) / num_tokens - mean**2
    return math.sqrt(max(0.0, variance) / num_tokens)


def _figures(name: str, windows: Sequence[Window], scores: Sequence[Score], reference: float | None) -> CacheFigures:
    sums = [nll for score in scores for nll in score.nll]
    num_tokens = sum(window.num_scored for window in windows)
    own = math.exp(math.fsum(sums) / num_tokens)
    reference = own if reference is None else reference
    by_text: dict[int, list[tuple[float, int]]] = {}
    for window, nll in zip(windows, sums, strict=True):
        by_text.setdefault(window.text, []).append((nll, window.num_scored))
    return CacheFigures(
        cache=name,
        perplexity=own,
        difference=abs(own - reference),
        relative_difference=abs(own - reference) / reference,
        standard_error=_standard_error(scores, math.log(own / reference), num_tokens),
        max_logit_difference=max(score.max_logit_difference for score in scores),
        kl=math.fsum(score.kl for score in scores) / num_tokens,
        agreement=sum(score.num_agreeing for score in scores) / num_tokens,
        tokens_per_s=sum(window.num_inputs for window in windows) / math.fsum(score.seconds for score in scores),
        kv_bytes=max(score.kv_bytes for score in scores),
        text_perplexities={
            text: math.exp(math.fsum(nll for nll, _ in parts) / sum(count for _, count in parts))
            for text, parts in by_text.items()
        },
    )
