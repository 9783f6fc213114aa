"""What the documentation shows can be run, and the site that is made of it is whole."""

import ast
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

from hf_paged.compile import api
from hf_paged.tools.bench import bandwidth
from hf_paged.tools.cli import main, make_parser
from tests.rooms import diagram

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
TROUBLESHOOT = DOCS / "how-to" / "troubleshoot.md"
SHOWN = ("text", "yaml", "json", "diff", "mermaid")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        return [words for line in self.code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, True))]


def in_navigation(entry) -> list[Path]:
    match entry:
        case str():
            return [DOCS / entry]
        case list():
            return [page for item in entry for page in in_navigation(item)]
        case dict():
            return in_navigation(list(entry.values()))


PAGES = [README, *in_navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"])]


def blocks(page: Path) -> list[Block]:
    found, fence = [], None
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if "```" not in line:
            continue
        assert re.fullmatch(r"```\w*", line), f"{page.name}:{number + 1}: a fence stands alone, unindented"
        if fence is None:
            fence = number
        else:
            code = "\n".join(lines[fence + 1 : number]) + "\n"
            found.append(Block(page, fence + 1, lines[fence].removeprefix("```"), code))
            fence = None
    assert fence is None, f"{page.name}:{fence}: this block has no end"
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Commands within a line of prose."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(code) for code in re.findall(r"`((?:accelerate|hf-paged|make|pip|python) [^`]+)`", prose)]


def check(words: list[str]) -> None:
    """Fail unless a command exists with these arguments."""
    match words:
        case ["hf-paged", name] | ["hf-paged", name, "--help"]:
            with pytest.raises(SystemExit, match="0"):
                make_parser([name]).parse_args([name, "--help"])
        case ["hf-paged", *arguments]:
            make_parser(arguments).parse_args(arguments)
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            assert launch.module
            check(["python", "-m", launch.training_script, *launch.training_script_args])
        case ["python", "-m", "hf_paged", *arguments]:
            check(["hf-paged", *arguments])
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), script
        case ["make", *targets]:
            rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(rules)
        case ["pip", "install", *wanted]:
            for name in wanted:
                if name != "--no-deps":
                    check_installable(name)
        case _:
            raise AssertionError(f"Nothing is known of the command {shlex.join(words)}.")


def check_installable(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirement = Requirement(re.sub(r"^\.", project["name"], name))
    assert requirement.extras <= set(project["optional-dependencies"])
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert requirement.name in (project["name"], *pinned)


def run(block: Block, names: dict[str, object], monkeypatch) -> None:
    if block.language == "python":
        # The empty lines in front let a traceback name the line of the page.
        exec(compile("\n" * block.line + block.code, block.page, "exec"), names)
        return
    assert block.language == "bash", f"{block.page.name}:{block.line}: a block is python, bash or one of {SHOWN}"
    for words in block.commands:
        check(words)
        match words:
            case ["hf-paged", *arguments]:
                assert main(arguments) == 0
            case ["python", script, *_] if script.startswith("examples/"):
                monkeypatch.setattr(sys, "argv", words[1:])
                runpy.run_path(str(ROOT / script), run_name="__main__")


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language not in SHOWN]


@pytest.mark.real_model
@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    monkeypatch.setattr(bandwidth, "_BYTES_ON_CPU", 2**20)  # read again and again beside what a bench measures
    if page != README:
        request.getfixturevalue("few_layers")
    if page.name != "compile.md":  # where inductor compiles what dynamo makes of the model
        monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(page):
        run(block, names, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_in_the_prose_of_a_page_exist(page):
    for words in inline_commands(page):
        check(words)


@pytest.mark.parametrize("code", ["rm pages", "pip install 'hf-paged[gpu]'", "make tea", "python examples/tea.py"])
def test_a_command_that_does_not_exist_fails(code, monkeypatch):
    with pytest.raises(AssertionError):
        run(Block(README, 1, "bash", code), {}, monkeypatch)


def test_a_block_of_an_unknown_language_fails(monkeypatch):
    with pytest.raises(AssertionError, match=r"README\.md:1: a block is python, bash or one of"):
        run(Block(README, 1, "console", "make test"), {}, monkeypatch)


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.language == "diff"],
    ids=lambda block: f"{block.page.name}:{block.line}",
)
def test_what_is_to_be_changed_in_a_script_begins_with_the_import(block):
    assert re.match(r"\+(import hf_paged|from hf_paged import )", block.code)


def test_a_command_that_is_not_ours_knows_the_name(tmp_path):
    (code,) = [block.code for block in blocks(TROUBLESHOOT) if "runpy" in block.code]
    words = shlex.split(code)
    assert words[:2] == ["python", "-c"]
    (tmp_path / "command.py").write_text(
        "import sys\nfrom transformers import AttentionInterface\n"
        "print('paged_flex' in AttentionInterface(), __name__, sys.argv[1:])\n"
    )
    script = words[2].replace("'lm_eval'", "'command'")
    done = subprocess.run(
        [sys.executable, "-c", script, *words[3:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"True __main__ {words[3:]}"


# Errors


def texts_of_errors() -> list[str]:
    """The messages of all errors that the package makes, with … for what is filled in, and the reasons for them."""
    texts = []
    for path in (ROOT / "hf_paged").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=arguments) if name.endswith(("Error", "_refused")):
                    texts += [template(argument) for argument in arguments]
                case ast.Return(value=ast.Constant(value=str()) | ast.JoinedStr() as reason):
                    texts.append(template(reason))
    return texts


def template(message: ast.expr) -> str:
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case _:
            return "…"


def test_the_errors_to_troubleshoot_are_those_that_the_package_raises():
    quoted = re.findall(r"^\| `(.+?)` \|", TROUBLESHOOT.read_text(), re.MULTILINE)
    messages = [message for message in quoted if " " in message]  # not the headings, which are names of errors
    texts = texts_of_errors()
    assert messages
    assert [message for message in messages if not any(message in text for text in texts)] == []


# The site


def test_the_site_has_every_page_and_asks_no_other_host_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) == len(PAGES)  # README is no page of the site, and 404.html is one
    for page in pages:
        html = page.read_text()
        assert re.findall(r'<(?:script|img|iframe)[^>]*src="?(?:https?:)?//', html) == []
        assert re.findall(r'<link[^>]*href="?(?:https?:)?//', html) == []


@pytest.mark.parametrize("module", ["hf_paged", "hf_paged.packaged", "hf_paged.tools.evaluation"])
def test_every_public_name_is_in_the_reference(site, module):
    html = (site / "reference" / "index.html").read_text()
    names = importlib.import_module(module).__all__
    # A name that a package takes from one of its files stands there by its place in the file.
    assert [name for name in names if not re.search(rf'id="{module}(\.\w+)?\.{name}"', html)] == []


def test_every_file_of_results_is_listed():
    page = DOCS / "results" / "README.md"
    listed = {page.parent / link for link in re.findall(r"\]\(([^)#]+\.json)\)", page.read_text())}
    assert listed == set(page.parent.rglob("*.json"))


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_figure_of_the_rooms_is_that_of_the_imports():
    assert diagram() in (ROOT / "docs" / "design.md").read_text()
