"""The metric gives each text the perplexity of a dense computation, and evaluate finds it from anywhere."""

import math
import os
import subprocess
import sys

import evaluate
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_paged.tools.evaluation.metrics import PAGED_PERPLEXITY
from tests.models import tiny_model

PAGE_SIZE = 16
POSITIONS = 64
BOS = 1


def words(count, start=3):
    """A text of `count` tokens: word `w7` is token 7."""
    return " ".join(f"w{3 + (start + 31 * place) % 197}" for place in range(count))


def ids(text):
    return [int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def model():
    return tiny_model(LlamaForCausalLM, LlamaConfig, max_position_embeddings=POSITIONS)


def save(model, folder, **special_tokens):
    vocabulary = {"<unk>": 0, "<s>": BOS} | {f"w{index}": index for index in range(2, 200)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<unk>", **special_tokens).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("models") / "tiny", bos_token="<s>")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """Loaded from a folder that is not the repository."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(elsewhere / "modules"))
        patch.syspath_prepend(str(elsewhere / "modules"))
        yield evaluate.load(PAGED_PERPLEXITY, cache_dir=str(elsewhere / "cache"))


@torch.no_grad()
def dense(model, token_ids):
    """Perplexity without a cache, padding or chunks."""
    window = torch.tensor([token_ids])
    logits = model(window[:, :-1], use_cache=False).logits.double()
    return math.exp(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())


LENGTHS = [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 40]


@pytest.mark.parametrize("add_start_token", [True, False])
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 256), (3, 5), (16, PAGE_SIZE)])
def test_each_text_has_the_perplexity_of_a_dense_computation(
    metric, model, folder, add_start_token, batch_size, chunk_size
):
    texts = [words(length + (not add_start_token), start=length) for length in LENGTHS]
    result = metric.compute(
        predictions=texts,
        model_id=folder,
        batch_size=batch_size,
        add_start_token=add_start_token,
        page_size=PAGE_SIZE,
        chunk_size=chunk_size,
    )
    expected = [dense(model, [BOS] * add_start_token + ids(text)) for text in texts]
    assert result["perplexities"] == pytest.approx(expected, rel=1e-5)
    assert result["mean_perplexity"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_texts_may_be_added_one_after_the_other(metric, model, folder):
    for length in (2, 20):
        metric.add(prediction=words(length))
    result = metric.compute(model_id=folder, page_size=PAGE_SIZE)
    expected = [dense(model, [BOS, *ids(words(length))]) for length in (2, 20)]
    assert result["perplexities"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("asked", "length"), [(2, 2), (17, 17), (POSITIONS, POSITIONS), (None, POSITIONS)])
def test_longer_texts_are_cut_and_the_log_says_so(metric, model, folder, caplog, asked, length):
    result = metric.compute(predictions=[words(70), words(1)], model_id=folder, max_length=asked, page_size=PAGE_SIZE)
    expected = [dense(model, [BOS, *ids(text)][:length]) for text in (words(70), words(1))]
    assert result["perplexities"] == pytest.approx(expected, rel=1e-5)
    assert f"1 of 2 texts are cut to {length} tokens" in caplog.text


def test_weights_may_have_16_bits(metric, folder):
    result = metric.compute(predictions=[words(20)], model_id=folder, page_size=PAGE_SIZE, dtype="bfloat16")
    halved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert result["mean_perplexity"] == pytest.approx(dense(halved, [BOS, *ids(words(20))]), rel=0.01)


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([words(3), "", " "], {}, r"at least 1 tokens .* the texts \[1, 2\] have fewer"),
        ([words(1), words(3)], {"add_start_token": False}, r"at least 2 tokens .* the texts \[0\] have fewer"),
        ([], {}, "There is no token to score"),
        ([words(3)], {"max_length": 1}, f"max_length=1 was asked for; a window has 2 .* the model has {POSITIONS}"),
        ([words(3)], {"max_length": POSITIONS + 1}, f"max_length={POSITIONS + 1} was asked for"),
        ([words(3)], {"batch_size": 0}, "batch_size=0 was asked for; it must be at least 1"),
        ([words(3)], {"chunk_size": 0}, "chunk_size=0 was asked for; it must be at least 1"),
        ([words(3)], {"page_size": 17}, "page_size"),
    ],
)
def test_what_can_not_be_computed_is_refused(metric, folder, texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=texts, model_id=folder, **arguments)


def test_a_start_token_that_the_tokenizer_lacks_is_refused(metric, model, tmp_path):
    folder = save(model, tmp_path / "no-bos")
    with pytest.raises(ValueError, match=r"tokenizer of no-bos has no BOS token\. Give add_start_token=False"):
        metric.compute(predictions=[words(3)], model_id=folder)
    result = metric.compute(predictions=[words(3)], model_id=folder, add_start_token=False, page_size=PAGE_SIZE)
    assert result["perplexities"] == pytest.approx([dense(model, ids(words(3)))], rel=1e-5)


def test_another_process_in_another_folder_loads_it_offline(tmp_path):
    script = (
        "import evaluate, hf_paged.tools.evaluation.metrics as metrics\n"
        "metric = evaluate.load(metrics.PAGED_PERPLEXITY)\n"
        "print(metric.name, metric.module_type, *metric.features)"
    )
    search_path = os.pathsep.join(sys.path)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["paged_perplexity", "metric", "predictions"]
