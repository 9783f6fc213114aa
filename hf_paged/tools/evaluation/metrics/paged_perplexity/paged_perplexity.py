"""Perplexity of texts under a model, through a paged cache, as a metric of the library evaluate.

It takes the arguments and gives the figures of evaluate's own `perplexity`. That one hands whole texts to the model;
this one hands them over chunk by chunk, each of which attends to the pages of those before.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]
import torch

from hf_paged.pages.pool import check_page_size
from hf_paged.tools.evaluation.scoring import score
from hf_paged.tools.evaluation.windows import Window
from hf_paged.tools.lab.candidate import candidates
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject, load_subject

logger = logging.getLogger(__name__)

_DESCRIPTION = """
Perplexity of each text under a causal language model: the exponential of the mean negative log-likelihood of its
tokens. It is computed in chunks through a paged key/value cache, `hf_paged.PagedCache`.
"""

_INPUTS = """
Args:
    predictions (list of str): texts.
    model_id (str): name or path of a causal language model.
    batch_size (int): texts that are run at once. Default: 16.
    add_start_token (bool): whether a BOS token is put in front of every text, so that its first token is scored too.
        Other special tokens are never added. Default: True.
    device (str): "cpu", "cuda" or "gpu"; the latter two mean the same. Default: "cuda" where there is one.
    max_length (int): tokens that longer texts are cut to, BOS included. Default: what the model has positions for.
    dtype (str): of the weights, by its name in torch. Default: "float32".
    page_size (int): tokens in a page of the cache. Default: 128.
    chunk_size (int): tokens of each text that are run at once. Default: 256.
Returns:
    perplexities (list of float): of each text.
    mean_perplexity (float): their mean.
Example:
    >>> perplexity = evaluate.load(hf_paged.tools.evaluation.metrics.PAGED_PERPLEXITY)
    >>> perplexity.compute(predictions=["lorem ipsum", "Happy birthday!"], model_id="gpt2")
"""


class PagedPerplexity(evaluate.Metric):  # type: ignore[misc]
    """Perplexity of each text, and their mean; `inputs_description` has the arguments of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model_id: str,
        batch_size: int = 16,
        add_start_token: bool = True,
        device: str | None = None,
        max_length: int | None = None,
        dtype: str = "float32",
        page_size: int = 128,
        chunk_size: int = 256,
    ) -> dict[str, Any]:
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size < 1:
                raise ValueError(f"{name}={size} was asked for; it must be at least 1.")
        check_page_size(page_size)
        subject = load_subject(model_id, dtype, _device(device))
        windows = _windows(subject, predictions, add_start_token, _max_length(subject, max_length))
        batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
        (paged,) = candidates(subject.model, ["paged"], page_size)
        perplexities = [
            math.exp(nll / window.num_scored)
            for batch in progress(batches, "perplexity")
            for window, nll in zip(batch, score([paged], batch, chunk_size)["paged"].nll, strict=True)
        ]
        return {"perplexities": perplexities, "mean_perplexity": math.fsum(perplexities) / len(perplexities)}


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "gpu"):
        raise ValueError(f"device={name!r} was asked for; give cpu, cuda or gpu.")
    return "cpu" if name == "cpu" else "cuda"


def _max_length(subject: Subject, asked: int | None) -> int:
    if asked is not None and not 2 <= asked <= subject.max_length:
        raise ValueError(
            f"max_length={asked} was asked for; give 2 to {subject.max_length}, the positions of {subject.name}."
        )
    return subject.max_length if asked is None else asked


def _windows(subject: Subject, texts: Sequence[str], add_start_token: bool, max_length: int) -> list[Window]:
    """Make one window of each text, cut to `max_length` tokens."""
    tokenizer = subject.tokenizer
    assert tokenizer is not None
    if add_start_token and tokenizer.bos_token_id is None:
        raise ValueError(
            f"add_start_token=True was asked for, but the tokenizer of {subject.name} has no BOS token. "
            "Give add_start_token=False."
        )
    start = [tokenizer.bos_token_id] if add_start_token else []
    whole = [start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    windows = [Window(text, token_ids[:max_length], 1) for text, token_ids in enumerate(whole)]
    short = [window.text for window in windows if len(window.token_ids) < 2]
    if short or not windows:
        raise ValueError(
            f"Every text needs at least {2 - len(start)} tokens with add_start_token={add_start_token}, but "
            + (f"the texts {short} have fewer. Drop them." if short else "there is no text. Give one.")
        )
    num_cut = sum(len(token_ids) > max_length for token_ids in whole)
    if num_cut:
        logger.warning("%d of %d texts are cut to %d tokens", num_cut, len(windows), max_length)
    return windows
