"""A part of the evaluation: one command of `hf-paged`, and the file that has its figures."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """What is run.

    Attributes:
        name: of the results file, without its suffix.
        short: arguments of `hf-paged` for half an hour on 2 cores.
        full: arguments for the full size.
        is_drawn: whether the command draws its figures.
    """

    name: str
    short: str
    full: str
    is_drawn: bool = False

    def arguments(self, folder: Path, is_full: bool, num_threads: int | None) -> list[str]:
        """The arguments of `hf-paged`, with where the figures go."""
        arguments = (self.full if is_full else self.short).split()
        if num_threads is not None:
            arguments += ["--num-threads", str(num_threads)]
        if self.is_drawn:
            arguments += ["--plot", str(folder)]
        return [*arguments, "--json", str(self.path(folder))]

    def path(self, folder: Path) -> Path:
        """Of the results file."""
        return folder / f"{self.name}.json"

    def run(self, folder: Path, is_full: bool, num_threads: int | None) -> int:
        """Run in a process of its own, so that no stage finds the memory of the one before; return the exit code."""
        command = [sys.executable, "-m", "hf_paged", *self.arguments(folder, is_full, num_threads)]
        return subprocess.run(command, check=False).returncode


STAGES = (
    Stage(
        "perplexity-256",
        "ppl --caches dynamic,paged,static --chunk-size 256 --max-length 2048 --max-tokens 8000",
        "ppl --caches dynamic,paged,static --chunk-size 256 --max-length 2048 --max-tokens 50000",
    ),
    Stage("perplexity-7", "ppl --chunk-size 7 --max-tokens 1000", "ppl --chunk-size 7 --max-tokens 10000"),
    Stage("perplexity-1", "ppl --chunk-size 1 --max-tokens 250", "ppl --chunk-size 1 --max-tokens 2000"),
    Stage(
        "perplexity-256-bf16",
        "ppl --dtype bfloat16 --chunk-size 256 --max-length 2048 --max-tokens 4000",
        "ppl --dtype bfloat16 --chunk-size 256 --max-length 2048 --max-tokens 50000",
    ),
    Stage(
        "perplexity-7-bf16",
        "ppl --dtype bfloat16 --chunk-size 7 --max-tokens 500",
        "ppl --dtype bfloat16 --chunk-size 7 --max-tokens 10000",
    ),
    Stage(
        "perplexity-1-bf16",
        "ppl --dtype bfloat16 --chunk-size 1 --max-tokens 100",
        "ppl --dtype bfloat16 --chunk-size 1 --max-tokens 2000",
    ),
    Stage(
        "latency",
        "bench latency --contexts 128,256,512,1024,2048 --baselines dynamic,paged,paged-compiled --rounds 1 "
        "--max-new-tokens 24",
        "bench latency --contexts 128,256,512,1024,2048,4096,8000 --baselines dynamic,paged,paged-compiled "
        "--max-new-tokens 64",
        is_drawn=True,
    ),
    Stage(
        "no-cache",
        "bench no-cache --contexts 128,256,512,1024,2048 --rounds 1 --max-new-tokens 4",
        "bench no-cache --contexts 128,256,512,1024,2048,4096",
        is_drawn=True,
    ),
    Stage(
        "single",
        "bench single --random-llama --contexts 1000,10000,32000,100000 --rounds 1 --max-new-tokens 16",
        "bench single",
        is_drawn=True,
    ),
    Stage(
        "mixed",
        "bench mixed --baselines dynamic,paged-ragged,paged-compiled --rounds 1 --max-new-tokens 24",
        "bench mixed",
        is_drawn=True,
    ),
    Stage(
        "chat",
        "bench chat --random-llama --contexts 1000,8000,16000,24000,32000 --rounds 1 --max-new-tokens 16",
        "bench chat",
        is_drawn=True,
    ),
    Stage(
        "page-size",
        "bench page-size --prompt-lengths 57,130,260,333,410,519,700,1007 --rounds 1 --max-new-tokens 16",
        "bench page-size",
        is_drawn=True,
    ),
    Stage(
        "audit",
        "audit --random-llama --page-sizes 16,32,64,128,256",
        "audit --page-sizes 16,32,64,128,256",
        is_drawn=True,
    ),
    Stage(
        "long-context",
        "long-context --tasks passkey,documents,copy --contexts 1000,2000 --limit 1",
        "long-context --tasks passkey,documents,copy --contexts 1000,2000,4000,7500",
    ),
)
"""In the order in which they run."""
