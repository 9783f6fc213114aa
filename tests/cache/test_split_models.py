"""Models that are run in parts, in other modes, or in two dtypes: by accelerate's hooks, autocast, inference mode."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import DynamicCache

from hf_paged import PagedCache
from hf_paged.attention.backends.block_lists import Layout
from hf_paged.attention.mask import paged_flex_mask
from tests.models import generate, left_padded, plain, random_ids, run, tiny_llama


@pytest.fixture(name="batch")
def ragged_batch():
    return random_ids(3, 21), left_padded(21, [21, 9, 16])


def plain_tokens(ids, mask):
    model = tiny_llama()
    return generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)


def in_parts(how, folder):
    model = tiny_llama()
    if how == "weights in memory":
        return cpu_offload(model, execution_device="cpu")
    if how == "weights on disk":
        return disk_offload(model, folder, execution_device="cpu")
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["weights in memory", "weights on disk", "device_map"])
def test_offloaded_layers_give_the_same_tokens(how, batch, tmp_path):
    ids, mask = batch
    model = in_parts(how, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), plain_tokens(ids, mask))
    assert {cache.pool.storage(layer).device.type for layer in range(2)} == {"cpu"}
    cache.pool.check_integrity()


def test_each_layer_is_stored_where_its_keys_are_and_tables_are_copied_there():
    config = tiny_llama().config
    cache = PagedCache(config, page_size=16)
    devices = [torch.device("cpu"), torch.device("meta")]  # meta stands in for a second GPU
    for _ in range(2):
        for layer, device in enumerate(devices):
            states = torch.randn(3, 2, 20, 16).to(device)
            assert {states.device for states in cache.update(states, states, layer)} == {device}
    assert [cache.pool.storage(layer).device for layer in range(2)] == devices
    assert cache.lengths == [40, 40, 40]
    for num_new in (1, 5):
        length, _ = cache.get_mask_sizes(num_new, 0)
        metadata = paged_flex_mask(3, num_new, length, config=config).metadata
        for layer, device in enumerate(devices):
            states = torch.zeros(3, 2, num_new, 16, device=device)
            keys, _ = cache.update(states, states, layer)
            block_lists = metadata.device_lists(
                length.sequences.rows.tables[0], Layout(3, 127, device, lists_full=False), keys.shape[2]
            )
            tables = (
                block_lists.kv_num_blocks,
                block_lists.kv_indices,
                block_lists.physical_to_logical,
                block_lists.seen,
            )
            assert {table.device for table in (keys, *tables)} == {device}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "paged_flex"])
def test_autocast(attention):
    ids, splits = random_ids(2, 60), [30] + [1] * 10 + [20]
    exact, model = plain(tiny_llama(), ids, splits), tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.set_attn_implementation("sdpa" if attention == "paged_flex" else attention)
        expected = run(model, DynamicCache(config=model.config), ids, splits)
        model.set_attn_implementation(attention)
        actual = run(model, PagedCache.from_model(model, page_size=16), ids, splits)
    if attention == "paged_flex":
        assert torch.equal(actual[:, :30], expected[:, :30])
        assert (actual - exact).abs().mean() < 1.1 * (expected - exact).abs().mean()
    else:
        assert torch.equal(actual, expected)


def test_gradient_checkpointing_is_of_no_account_in_eval_mode_and_refused_in_training(batch):
    ids, mask = batch
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), plain_tokens(ids, mask))
    mask = torch.cat([mask, mask.new_ones(3, 24)], dim=1)
    with pytest.raises(ValueError, match=r"not given to the PagedCache.*Call model.eval\(\) before"):
        model.train()(ids[:, :1], past_key_values=cache, attention_mask=mask)
    cache.crop(0)
    cache.pool.check_integrity()
    assert cache.lengths == [44, 32, 39]
