"""The batch of `hf-paged bench mixed` with OpenVINO GenAI, which is written for nothing but speed.

Why: whether a paged cache under Transformers is fast shows beside a program outside of PyTorch, with the same model.

How: `pip install openvino-genai`, then `python examples/openvino_genai.py --num-threads 2 --rounds 1`. The packaged
model is written with its matrices in float16 first, as OpenVINO GenAI refuses float32: 270 MB, as a GGUF file. The
packaged file itself is quantized to four bits, which would be another model. Run with OpenVINO GenAI 2026.4.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hf_paged.packaged import find_gguf, load_packaged_model, prompts
from hf_paged.tools.bench.scenarios.mixed import prompt_lengths
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="per prompt (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")
    args = parser.parse_args()
    rows = prompts(load_packaged_model()[1], prompt_lengths())
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "model.gguf")
        generate = load(f"{folder}/model.gguf", args.num_threads)
        total_s = statistics.median([timed(generate, rows, args.max_new_tokens) for _ in range(args.rounds + 1)][1:])
    num_tokens = sum(map(len, rows)) + len(rows) * args.max_new_tokens
    row = {"baseline": "openvino", "version": version("openvino-genai"), "total_s": total_s}
    figures = [row | {"tokens_per_s": num_tokens / total_s}]
    print(table(figures))
    if args.json:
        command = " ".join(["python", *sys.argv])
        write_results(args.json, provenance() | {"command": command, "openvino": {"rows": figures}})


def load(path: str, num_threads: int):
    """Make a function from prompts and a number of new tokens to the new tokens of each, greedily."""
    import openvino
    import openvino_genai

    # Left to itself it computes in bfloat16, where the processor can, and keeps keys and values in 8 bits.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": num_threads}
    scheduler = openvino_genai.SchedulerConfig()  # continuous batching
    pipeline = openvino_genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, **settings)

    def generate(rows: list[list[int]], num_new: int) -> list[list[int]]:
        width = max(map(len, rows))
        ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = row
            mask[index, width - len(row) :] = 1
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        output = pipeline.generate(inputs, max_new_tokens=num_new, ignore_eos=True, do_sample=False)
        return [list(tokens) for tokens in output.tokens]

    return generate


def timed(generate, rows: list[list[int]], num_new: int) -> float:
    start = time.perf_counter()
    outputs = generate(rows, num_new)
    seconds = time.perf_counter() - start
    if [len(output) for output in outputs] != [num_new] * len(rows):
        raise RuntimeError(f"{num_new} new tokens were asked for, but {list(map(len, outputs))} came.")
    return seconds


def write_gguf(path: Path) -> None:
    """Write the packaged model with its matrices in float16, and all the rest in float32."""
    import gguf

    reader = gguf.GGUFReader(find_gguf(path.parent))
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        # The format's own fields, and those that the writer has put there.
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            field.name, field.contents(), field.types[0], sub_type=field.types[-1] if is_list else None
        )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(*reversed(tensor.shape.tolist()))
        writer.add_tensor(tensor.name, weights.astype(np.float16 if weights.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
