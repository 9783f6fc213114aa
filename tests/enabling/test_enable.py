"""An enabled model generates what it did, with pages."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    TextIteratorStreamer,
    pipeline,
)

import hf_paged
from hf_paged import PagedCache, PagedEncoderDecoderCache, PagePool
from hf_paged._transformers import CACHE
from tests.cache.test_generate_modes import (
    ASSISTED,
    BATCHES,
    CASES,
    CLOSE,
    MODELS,
    MODES,
    SAMPLING,
    ids_for,
)
from tests.models import letter_tokenizer, letters, random_ids, tiny_gemma, tiny_llama, tiny_model

NUM_NEW = 12


@pytest.fixture
def llama():
    return tiny_llama()


def generate(model, ids, mask=None, **arguments):
    torch.manual_seed(0)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    return model.generate(ids, attention_mask=mask, **(settings | arguments))


def pool_of(model):
    from hf_paged.enabling.state import STATES

    return STATES[model].pool


# The same generate()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "batch"), CASES[1:])
def test_tokens_and_scores_are_those_without_it(family, batch, mode):
    make_model, attention = MODELS[family]
    model, mask = make_model(), BATCHES[batch]
    model.set_attn_implementation(attention)
    shown = {"return_dict_in_generate": True, "output_scores": True}
    plain = generate(model, ids_for(mask), mask, **MODES[mode])
    scored = generate(model, ids_for(mask), mask, **MODES[mode], **shown)
    with hf_paged.enable(model, compile=False):
        assert torch.equal(generate(model, ids_for(mask), mask, **MODES[mode]), plain)
        found = generate(model, ids_for(mask), mask, **MODES[mode], **shown)
    assert torch.equal(found.sequences, scored.sequences)
    torch.testing.assert_close(found.scores, scored.scores, **CLOSE)
    assert isinstance(found[CACHE], PagedCache)


@pytest.mark.parametrize("mode", ASSISTED)
@pytest.mark.parametrize("family", ["gemma2"])
def test_drafts(family, mode):
    make_model, attention = MODELS[family]
    model, ids = make_model(), random_ids(1, 7).repeat(1, 3)
    model.set_attn_implementation(attention)
    arguments = dict(ASSISTED[mode])
    if "assistant_model" in arguments:
        arguments["assistant_model"] = copy.deepcopy(model) if arguments["assistant_model"] == "same" else tiny_llama()
    expected = generate(model, ids, **arguments)
    with hf_paged.enable(model, compile=False):
        assert torch.equal(generate(model, ids, **arguments), expected)
        assert "PagedCache" in hf_paged.explain(model)


def test_an_enabled_draft(llama):
    ids, draft = random_ids(1, 20), tiny_llama(num_layers=1)
    expected = generate(llama, ids)
    with hf_paged.enable(draft, compile=False), hf_paged.enable(llama, compile=False):
        assert torch.equal(generate(llama, ids, assistant_model=draft), expected)


def test_what_is_returned_beside_the_tokens_is_the_same(llama):
    ids = random_ids(2, 30)
    shown = dict.fromkeys(("return_dict_in_generate", "output_logits", "output_hidden_states"), True)
    expected = generate(llama, ids, **shown)
    with hf_paged.enable(llama, compile=False):
        found = generate(llama, ids, **shown)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, **CLOSE)


def test_encoder_decoders():
    sizes = {"d_model": 48, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "init_std": 0.3}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=200, **sizes, **heads)).eval()
    ids, settings = random_ids(3, 20), {"forced_eos_token_id": None}
    for arguments in ({}, {"num_beams": 3}, SAMPLING):
        expected = generate(model, ids, **settings, **arguments)
        with hf_paged.enable(model):
            assert torch.equal(generate(model, ids, **settings, **arguments), expected)
            returned = generate(model, ids, return_dict_in_generate=True, **settings, **arguments)
            assert isinstance(returned[CACHE], PagedEncoderDecoderCache)


def test_embeddings_in_place_of_ids(llama):
    ids = random_ids(2, 40)
    embeddings = llama.get_input_embeddings()(ids).detach()
    expected = llama.generate(inputs_embeds=embeddings, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)
    with hf_paged.enable(llama, compile=False):
        for _ in range(2):
            found = llama.generate(
                inputs_embeds=embeddings, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
            )
            assert torch.equal(found, expected)


def test_a_cache_or_a_choice_of_the_callers_is_kept(llama):
    ids = random_ids(1, 40)
    expected = generate(llama, ids)
    with hf_paged.enable(llama, compile=False):
        for arguments, said in (
            ({CACHE: DynamicCache(config=llama.config)}, "the DynamicCache that generate() was given"),
            ({CACHE: PagedCache(pool=PagePool(llama.config))}, "the PagedCache that generate() was given"),
            ({"use_cache": False}, "none, since use_cache=False"),
            ({"cache_implementation": "static"}, "that of cache_implementation='static'"),
        ):
            assert torch.equal(generate(llama, ids, **arguments), expected)
            assert said in hf_paged.explain(llama)


def test_a_loop_of_the_callers_is_run(llama):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        assert isinstance(kwargs[CACHE], PagedCache)
        return input_ids

    with hf_paged.enable(llama):
        assert generate(llama, random_ids(1, 20), custom_generate=loop).shape == (1, 20)


# What it is for


def test_a_growing_conversation_computes_what_is_new(llama):
    with hf_paged.enable(llama, compile=False, page_size=16):
        conversation, num_known = random_ids(1, 40), 0
        for turn in range(4):
            before = pool_of(llama).stats().num_hit_tokens if turn else 0
            answer = generate(llama, conversation)
            assert pool_of(llama).stats().num_hit_tokens - before == num_known // 16 * 16
            num_known = answer.shape[1] - 1
            conversation = torch.cat([answer, random_ids(1, 10, turn)], dim=1)
        changed = conversation.clone()
        changed[0, 50] += 1
        before = pool_of(llama).stats().num_hit_tokens
        generate(llama, changed)
        assert pool_of(llama).stats().num_hit_tokens - before == 48


def test_no_page_is_held_between_calls(llama):
    with hf_paged.enable(llama, compile=False):
        generate(llama, random_ids(3, 50), torch.ones(3, 50, dtype=torch.long))
        assert pool_of(llama).stats().num_active_pages == 0
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(
                llama, random_ids(3, 50), stopping_criteria=[lambda *_, **__: exec("raise RuntimeError('on purpose')")]
            )
        gc.collect()
        assert pool_of(llama).stats().num_active_pages == 0
        pool_of(llama).check_integrity()


def test_rows_that_end_give_their_pages_back(llama):
    ids = random_ids(4, 33)
    ends = generate(llama, ids)[:2, 34].tolist()
    held = []

    def watch(input_ids, scores, **kwargs):
        held.append(pool_of(llama).stats().num_active_pages)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = generate(llama, ids, eos_token_id=ends, max_new_tokens=30)
    with hf_paged.enable(llama, compile=False, prefix_cache=False):
        assert torch.equal(
            generate(llama, ids, eos_token_id=ends, max_new_tokens=30, stopping_criteria=[watch]), expected
        )
    assert held[-1] < held[0]


def test_a_model_compiles_once_it_has_decoded_for_as_long_as_that_takes(llama, monkeypatch):
    monkeypatch.setattr("hf_paged.enabling.state._COMPILE_SECONDS", 1e-6)
    ids = random_ids(2, 40)
    expected = generate(llama, ids)
    with hf_paged.enable(llama):
        for said in ("compiled: no, 0.0 s were decoded so far", "compiled: yes"):
            assert torch.equal(generate(llama, ids), expected)
            assert said in hf_paged.explain(llama)


# Who calls it


def test_a_pipeline_with_batches(llama):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", "left"
    texts = [letters(10 + 7 * seed % 50, seed) for seed in range(20)]
    settings = {"batch_size": 4, "do_sample": False, "max_new_tokens": 8, "return_tensors": True}
    expected = pipeline("text-generation", model=llama, tokenizer=tokenizer)(texts, **settings)
    with hf_paged.enable(llama, compile=False):
        found = pipeline("text-generation", model=llama, tokenizer=tokenizer)(texts, **settings)
    assert found == expected


def test_a_streamer_in_a_thread(llama):
    tokenizer, ids = letter_tokenizer(), random_ids(1, 30)
    with hf_paged.enable(llama, compile=False):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=generate, args=(llama, ids), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(generate(llama, ids)[0, 30:])


def test_threads_from_a_cold_start(llama):
    prompts = [random_ids(1 + seed % 2, 20 + seed, seed) for seed in range(16)]
    expected = [generate(llama, ids) for ids in prompts]
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    with hf_paged.enable(llama, compile=False), ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda ids: llama.generate(ids, **settings), prompts))
        pool_of(llama).check_integrity()
        assert pool_of(llama).stats().num_active_pages == 0
    assert all(map(torch.equal, found, expected))


def test_rollouts_between_steps_of_training(llama):
    reference = copy.deepcopy(llama)
    ids = random_ids(3, 40)

    def train(model):
        """Rollout, loss, backward, step; give the tokens of the rollouts."""
        optimizer, tokens = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(3):
            model.eval()
            tokens.append(generate(model, ids))
            model.train()
            model(tokens[-1], labels=tokens[-1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return tokens

    expected = train(reference)
    with hf_paged.enable(llama, compile=False):
        found = train(llama)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(expected[0], expected[2])


def test_training_mode_is_left_alone(llama):
    llama.train()
    ids = random_ids(2, 40)
    expected = generate(llama, ids)
    with hf_paged.enable(llama):
        assert torch.equal(generate(llama, ids), expected)
        assert pool_of(llama).stats().num_cached_pages == 0
        assert "since the model is in training mode" in hf_paged.explain(llama)


def test_peft_models(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ids, kind = random_ids(2, 40), type(model)
    with_adapter = generate(model, ids)
    with model.disable_adapter():
        without = generate(model, ids)
    with hf_paged.enable(model, compile=False) as enabled:
        assert enabled is model
        for _ in range(2):
            assert torch.equal(generate(model, ids), with_adapter)
            with model.disable_adapter():
                assert torch.equal(generate(model, ids), without)
        assert pool_of(llama).stats().num_hit_tokens == 2 * 64
    assert type(model) is kind
    assert type(llama) is LlamaForCausalLM


@pytest.fixture
def processes(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_for_several_processes(llama, processes):
    ids = random_ids(2, 40)
    wrapped = DistributedDataParallel(llama)
    expected = generate(llama, ids)
    with hf_paged.enable(wrapped, compile=False) as enabled:
        assert enabled is wrapped
        assert torch.equal(generate(wrapped.module, ids), expected)
        assert "loop: hf_paged.sample" in hf_paged.explain(wrapped)
        wrapped(ids, labels=ids).loss.backward()
        assert llama.lm_head.weight.grad is not None
    assert type(wrapped) is DistributedDataParallel
    assert type(llama) is LlamaForCausalLM


def test_wrapped_by_torch_compile(llama):
    ids = random_ids(2, 40)
    expected = generate(llama, ids)
    wrapped = torch.compile(llama, backend="eager")
    with hf_paged.enable(wrapped, compile=False):
        assert torch.equal(generate(wrapped, ids), expected)
        assert "loop: hf_paged.sample" in hf_paged.explain(wrapped)
    assert type(llama) is LlamaForCausalLM


# What is changed, and what is not


def test_disabling_leaves_the_model_as_it_was(llama):
    settings = llama.generation_config.to_dict()
    names = set(vars(llama))
    model = hf_paged.enable(llama)
    generate(model, random_ids(1, 40))
    pool = weakref.ref(pool_of(llama))
    assert model is llama
    assert isinstance(model, LlamaForCausalLM)
    hf_paged.disable(model)
    hf_paged.disable(model)
    gc.collect()
    assert type(llama) is LlamaForCausalLM
    assert llama.config._attn_implementation == "sdpa"
    assert llama.generation_config.to_dict() == settings
    assert set(vars(llama)) == names
    assert pool() is None


def test_an_exception_disables_at_the_end_of_a_context(llama):
    with pytest.raises(RuntimeError, match="on purpose"), hf_paged.enable(llama):
        raise RuntimeError("on purpose")
    assert type(llama) is LlamaForCausalLM


def test_other_models_and_copies_are_not_enabled(llama):
    other = tiny_llama()
    hf_paged.enable(llama)
    for model in (other, copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert type(model) is LlamaForCausalLM
        assert torch.equal(generate(model, random_ids(1, 40)), generate(llama, random_ids(1, 40)))


def test_a_model_that_is_saved_and_loaded_is_plain(llama, tmp_path):
    hf_paged.enable(llama).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.architectures == ["LlamaForCausalLM"]


def test_pools_may_be_shared(llama):
    pool = PagePool.from_model(llama, num_pages=50, page_size=16, prefix_cache=True)
    with hf_paged.enable(llama, pool=pool, compile=False):
        generate(llama, random_ids(1, 40))
    assert pool.stats().num_cached_pages == 3


def test_explain_says_what_was_used(llama):
    with pytest.raises(ValueError, match=r"is not enabled\. Call hf_paged\.enable"):
        hf_paged.explain(llama)
    with hf_paged.enable(llama, compile=False):
        assert "there was none yet" in hf_paged.explain(llama)
        generate(llama, random_ids(1, 40))
        text = hf_paged.explain(llama)
        generate(llama, random_ids(1, 40), custom_generate=hf_paged.prompt_lookup())
        assert "loop: the custom_generate that it was given" in hf_paged.explain(llama)
    for said in (
        "LlamaForCausalLM is enabled, with 'paged_flex' attention; before: 'sdpa'",
        "0 of 39 tokens were found",
        "loop: hf_paged.sample",
        "compiled: no, since compile=False",
        "cache: a new PagedCache, in the pool of this model",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": "yes"}, r"compile='yes' was asked for"),
        ({"page_size": 17}, "page_size=17 was asked for"),
        ({"memory_fraction": 2}, "memory_fraction=2 was asked for"),
        ({"page_size": 16, "pool": True}, "were asked for beside a pool"),
        ({"pool": "other"}, "a model with other layers than this LlamaForCausalLM"),
    ],
)
def test_arguments_that_make_no_sense_change_nothing(llama, arguments, message):
    if "pool" in arguments:
        arguments["pool"] = PagePool(tiny_gemma(24).config)
    with pytest.raises(ValueError, match=message):
        hf_paged.enable(llama, **arguments)
    assert type(llama) is LlamaForCausalLM
    assert llama.config._attn_implementation == "sdpa"


def test_what_is_no_model_is_refused(llama):
    for wrong in (llama.config, "name", pipeline("text-generation", model=llama, tokenizer=letter_tokenizer())):
        with pytest.raises(ValueError, match=r"enable\(\) was given .*, but it takes a model of Transformers"):
            hf_paged.enable(wrong)
    with pytest.raises(ValueError, match=r"A LlamaModel was given, which has no generate\(\)"):
        hf_paged.enable(tiny_model(LlamaModel, type(llama.config)))
    hf_paged.enable(llama)
    with pytest.raises(ValueError, match="is enabled already"):
        hf_paged.enable(llama)


def test_a_generation_config_of_the_callers_is_not_changed(llama):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    with hf_paged.enable(llama):
        llama.generate(random_ids(1, 40), generation_config=config)
    assert config.to_dict() == before


def test_training_goes_on_with_dropout():
    """A model is enabled for its rollouts, and trained in between as it was."""
    losses = []
    for is_enabled in (False, True):
        model = tiny_model(LlamaForCausalLM, LlamaConfig, attention_dropout=0.5)
        if is_enabled:
            hf_paged.enable(model, compile=False)
        generate(model, random_ids(2, 20))
        ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
        mask[0, :5] = 0
        for attention_mask in (None, mask):
            torch.manual_seed(0)
            losses.append(model.train()(ids, attention_mask=attention_mask, labels=ids).loss)
        model.eval()
    assert losses[:2] == losses[2:]
