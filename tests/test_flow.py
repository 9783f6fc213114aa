"""What a newcomer has to read to follow a step."""

import os
import sys
from pathlib import Path

import torch

import hf_paged
from hf_paged import PagedCache
from tests.models import random_ids, tiny_llama

PACKAGE = str(Path(hf_paged.__file__).parent) + os.sep


def files_by_layer(model, cache, ids):
    """Names of our files that one pass enters, by the layer that is under way."""
    found = {}
    layer = None

    def enter(index):
        def hook(module, inputs):
            nonlocal layer
            layer = index

        return hook

    def look(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(PACKAGE):
            found.setdefault(layer, set()).add(path.removeprefix(PACKAGE))

    hooks = [module.register_forward_pre_hook(enter(index)) for index, module in enumerate(model.model.layers)]
    try:
        sys.setprofile(look)
        model(ids, past_key_values=cache)
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    return found


def test_a_decoding_step_of_one_row_passes_few_files():
    model = tiny_llama(num_layers=4)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model)
    with torch.inference_mode():
        model(random_ids(1, 20), past_key_values=cache)
        model(random_ids(1, 1), past_key_values=cache)  # compiles the kernel
        found = files_by_layer(model, cache, random_ids(1, 1))
    assert len(found[0]) <= 13, sorted(found[0])
    for layer in (1, 2):
        assert len(found[layer]) <= 10, sorted(found[layer])
        assert found[layer] <= found[0]
    assert {path.partition("/")[0] for path in found[3] - found[2]} == {"batch", "pages"}, "the last one commits"
