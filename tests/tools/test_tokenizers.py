"""Perplexity is that of a dense computation whichever way the tokens come from the text."""

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, GPTSw3Tokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from hf_paged.packaged import prose
from hf_paged.tools.evaluation import perplexity
from tests.models import tiny_model

VOCAB_SIZE = 600
BOS = 1
MAX_LENGTH = 48
KINDS = {"llama": True, "llama without BOS": False, "sentencepiece": False}
"""By name: whether the tokenizer adds a BOS token."""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model trained on prose, with a piece for each byte, as that of Llama."""
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose()[:60_000].splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model", num_threads=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(LlamaForCausalLM, LlamaConfig, vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_LENGTH)


@pytest.fixture(scope="module")
def folders(pieces, model, tmp_path_factory):
    """The model, saved with each kind of tokenizer."""
    root = tmp_path_factory.mktemp("models")
    file = root / "spiece.model"
    file.write_bytes(pieces.serialized_model_proto())
    vocab, _, merges = SentencePieceExtractor(str(file)).extract()
    tokenizers = {
        "llama": LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True),
        "llama without BOS": LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=False),
        "sentencepiece": GPTSw3Tokenizer(str(file), pad_token="<unk>", eos_token="</s>"),
    }
    for kind, tokenizer in tokenizers.items():
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in tokenizers}


def documents():
    """Texts of no token, one, a few, a window and several windows."""
    return ["", "a", "The naïve ✓", prose()[:90], prose()[1000:1400]]


@torch.no_grad()
def dense(model, token_ids):
    """The sum of the negative log-likelihoods, and how many there are; no cache, nothing padded, no chunks."""
    nll, count = 0.0, 0
    for begin in range(0, len(token_ids), MAX_LENGTH):
        window = torch.tensor([token_ids[begin : begin + MAX_LENGTH]])
        if window.shape[1] > 1:
            logits = model(window[:, :-1], use_cache=False).logits.double()
            nll += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return nll, count


def dense_perplexity(model, documents_ids):
    sums, counts = zip(*(dense(model, token_ids) for token_ids in documents_ids), strict=True)
    return torch.tensor(sum(sums) / sum(counts)).exp().item(), sum(counts)


def expected_ids(pieces, kind, text):
    return ([BOS] if KINDS[kind] else []) + pieces.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_gives_the_tokens_of_sentencepiece(pieces, folders, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    assert tokenizer.is_fast == (kind != "sentencepiece")
    for text in documents():
        assert tokenizer(text)["input_ids"] == expected_ids(pieces, kind, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_dense_one_with_any_tokenizer(pieces, folders, model, kind, batch_size):
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    result = perplexity(model, tokenizer, documents(), page_size=16, chunk_size=7, batch_size=batch_size)
    expected, count = dense_perplexity(model, [expected_ids(pieces, kind, text) for text in documents()])
    assert result.num_tokens == count
    for figures in result.figures:
        assert figures.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_word_is_scored_where_a_bos_token_precedes_it(folders, model, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    result = perplexity(model, tokenizer, ["a", "The naïve ✓"], page_size=16)
    assert set(result["paged"].text_perplexities) == ({0, 1} if KINDS[kind] else {1})


def test_a_sentencepiece_model_alone_is_enough(pieces, model, tmp_path):
    # As the first Llamas were published. Which tokens come of it is up to Transformers.
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    result = perplexity(model, tokenizer, documents(), page_size=16, chunk_size=7)
    expected, count = dense_perplexity(model, [tokenizer(text)["input_ids"] for text in documents()])
    assert result.num_tokens == count > 100
    assert [figures.perplexity for figures in result.figures] == pytest.approx([expected] * 2, rel=1e-5)
