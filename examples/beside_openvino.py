"""The batches of `hf-paged bench mixed` and `many` with OpenVINO GenAI, which is written for nothing but speed.

Why: whether a paged cache under Transformers is fast shows beside a program outside of PyTorch, with the same model.

How: `pip install openvino-genai`, then `python examples/beside_openvino.py many --num-threads 2 --rounds 1`. The
packaged model is written with its matrices in float16 first, as OpenVINO GenAI refuses float32: 270 MB, as a GGUF
file. The packaged file itself is quantized to four bits, which would be another model. Run with OpenVINO GenAI 2026.4.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hf_paged.packaged import find_gguf, prompts
from hf_paged.tools.bench.scenarios.many import MAX_ROWS, Work, make_work
from hf_paged.tools.bench.scenarios.mixed import prompt_lengths
from hf_paged.tools.lab.model import load_model
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=["mixed", "many"])
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="per prompt, of mixed (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")
    args = parser.parse_args()
    work, max_rows = choose(args.scenario, args.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "model.gguf")
        generate = load(f"{folder}/model.gguf", args.num_threads, max_rows)
        total_s = statistics.median([timed(generate, work) for _ in range(args.rounds + 1)][1:])
    # As in the tables of the scenarios: the second counts new tokens only.
    num_tokens = sum(work.answers) + (sum(map(len, work.prompts)) if args.scenario == "mixed" else 0)
    row = {"baseline": "openvino", "version": version("openvino-genai"), "total_s": total_s}
    figures = [row | {"tokens_per_s": num_tokens / total_s}]
    print(table(figures))
    if args.json:
        command = " ".join(["python", *sys.argv])
        write_results(args.json, provenance() | {"command": command, "openvino": {"rows": figures}})


def choose(scenario: str, max_new_tokens: int) -> tuple[Work, int]:
    """Return the prompts of a scenario, how many tokens each is answered by, and how many run at a time."""
    measured = load_model(None, "float32", "cpu")
    if scenario == "many":
        return make_work(measured, None, 0.0), MAX_ROWS
    rows = prompts(measured.tokenizer, prompt_lengths())
    return Work(rows, [max_new_tokens] * len(rows)), len(rows)


def load(path: str, num_threads: int, max_rows: int):
    """Make a function that answers prompts greedily, each by as many tokens as its work says."""
    import openvino
    import openvino_genai

    # Left to itself it computes in bfloat16, where the processor can, and keeps keys and values in 8 bits.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": num_threads}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = max_rows
    pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", settings)

    def generate(work: Work) -> list[list[int]]:
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in work.prompts]
        configs = []
        for count in work.answers:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
            configs.append(config)
        return [list(result.m_generation_ids[0]) for result in pipeline.generate(ids, configs)]

    return generate


def timed(generate, work: Work) -> float:
    start = time.perf_counter()
    answers = generate(work)
    seconds = time.perf_counter() - start
    if list(map(len, answers)) != work.answers:
        raise RuntimeError(f"{work.answers} new tokens were asked for, but {list(map(len, answers))} came.")
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
