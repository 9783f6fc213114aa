"""What `generate()` returns beside the tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from hf_paged._transformers import CACHE


class Record:
    """Scores, logits, attention weights and hidden states of all steps, as far as they are wanted.

    Args:
        config: says what is wanted.
        encoder_outputs: what the encoder returned; None without an encoder.

    Attributes:
        scores: of all steps, each `(num_rows, vocab_size)`; None if they are not wanted.
    """

    def __init__(self, config: Any, encoder_outputs: Any) -> None:
        is_wanted = bool(config.return_dict_in_generate)
        self._encoder_outputs = encoder_outputs
        self._has_attentions = is_wanted and bool(config.output_attentions)
        self._has_states = is_wanted and bool(config.output_hidden_states)
        self.scores: tuple[Tensor, ...] | None = () if is_wanted and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if is_wanted and config.output_logits else None
        self._attentions: list[Any] = []
        self._cross_attentions: list[Any] = []
        self._states: list[Any] = []
        self._are_checked = False

    def add(self, outputs: Any, input_ids: Tensor, logits_processor: Any) -> Tensor:
        """Note what a pass returned, and return `(num_rows, vocab_size)` scores of the next token."""
        is_kept = bool(logits_processor) or self.scores is not None or self._logits is not None
        logits = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=is_kept)
        scores = self._process(logits_processor, input_ids, logits)
        if self.scores is not None:
            self.scores = (*self.scores, scores)
        if self._logits is not None:
            self._logits = (*self._logits, logits)
        decoder = "" if self._encoder_outputs is None else "decoder_"
        if self._has_attentions:
            self._attentions.append(outputs[f"{decoder}attentions"])
            self._cross_attentions.append(outputs.get("cross_attentions"))
        if self._has_states:
            self._states.append(outputs[f"{decoder}hidden_states"])
        return scores

    def _process(self, logits_processor: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The list inspects the signature of each, in each step.
        is_checked, self._are_checked = self._are_checked, type(logits_processor) is LogitsProcessorList
        for processor in logits_processor if is_checked else [logits_processor]:
            scores = processor(input_ids, scores)
        return scores

    def result(self, input_ids: Tensor, cache: Any) -> Any:
        """Return what `generate()` returns with `return_dict_in_generate`."""
        common = {"sequences": input_ids, "scores": self.scores, "logits": self._logits, CACHE: cache}
        attentions = tuple(self._attentions) if self._has_attentions else None
        states = tuple(self._states) if self._has_states else None
        encoder = self._encoder_outputs
        if encoder is None:
            return GenerateDecoderOnlyOutput(**common, attentions=attentions, hidden_states=states)
        return GenerateEncoderDecoderOutput(
            **common,
            encoder_attentions=encoder.get("attentions") if self._has_attentions else None,
            encoder_hidden_states=encoder.get("hidden_states") if self._has_states else None,
            decoder_attentions=attentions,
            cross_attentions=tuple(self._cross_attentions) if self._has_attentions else None,
            decoder_hidden_states=states,
        )
