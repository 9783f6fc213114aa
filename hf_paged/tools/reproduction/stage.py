"""A part of the evaluation: one command of `hf-paged`, the file that has its figures, and what the page says of it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """What is run.

    Attributes:
        name: of the results file, without its suffix.
        command: of `hf-paged`, without its sizes.
        short: its sizes for half an hour on 2 cores.
        full: its full sizes.
        title: of the section on the page; empty where the figures stand in that of another stage.
        words: what the section says first.
    """

    name: str
    command: str
    short: str
    full: str
    title: str = ""
    words: str = ""

    def arguments(self, folder: Path, is_full: bool, num_threads: int | None) -> list[str]:
        """The arguments of `hf-paged`, with where the figures go."""
        arguments = f"{self.command} {self.full if is_full else self.short}".split()
        if num_threads is not None:
            arguments += ["--num-threads", str(num_threads)]
        if arguments[0] in ("bench", "audit"):
            arguments += ["--plot", str(folder)]
        return [*arguments, "--json", str(self.path(folder))]

    def path(self, folder: Path) -> Path:
        """Of the results file."""
        return folder / f"{self.name}.json"

    def run(self, folder: Path, is_full: bool, num_threads: int | None) -> int:
        """Run in a process of its own, so that no stage finds the memory of the one before; return the exit code."""
        command = [sys.executable, "-m", "hf_paged", *self.arguments(folder, is_full, num_threads)]
        return subprocess.run(command, check=False).returncode


_BF16 = "ppl --dtype bfloat16"

STAGES = (
    Stage(
        "perplexity-256",
        "ppl --caches dynamic,paged,static --chunk-size 256 --max-length 2048",
        "--max-tokens 8000",
        "--max-tokens 50000",
        "Perplexity",
        "Text is scored chunk after chunk through each cache, so that all but the first chunk of a window depend on "
        "what the cache gives back. The caches take turns on the same chunks.",
    ),
    Stage("perplexity-7", "ppl --chunk-size 7", "--max-tokens 1000", "--max-tokens 10000"),
    Stage("perplexity-1", "ppl --chunk-size 1", "--max-tokens 250", "--max-tokens 2000"),
    Stage(
        "perplexity-256-bf16",
        f"{_BF16} --chunk-size 256 --max-length 2048",
        "--max-tokens 4000",
        "--max-tokens 50000",
    ),
    Stage("perplexity-7-bf16", f"{_BF16} --chunk-size 7", "--max-tokens 500", "--max-tokens 10000"),
    Stage("perplexity-1-bf16", f"{_BF16} --chunk-size 1", "--max-tokens 100", "--max-tokens 2000"),
    Stage(
        "latency",
        "bench latency --caches dynamic,paged,paged-compiled",
        "--contexts 128,256,512,1024,2048 --rounds 1 --max-new-tokens 24",
        "--contexts 128,256,512,1024,2048,4096,8000 --max-new-tokens 64",
        "Time against length",
        "One row. `paged-compiled` is `with compiled(model):`. *Times as fast* compares with `dynamic`.",
    ),
    Stage(
        "no-cache",
        "bench latency --caches dynamic,no-cache",
        "--contexts 128,256,512,1024,2048 --rounds 1 --max-new-tokens 4",
        "--contexts 128,256,512,1024,2048,4096 --max-new-tokens 6",
        "Without a cache",
        "Every token computes everything before it again.",
    ),
    Stage(
        "single",
        "bench single",
        "--random-llama --contexts 1000,10000,32000,100000 --rounds 1 --max-new-tokens 16",
        "",
        "One long sequence",
        "Run in chunks of 1024 tokens; *first token* counts from the point before. A tiny random Llama stands in "
        "where the real model has no more positions.",
    ),
    Stage(
        "mixed",
        "bench mixed",
        "--caches dynamic,paged-ragged,paged-compiled --rounds 1 --max-new-tokens 24",
        "",
        "A mixed batch of 16",
        "Prompts of 16 to 1024 tokens, from nothing to the last new token.",
    ),
    Stage(
        "chat",
        "bench chat",
        "--random-llama --contexts 1000,8000,16000,24000,32000 --rounds 1 --max-new-tokens 16",
        "",
        "A growing conversation",
        "Each turn adds to the cache of the last; *first token* is the time to read what was said since.",
    ),
    Stage(
        "page-size",
        "bench page-size",
        "--prompt-lengths 57,130,260,333,410,519,700,1007 --rounds 1 --max-new-tokens 16",
        "",
        "Page size",
        "The mixed batch with pages of each size, beside DynamicCache.",
    ),
    Stage(
        "audit",
        "audit --page-size 16,32,64,128,256",
        "--random-llama",
        "",
        "Memory, step by step",
        "The mixed batch, all figures at its last step: the minimum, each token stored once; the pages held (active), "
        "and what they hold beyond it; the pool's storage (reserved), what of it is resident, and what a DynamicCache "
        "(padded) and a StaticCache would hold. *Agrees*: resident memory and accounting.",
    ),
    Stage(
        "long-context",
        "long-context --tasks passkey,documents,copy",
        "--contexts 1000,2000 --limit 1",
        "--contexts 1000,2000,4000,7500",
        "Long contexts",
        "Tasks over long contexts; the score is the model's, the answers are compared.",
    ),
)
"""In the order in which they run."""
