"""OpenVINO GenAI is given the model that everything else is measured on."""

import runpy
from pathlib import Path

import gguf
import pytest
import torch

from hf_paged.packaged import load_packaged_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "beside_openvino.py"


@pytest.mark.real_model
def test_the_written_file_has_the_packaged_model_in_float16(tmp_path):
    runpy.run_path(str(EXAMPLE))["write_gguf"](tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    packed = {tensor.name: tensor for tensor in reader.tensors}
    assert {str(tensor.data.dtype) for tensor in packed.values()} == {"float16", "float32"}
    model, tokenizer = load_packaged_model()
    embedding = torch.tensor(packed["token_embd.weight"].data)
    assert torch.equal(embedding, model.get_input_embeddings().weight.half())
    gate = torch.tensor(packed["blk.3.ffn_gate.weight"].data)
    assert torch.equal(gate, model.model.layers[3].mlp.gate_proj.weight.half())
    assert len(packed) == len(list(model.parameters()))
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == len(tokenizer)
