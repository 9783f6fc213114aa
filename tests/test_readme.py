"""What the README shows can be run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.real_model
def test_the_first_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 8
    exec(code, {})
    assert "The capital of France, everyone knows, is" in capsys.readouterr().out
