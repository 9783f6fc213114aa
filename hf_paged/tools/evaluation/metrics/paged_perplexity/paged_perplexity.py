"""Perplexity of texts under a model, through a paged cache, as a metric of the library evaluate.

It takes the arguments and gives the figures of evaluate's own `perplexity`. That one hands whole texts to the model;
this one hands them over chunk by chunk, each of which attends to the pages of those before.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from hf_paged.tools.evaluation.perplexity import perplexity
from hf_paged.tools.lab.model import load_model

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
        default = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(model_id, dtype, "cuda" if device == "gpu" else device or default)
        tokenizer = model.tokenizer
        assert tokenizer is not None
        if add_start_token and tokenizer.bos_token_id is None:
            raise ValueError(
                f"add_start_token=True was asked for, but the tokenizer of {model.name} has no BOS token. "
                "Give add_start_token=False."
            )
        start = [tokenizer.bos_token_id] if add_start_token else []
        max_length = model.max_length if max_length is None else max_length
        whole = [start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in predictions]
        short = [index for index, ids in enumerate(whole) if len(ids) < 2]
        if short:
            raise ValueError(
                f"Every text needs at least {2 - len(start)} tokens with add_start_token={add_start_token}, but the "
                f"texts {short} have fewer. Drop them."
            )
        if num_cut := sum(len(ids) > max_length for ids in whole):
            logger.warning("%d of %d texts are cut to %d tokens", num_cut, len(whole), max_length)
        figures = perplexity(
            model.model,
            tokenizer,
            [ids[:max_length] for ids in whole],
            caches=("paged",),
            page_size=page_size,
            max_length=max_length,
            chunk_size=chunk_size,
            batch_size=batch_size,
        )["paged"]
        perplexities = list(figures.text_perplexities.values())
        return {"perplexities": perplexities, "mean_perplexity": math.fsum(perplexities) / len(perplexities)}
