"""Peers outside of PyTorch, on the prompts of `mixed`: OpenVINO GenAI, llama.cpp and ONNX Runtime GenAI.

Why: whether a paged cache under Transformers is fast shows beside programs that were written for nothing but speed.

How: `python -m hf_paged.tools.bench.peers --model-path NAME=PATH ... [--json FILE]`, where NAME is `openvino`,
`llama.cpp` or `onnxruntime` and PATH the model as that program wants it: a GGUF file, a folder of OpenVINO or ONNX
files. Take the same model for all, with weights of the same precision. `--write-gguf FILE` writes the packaged model,
in float16, for OpenVINO and llama.cpp. Run with OpenVINO GenAI 2026.4; the other two have not been run.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.tools.bench.mixed import prompt_lengths
from hf_paged.tools.bench.peer_model import write_gguf
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table

Prompts = Sequence[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


@dataclass(frozen=True)
class Peer:
    """A program, and how it generates.

    Attributes:
        module: that must be there to import.
        package: that has it.
        load: from a path and a number of threads, makes a function that generates greedily: prompts and the number
            of new tokens to the new tokens of each.
    """

    module: str
    package: str
    load: Callable[[str, int], Generate]


def load_openvino(path: str, num_threads: int) -> Generate:
    """Load a model for OpenVINO's continuous batching."""
    genai: Any = importlib.import_module("openvino_genai")
    openvino: Any = importlib.import_module("openvino")
    scheduler = genai.SchedulerConfig()
    # Left to itself it computes in bfloat16, where the processor can, and keeps keys and values in 8 bits.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": num_threads}
    pipeline = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, **settings)

    def generate(rows: Prompts, num_new: int) -> list[list[int]]:
        width = max(map(len, rows))
        ids = openvino.Tensor(_padded(rows, width, 0))
        mask = openvino.Tensor(_padded([[1] * len(row) for row in rows], width, 0))
        inputs = genai.TokenizedInputs(ids, mask)
        output = pipeline.generate(inputs, max_new_tokens=num_new, ignore_eos=True, do_sample=False)
        return [list(tokens) for tokens in output.tokens]

    return generate


def load_llama_cpp(path: str, num_threads: int) -> Generate:
    """Load a model for llama.cpp, which runs the prompts one by one."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(
        path, n_ctx=2048, n_threads=num_threads, n_threads_batch=num_threads, n_batch=512, verbose=False
    )

    def generate(rows: Prompts, num_new: int) -> list[list[int]]:
        outputs = []
        for row in rows:
            tokens = model.generate(row, temp=0.0, repeat_penalty=1.0, reset=True)
            outputs.append([next(tokens) for _ in range(num_new)])
        return outputs

    return generate


def load_onnxruntime(path: str, num_threads: int) -> Generate:
    """Load a model for ONNX Runtime GenAI, which runs the prompts one by one; threads are those of its own config."""
    genai: Any = importlib.import_module("onnxruntime_genai")
    model = genai.Model(path)

    def generate(rows: Prompts, num_new: int) -> list[list[int]]:
        outputs = []
        for row in rows:
            parameters = genai.GeneratorParams(model)
            length = len(row) + num_new
            parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(row)
            for _ in range(num_new):
                generator.generate_next_token()
            outputs.append(list(generator.get_sequence(0))[len(row) :])
        return outputs

    return generate


PEERS = {
    "openvino": Peer("openvino_genai", "openvino-genai", load_openvino),
    "llama.cpp": Peer("llama_cpp", "llama-cpp-python", load_llama_cpp),
    "onnxruntime": Peer("onnxruntime_genai", "onnxruntime-genai", load_onnxruntime),
}
"""By name."""


def measure(paths: dict[str, str], rows: Prompts, num_new: int, rounds: int, num_threads: int) -> list[dict[str, Any]]:
    """Run the prompts with every peer that is there.

    Args:
        paths: of the model, by the name of the peer.
        rows: token ids of each prompt.
        num_new: new tokens of each.
        rounds: counted runs, after one that isn't.
        num_threads: CPU threads.

    Returns:
        For each peer a row like those of `mixed`, with `version`, `total_s` and `tokens_per_s`, or `error`.
    """
    figures = []
    for name, peer in PEERS.items():
        row: dict[str, Any] = {"baseline": name}
        if importlib.util.find_spec(peer.module) is None:
            row["error"] = f"{peer.module} is not installed. Run: pip install {peer.package}"
        elif name not in paths:
            row["error"] = f"No model was given. Add --model-path {name}=PATH"
        else:
            try:
                row["version"] = importlib.metadata.version(peer.package)
                generate = peer.load(paths[name], num_threads)
                seconds = [_timed(generate, rows, num_new) for _ in range(rounds + 1)][1:]
                row["total_s"] = statistics.median(seconds)
                row["tokens_per_s"] = (sum(map(len, rows)) + len(rows) * num_new) / row["total_s"]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
        figures.append(row)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model-path", nargs="+", default=[], metavar="NAME=PATH", help="of each peer's model")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="per prompt (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")
    parser.add_argument("--write-gguf", metavar="FILE", help="write the packaged model to FILE, and do nothing else")
    given = parser.parse_args(arguments)
    if given.write_gguf:
        write_gguf(given.write_gguf)
        return
    paths = dict(entry.split("=", 1) for entry in given.model_path)
    rows = prompts(load_packaged_model()[1], prompt_lengths(Settings()))
    figures = measure(paths, rows, given.max_new_tokens, given.rounds, given.num_threads)
    print(table(figures))
    if given.json:
        command = " ".join(["python -m hf_paged.tools.bench.peers", *arguments])
        write_results(given.json, provenance() | {"command": command, "peers": {"rows": figures}})


def _timed(generate: Generate, rows: Prompts, num_new: int) -> float:
    start = time.perf_counter()
    outputs = generate(rows, num_new)
    seconds = time.perf_counter() - start
    if [len(output) for output in outputs] != [num_new] * len(rows):
        raise RuntimeError(f"{num_new} new tokens were asked for, but {list(map(len, outputs))} came.")
    return seconds


def _padded(rows: Prompts, width: int, filler: int) -> Any:
    return np.array([[filler] * (width - len(row)) + row for row in rows], dtype=np.int64)


if __name__ == "__main__":
    main()
