"""`hf-paged generate`: answers to the prompts of a file, in a file."""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_paged._transformers import recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.compile.api import compiled
from hf_paged.compile.weights import gather_weights
from hf_paged.decoding.many.answers import generate_many
from hf_paged.pages.pool import PagePool
from hf_paged.tools.commands.arguments import add_model, check_file, keep, prepare
from hf_paged.tools.lab.model import load_model
from hf_paged.tools.lab.options import add_options, count, option, read_options
from hf_paged.tools.progress import progress

_KINDS = {"prompt": str, "messages": list, "input_ids": list}
_PAGE_SIZE = 32


@dataclass(frozen=True)
class Settings:
    """How prompts are answered that don't say it themselves."""

    max_new_tokens: int = option(256, "of each answer, at most", count)
    temperature: float = option(0.0, "at which tokens are drawn; 0: the likeliest ones", float)
    seed: int = option(0, "of the first prompt's numbers, plus 1 for each after it", int)
    max_rows: int = option(16, "answered at once, at most", count)
    num_pages: int | None = option(None, f"of {_PAGE_SIZE} tokens, at most (default: as needed)", count)
    compile: bool = option(False, "compile steps, which takes about a minute and pays for thousands of tokens")


def add(parser: Any) -> None:
    """Add the model, the files, and how prompts are answered."""
    parser.description += (
        " Each line of the one file\n"
        'is a prompt, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with arguments of\n'
        "generate() for this prompt alone, if any, and each line of the other an answer, in the order in which they\n"
        "end. What has an answer there is not answered again, so the same command goes on where it was interrupted."
    )
    add_model(parser)
    parser.add_argument("prompts", metavar="PROMPTS", type=Path, help="a JSON object in each line")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the answers go")
    add_options(parser, Settings)


def run(arguments: argparse.Namespace) -> None:
    """Answer what has no answer yet."""
    prepare(arguments)
    settings = read_options(Settings, arguments)
    lines = read_prompts(arguments.prompts)
    check_file("--out", arguments.out)
    about = [arguments.model, arguments.dtype, settings.max_new_tokens, settings.temperature, settings.seed]
    answers = AnswerFile(arguments.out, [_digest([*about, line]) for line in lines])
    arguments.kept = f" What was done is in {arguments.out}; the same command goes on from there."
    missing = [index for index in range(len(lines)) if index not in answers.done]
    measured = load_model(arguments.model, arguments.dtype, arguments.device)
    assert measured.tokenizer is not None  # it was loaded by its name
    if measured.tokenizer.chat_template is None and any("messages" in lines[index] for index in missing):
        raise ValueError(f"{measured.name} has no chat template for messages. Write them as {{'prompt': ...}}.")
    measured.model.set_attn_implementation(NAME)
    if settings.compile:
        gather_weights(measured.model)
    start = time.perf_counter()
    with compiled(measured.model) if settings.compile else nullcontext():
        figures = _answer(measured.model, measured.tokenizer, lines, missing, settings, answers)
    figures |= {"num_before": len(lines) - len(missing), "seconds": time.perf_counter() - start}
    _print(arguments.out, figures)
    keep(arguments, {"model": measured.name, "settings": asdict(settings), "figures": figures})


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[dict[str, Any]],
    missing: list[int],
    settings: Settings,
    answers: "AnswerFile",
) -> dict[str, Any]:
    given: list[int] = []  # numbers of the lines whose prompts were given

    def prompts() -> Iterator[dict[str, Any]]:
        for index in missing:
            line = {"seed": settings.seed + index} | lines[index]
            try:
                ids = _ids(tokenizer, line)
                _draw_or_not(line)
            except Exception as error:  # whatever a template raises
                answers.write(index, {"error": str(error)})
                continue
            given.append(index)
            yield line | {"input_ids": ids}

    drawn: dict[str, Any] = {"temperature": settings.temperature}
    _draw_or_not(drawn)
    pool = None
    if settings.num_pages is not None:
        finds_prefixes = recurrent_layer(model.config) is None
        pool = PagePool.from_model(model, settings.num_pages, _PAGE_SIZE, prefix_cache=finds_prefixes)
    with generate_many(
        model,
        prompts(),
        pool=pool,
        max_rows=settings.max_rows,
        max_new_tokens=settings.max_new_tokens,
        tokenizer=tokenizer,
        **drawn,
    ) as many:
        for result in progress(many, "answers", len(missing)):
            answer: dict[str, Any] = {"text": tokenizer.decode(result.tokens, skip_special_tokens=True)}
            answer |= {"num_tokens": len(result.tokens), "finish_reason": result.finish_reason}
            if result.error is not None:
                answer["error"] = str(result.error)
            answers.write(given[result.index], answer)
        return asdict(many.stats()) | {"num_failed": answers.num_failed}


def _ids(tokenizer: PreTrainedTokenizerBase, line: dict[str, Any]) -> list[int]:
    """Take the prompt out of its line, and return its tokens."""
    if "messages" in line:
        text = tokenizer.apply_chat_template(line.pop("messages"), tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids  # which the template has
    elif "prompt" in line:
        ids = tokenizer(line.pop("prompt")).input_ids
    else:
        ids = line.pop("input_ids")
    return ids


def _draw_or_not(arguments: dict[str, Any]) -> None:
    """Let a temperature say whether tokens are drawn, unless that is said."""
    if "temperature" in arguments and "do_sample" not in arguments:
        arguments["do_sample"] = arguments["temperature"] > 0
        if not arguments["do_sample"]:
            del arguments["temperature"]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a file of prompts; lines with nothing are left out.

    Raises:
        OSError: if it can't be read.
        ValueError: for a line that is no prompt, or if there is none.
    """
    lines = []
    for number, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
        kinds = [kind for kind in _KINDS if kind in line] if isinstance(line, dict) else []
        if len(kinds) != 1 or not isinstance(line[kinds[0]], _KINDS[kinds[0]]):
            raise ValueError(
                f'Line {number} of {path} is no prompt: an object is needed with one of "prompt", a text, "messages", '
                'a list, and "input_ids", a list.'
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no prompts.")
    return lines


class AnswerFile:
    """Answers in a file, a JSON object in each line, which is there as soon as the next one is asked for.

    Args:
        path: of the file; if there is one, it is gone on with. A line that was torn is dropped.
        digests: of the prompts, and of how they are answered.

    Attributes:
        done: numbers of the prompts whose answers are there.
        num_failed: answers that are errors.

    Raises:
        ValueError: if it holds something else, or answers to other prompts.
    """

    def __init__(self, path: Path, digests: list[str]) -> None:
        self.done: set[int] = set()
        self.num_failed = 0
        self._path = path
        self._digests = digests
        if path.exists():
            whole, _, _ = _text(path).rpartition("\n")
            for text in filter(None, whole.split("\n")):  # which is the only end of a line in JSON
                self._read(text)
            with path.open("r+b") as file:  # no sooner than it is known to be such a file
                file.truncate(len(f"{whole}\n".encode()) if whole else 0)

    def write(self, index: int, answer: dict[str, Any]) -> None:
        """Add the answer to a prompt, given its number."""
        line = json.dumps({"index": index, "of": self._digests[index]} | answer, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        self.done.add(index)
        self.num_failed += "error" in answer

    def _read(self, text: str) -> None:
        try:
            answer = json.loads(text)
            index, digest = answer["index"], answer["of"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._path} holds something else than answers. Name another file.") from error
        if not isinstance(index, int) or not 0 <= index < len(self._digests) or self._digests[index] != digest:
            raise ValueError(
                f"{self._path} holds the answer to prompt {index} of another file, model or settings. Go on with "
                "those, or name another file."
            )
        self.done.add(index)
        self.num_failed += "error" in answer


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8.") from error


def _digest(about: list[Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def _print(path: Path, figures: dict[str, Any]) -> None:
    before = f", beside {figures['num_before']:,} that were there" if figures["num_before"] else ""
    failed = f"; {figures['num_failed']:,} in all are errors" if figures["num_failed"] else ""
    print(
        f"{path}: {figures['num_done']:,} answers of {figures['num_new_tokens']:,} tokens in "
        f"{figures['seconds']:.0f} s{before}{failed}."
    )
