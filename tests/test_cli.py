"""The command line as a user meets it: help at once, mistakes in one message, results as JSON."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import retort
from retort import cli
from retort.data.chat import train_tokenizer
from retort.model.decoder import Decoder
from retort.sample.engine import Engine
from retort.store import Run

COMMANDS = (
    "demo",
    "distill",
    "sample",
    "grade",
    "score",
    "verifier",
    "report",
    "runs",
    "inspect",
    "export",
    "publish",
    "doctor",
    "bench",
)
BENCHES = ("bench decode", "bench prefill", "bench train", "bench targets")
# Typer itself imports pydantic, which is quick; reading a recipe's models is not needed for help.
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "duckdb", "altair", "numpy"}
LATER = {"retort.recipe", "retort.store", "retort.demo"}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> Any:
        """The last line of stdout, as JSON."""
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Outcome]


def process(*words: object) -> Outcome:
    """`python -m retort` with these words, in a process of its own."""
    command = [sys.executable, "-m", "retort", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The same within this process, where torch is imported once for all tests."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["retort", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def model(tmp_path: Path, make_decoder: Callable[..., Decoder]) -> Path:
    """A checkpoint folder with random weights."""
    tokenizer = train_tokenizer(["Ada has 3 apples."], 300)
    decoder = make_decoder("am", vocab_size=len(tokenizer), eos_token_ids=(5, 6))
    retort.save(decoder, tmp_path / "tiny", tokenizer)
    return tmp_path / "tiny"


@pytest.fixture
def sources(tmp_path: Path, model: Path) -> list[str]:
    """What to sample: 3 problems, 4 completions each."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "problems: {kind: arithmetic, count: 3, difficulty: [1, 2]}\n"
        "sampling: {n: 4, max_tokens: 8}\n"
    )
    return [str(recipe), f"model={model}", f"out={tmp_path / 'run'}"]


@pytest.fixture
def run(command: Command, sources: list[str]) -> Path:
    """A sampled run, not graded."""
    return Path(command("sample", *sources, "--json").last["out"])


@pytest.fixture
def graded(command: Command, run: Path) -> Path:
    assert command("grade", run).code == 0
    return run


def refused(done: Outcome, message: str) -> None:
    """A user's mistake: one message on stderr, nothing on stdout, exit code 2."""
    assert done.code == 2
    # Typer frames its own messages, and breaks their lines to the width of the frame.
    assert message in re.sub(r"[\s│]+", " ", done.err)
    assert "Traceback" not in done.err
    assert done.out == ""


# Help


@pytest.mark.parametrize("name", [*COMMANDS[:-1], *BENCHES])
def test_every_command_has_help(command: Command, name: str) -> None:
    done = command(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert f"{name} [OPTIONS]" in done.out
    assert "--json" in done.out
    assert command(*name.split(), "-h").out == done.out


def test_help_lists_the_commands(command: Command) -> None:
    done = command("--help")
    assert (done.code, done.err) == (0, "")
    assert re.findall(r"^│ (\w+)  +\w", done.out, re.MULTILINE) == list(COMMANDS)


@pytest.mark.multiprocess
def test_help_answers_at_once() -> None:
    def seconds() -> float:
        began = os.times()
        assert process("--help").code == 0
        ended = os.times()
        used = (ended.children_user, ended.children_system)
        return sum(used) - began.children_user - began.children_system

    # Half a second is what a user is promised; a slow machine may need twice that.
    assert statistics.median(seconds() for _ in range(3)) < 1.0


@pytest.mark.multiprocess
def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from retort.cli import main
for words in {[[], *([name] for name in COMMANDS)]}:
    sys.argv = ["retort", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "retort.cli" in loaded
    assert not loaded & (HEAVY | LATER)


def test_alone_it_says_where_to_begin(command: Command) -> None:
    alone = command()
    assert (alone.code, alone.err) == (0, "")
    named = set(re.findall(r"^  retort (\w+)", alone.out, re.MULTILINE))
    assert named == {"demo", "doctor", "distill", "sample", "grade", "report"} <= set(COMMANDS)
    assert max(map(len, alone.out.splitlines())) <= 80


def test_doctor_ends_with_1_where_something_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    rows = command("doctor", "--json").last
    assert {"what", "found", "fine", "needed", "advice"} == set(rows[0])
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    found = command("doctor")
    assert (found.code, "MISSING" in found.out) == (1, True)


# The whole path


@pytest.mark.multiprocess
def test_from_a_model_to_a_report(sources: list[str], tmp_path: Path) -> None:
    # In processes of their own, as a user runs them, with stdout piped to another program.
    sampled = process("sample", *sources, "--json")
    assert sampled.code == 0, sampled.err
    assert sampled.out == json.dumps({"out": str(tmp_path / "run")}, separators=(",", ":")) + "\n"
    assert "100 % (12/12)" in sampled.err

    graded = process("grade", tmp_path / "run", "--json")
    assert graded.code == 0, graded.err
    (summary,) = graded.last.values()
    assert (summary["graded"], summary["total"]) == (12, 12)
    assert f"{tmp_path / 'run'}: graded 12, total 12" in graded.err

    told = process(
        "report", tmp_path / "run", "--out", tmp_path / "report", "--k", 1, "--k", 3, "--json"
    )
    assert told.code == 0, told.err
    (shown,) = told.last["models"]
    assert (shown["name"], shown["problems"], shown["samples"]) == ("tiny", 3, 4)
    assert [point["k"] for point in shown["points"]] == [1, 3]
    assert told.last == json.loads((tmp_path / "report" / "curves.json").read_text())
    assert f"report: {tmp_path / 'report' / 'report.html'}" in told.err
    assert "coverage" in told.out.splitlines()[0]
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


def test_without_json_only_tables_go_to_stdout(
    command: Command, sources: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert command("sample", *sources).out == ""
    assert command("grade", folder).out == ""
    out = command("report", folder, "--out", tmp_path / "report").out
    assert "tiny" in out
    assert not out.rstrip().endswith("}")


def test_the_same_command_has_nothing_left_to_do(
    command: Command, run: Path, sources: list[str]
) -> None:
    done = command("sample", *sources, "--json")
    assert done.last == {"out": str(run)}
    assert "all 12 completions are there, nothing to do" in done.err
    assert command("grade", run, "--json").last[str(run)]["graded"] == 12
    assert command("grade", run, "--json").last[str(run)]["graded"] == 0


def test_grades_several_runs(command: Command, run: Path, sources: list[str]) -> None:
    other = run.with_name("other")
    assert command("sample", *sources, f"out={other}").code == 0
    assert command("grade", run, other, "--json").last.keys() == {str(run), str(other)}


def test_ctrl_c_says_how_to_go_on(
    command: Command, sources: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks = Engine.looks

    def interrupted(self: Engine, *asked: Any) -> Any:
        yield [next(some[0] for some in looks(self, *asked) if some)]
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "looks", interrupted)
    done = command("sample", *sources, "--json")
    assert (done.code, done.out) == (130, "")
    assert "interrupted; the same command continues" in done.err
    assert Run.open(tmp_path / "run").completions.read().num_rows == 1


# Mistakes


@pytest.mark.parametrize("words", [["frobnicate"], ["sample"], ["grade"], ["report"], ["distill"]])
def test_incomplete_command(command: Command, words: list[str]) -> None:
    refused(command(*words), "No such command" if words == ["frobnicate"] else "Missing argument")


def test_unknown_option(command: Command) -> None:
    refused(command("grade", "--jsn", "run"), "No such option: --jsn")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "sampling.temperatur=1",
            "sampling.temperatur: unknown key, did you mean 'temperature'?",
        ),
        ("problems.cuont=2", "problems.cuont: unknown key, did you mean 'count'?"),
        ("sampling.n=many", "sampling.n: input should be a valid integer"),
        ("sampling.n=0", "sampling.n: input should be greater than 0, not 0"),
        ("sampling.top_p=2", "sampling.top_p: input should be less than or equal to 1"),
        ("problems.kind=riddles", "problems: kind 'riddles' is not known"),
        ("prompt=Solve this.", "prompt: must contain {question}"),
        ("device=abacus", "device 'abacus' cannot be used here"),
        ("sampling.max_tokens=5000", "sampling.max_tokens = 5000: with a prompt of"),
        ("model=nowhere", "nowhere: no such folder"),
        ("nowhere.yaml", "nowhere.yaml: no such recipe file"),
    ],
)
def test_wrong_recipe(command: Command, sources: list[str], word: str, message: str) -> None:
    refused(command("sample", *sources, word), message)


def test_all_mistakes_of_a_recipe_at_once(command: Command, sources: list[str]) -> None:
    done = command("sample", *sources, "sampling.n=many", "slot=3")
    refused(done, "sampling.n: input should be")
    refused(done, "slot: unknown key, did you mean 'slots'?")


def test_missing_keys(command: Command) -> None:
    done = command("sample", "problems.kind=gsm8k")
    refused(done, "out: missing, and it has no default")
    refused(done, "model: missing, and it has no default")


def test_misspelt_key_of_a_distillation(command: Command) -> None:
    recipe = retort.__path__[0] + "/recipes/demo/hybrid.yaml"
    refused(
        command("distill", recipe, "stages.0.optim.lrate=1e-3"),
        "stages.0.optim.lrate: unknown key, did you mean 'lr'?",
    )


@pytest.mark.multiprocess
def test_mistake_in_a_process_of_its_own() -> None:
    recipe = retort.__path__[0] + "/recipes/demo/hybrid.yaml"
    refused(process("distill", recipe, "sed=1"), "did you mean 'seed'?")


def break_config(model: Path) -> str:
    (model / "config.json").write_text("{")
    return "config.json: not valid JSON"


def break_weights(model: Path) -> str:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "damaged or truncated safetensors file"


def drop_config(model: Path) -> str:
    (model / "config.json").unlink()
    return f"{model}: no checkpoint here"


def drop_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return f"{model}: no checkpoint here"


def drop_tokenizer(model: Path) -> str:
    (model / "tokenizer_config.json").unlink()
    return f"{model}: no tokenizer here"


@pytest.mark.parametrize(
    "spoil", [break_config, break_weights, drop_config, drop_weights, drop_tokenizer]
)
def test_folder_that_is_no_checkpoint(
    command: Command, sources: list[str], model: Path, spoil: Callable[[Path], str]
) -> None:
    message = spoil(model)
    refused(command("sample", *sources), message)
    if spoil is not drop_tokenizer:  # measuring speed needs none
        refused(command("bench", "decode", model), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "problems.jsonl: no problems in it"),
        ("\n\n", "problems.jsonl: no problems in it"),
        ('{"question": "1 + 1?", "answer": "2"}\n\n{"question": "1?"}', "jsonl:3: no 'answer'"),
        ('{"question": "1 + 1?", "answer": ""}', "jsonl:1: no 'answer'"),
        ('{"question": "1 + 1?"', "jsonl:1: not valid JSON"),
        ("[1, 2]", "jsonl:1: a JSON object was expected"),
        (None, "problems.jsonl: no such file of problems"),
    ],
)
def test_wrong_file_of_problems(
    command: Command, model: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "problems.jsonl"
    if content is not None:
        file.write_text(content)
    words = [f"out={tmp_path / 'run'}", f"model={model}", f"problems.path={file}"]
    refused(command("sample", *words, "problems.kind=jsonl"), message)
    assert not (tmp_path / "run").exists()


def test_out_that_is_taken(command: Command, sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(command("sample", *sources, f"out={tmp_path / 'file'}"), "is a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    refused(command("sample", *sources, f"out={tmp_path / 'folder'}"), "holds files and no run")


def test_another_run_in_the_folder(command: Command, run: Path, sources: list[str]) -> None:
    refused(command("sample", *sources, "sampling.temperature=1"), "sampling.temperature was 0.8")
    assert command("sample", *sources, "sampling.temperature=1", "force=true").code == 0


@pytest.mark.parametrize("name", ["grade", "report"])
def test_folder_that_is_no_run(command: Command, tmp_path: Path, name: str) -> None:
    refused(command(name, tmp_path / "nowhere"), "is no run folder")
    refused(command(name, tmp_path), "is no run folder")


def test_report_of_a_run_that_is_not_graded(command: Command, run: Path, tmp_path: Path) -> None:
    done = command("report", run, "--out", tmp_path / "report")
    refused(done, f"{run} is not graded; run `retort grade {run}`")
    assert not (tmp_path / "report").exists()


def test_report_of_a_run_that_went_on_after_grading(
    command: Command, graded: Path, sources: list[str], tmp_path: Path
) -> None:
    assert command("sample", *sources, "sampling.n=5").code == 0
    done = command("report", graded, "--out", tmp_path / "report")
    refused(done, "3 completions are not graded")


@pytest.mark.parametrize("k", [0, 5])
def test_report_of_a_k_that_the_run_has_not(
    command: Command, graded: Path, tmp_path: Path, k: int
) -> None:
    refused(command("report", graded, "--k", k, "--out", tmp_path / "report"), f"k = {k} asked")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--price", "free"], "price 'free': expected an amount above 0"),
        (["--price", "other=2"], "no run is named 'other'"),
        (["--reference", "other"], "no run is named 'other'"),
    ],
)
def test_report_of_names_that_no_run_has(
    command: Command, graded: Path, tmp_path: Path, option: list[str], message: str
) -> None:
    refused(command("report", graded, *option, "--out", tmp_path / "report"), message)
    assert not (tmp_path / "report").exists()


def test_report_with_a_price(command: Command, graded: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command("report", graded, "--price", "2.5", "--out", out)
    (model,) = json.loads((out / "curves.json").read_text())["models"]
    assert model["price"] == 2.5
    assert 0.5 < model["replay_ratio"] < 1.5
    assert all(point["cost"]["flops"] > 0 for point in model["points"])


def test_report_into_a_file(command: Command, graded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(command("report", graded, "--out", tmp_path / "file"), "file: File exists")


def test_report_of_trainings_and_of_a_run(command: Command, graded: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pure.training", tmp_path / "report"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    refused(command("report", folder, "--out", out), "(metrics.jsonl is missing)")
    (folder / "metrics.jsonl").write_text('{"step":1,"stage":"match","tokens":64,"loss":1.5}\n')
    done = command("report", folder, graded, "--out", out, "--json")
    assert done.code == 0, done.err
    assert f"training curves: {out / 'training.html'}" in done.err
    assert {"report.html", "training.html"} <= {path.name for path in out.iterdir()}
    assert [each["name"] for each in done.last["models"]] == ["tiny"]
    assert [each["name"] for each in done.last["trainings"]] == ["pure"]
    assert "pure" in command("report", folder, "--out", tmp_path / "alone").out
    assert not (tmp_path / "alone" / "report.html").exists()
