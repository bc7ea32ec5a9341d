"""The README's commands work as they are printed, on a user's own folders and files."""

import json
import re
import shlex
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import retort
from retort import cli
from retort.data import arithmetic
from retort.data.chat import train_tokenizer

README = Path(__file__).parents[1] / "README.md"

# What a command printed for a real model would spend hours on, a test's tiny one need not.
STAGE = ("tokens=600", "rows=1", "micro_rows=1", "length=300")
SMALLER = {
    "distill": [f"stages.{i}.{setting}" for i in (0, 1) for setting in STAGE],
    "sample": ["sampling.n=3", "sampling.max_tokens=8", "problems.count=2"],
}


def commands() -> list[list[str]]:
    """The `retort` commands of the README's indented blocks, continued lines joined."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (retort .*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def python_block() -> str:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Llama of four layers, training and test problems, and the recipes."""
    examples = list(islice(arithmetic.examples("train", 0, (1, 2)), 40))
    tokenizer = train_tokenizer((e.question + e.solution for e in examples), 400)
    config = retort.DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        layer_types=("full_attention",) * 4,
        heads=4,
        kv_heads=2,
        head_dim=8,
        eos_token_ids=(1,),
    )
    torch.manual_seed(0)
    teacher = retort.Decoder(config)
    teacher.reset_parameters()
    retort.save(teacher, tmp_path / "models" / "my-llama", tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    rows = [vars(e) for e in examples]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]))
    (tmp_path / "recipes").symlink_to(README.parent / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_printed(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(commands()) >= 8
    for command in commands():
        small = [] if "--plan" in command else SMALLER.get(command[1], [])
        monkeypatch.setattr(sys, "argv", [*command, *small])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, (command, capsys.readouterr().err)
    for report in ("first-report", "report"):
        made = {path.name for path in (user / "runs" / report).iterdir()}
        assert {"report.html", "coverage.png", "coverage.svg", "curves.json"} <= made
    models = json.loads((user / "runs/report/curves.json").read_text())["models"]
    assert [model["name"] for model in models] == ["my-llama", "my-hybrid"]


@pytest.mark.usefixtures("user")
def test_the_python_runs_as_printed() -> None:
    names: dict[str, object] = {}
    exec(python_block(), names)
    completions = names["completions"]
    assert isinstance(completions, list)
    assert len(completions[0]) == 8
