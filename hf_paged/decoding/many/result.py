"""What comes of a prompt, and of all of them."""

from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["eos", "length", "stop", "error"]


@dataclass(frozen=True)
class Result:
    """The answer to one of many prompts.

    Attributes:
        index: number of the prompt among all, from 0.
        prompt: as it was given.
        tokens: new ones, with that which ended the answer; those so far if it failed.
        finish_reason: `"eos"` for a token that ends answers, `"length"` for its limit, `"stop"` for another criterion,
            such as `stop_strings`, `"error"` if it failed.
        error: why it failed; None if it did not.
    """

    index: int
    prompt: Any
    tokens: list[int]
    finish_reason: FinishReason
    error: Exception | None = None


@dataclass(frozen=True)
class ManyStats:
    """How far many prompts are.

    Attributes:
        num_done: prompts that have ended, those that failed included.
        num_failed: those that failed.
        num_running: rows of the batch.
        num_waiting: prompts that were begun and taken back, as pages ran short.
        num_prompt_tokens: of the prompts that were begun.
        num_new_tokens: tokens of all answers so far.
        num_steps: passes over the batch; `num_new_tokens` over it are the rows that it had.
        num_preempted: rows that were taken out of the batch so far, as pages ran short.
    """

    num_done: int = 0
    num_failed: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_steps: int = 0
    num_preempted: int = 0
