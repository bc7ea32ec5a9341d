"""The loop: it learns, adds up micro-batches, may be killed at any moment, and warns in time."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import retort
from retort.data.ahead import Ahead
from retort.data.chat import load_tokenizer, train_tokenizer
from retort.data.packing import Batch, Rows
from retort.metrics import read_metrics
from retort.model import weights
from retort.model.config import ATTENTION, LINEAR
from retort.model.decoder import Decoder
from retort.model.transplant import transplant
from retort.store import LOCK, locked
from retort.train import folder, importance, loop, prepare
from retort.train.step import Stepper

from .processes import STEP, WRITTEN, Moment, run_until_killed
from .tiny import STUDENT, Values, fresh, hybrid, stage

MakeDecoder = Callable[..., Decoder]

MIXER_KINDS = ["mamba2", "discrete_mamba2", "mamba1"]


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of a run that nothing stopped."""
    return loop.distill(hybrid(tmp_path_factory.mktemp("runs") / "undisturbed", teacher))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def metrics(out: Path) -> list[Values]:
    """What a run recorded, but for its speed."""
    records = read_metrics(folder.work_folder(out) / "metrics.jsonl")
    timing = {"seconds", "waited", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


def assert_same_run(out: Path, undisturbed: Path) -> None:
    """Bit for bit the same student, and the same metrics: no step left out, none twice."""
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4, 5, 6, 7]
    assert metrics(out) == metrics(undisturbed)
    assert contents(out) == contents(undisturbed)


@pytest.fixture
def on_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Has something happen in the middle of the n-th step from here on."""

    def arrange(number: int, happen: Callable[[], object]) -> None:
        gradients, calls = Stepper._gradients, iter(range(1, 1000))

        def interrupted(*arguments: Any) -> Any:
            if next(calls) == number:
                happen()
            return gradients(*arguments)

        monkeypatch.setattr(Stepper, "_gradients", interrupted)

    return arrange


# ---------------------------------------------------------------- a whole run


def test_a_run_learns_and_transformers_reads_what_it_leaves(tmp_path: Path) -> None:
    out = loop.distill(fresh(tmp_path / "student", stage(steps=30)))
    losses = [record["loss"] for record in metrics(out)]
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out),
    )
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Ada has"}], tokenize=False)
    ids_BT = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        wanted = theirs(ids_BT).logits
    torch.testing.assert_close(retort.load(out)(ids_BT), wanted, rtol=0, atol=1e-5)


def test_a_teacher_that_reads_ahead_changes_nothing(
    tmp_path: Path, teacher: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_beforehand(ahead: Ahead, rows: Rows, finish: object) -> None:
        made(ahead, rows, Batch.trimmed)

    made = Ahead.__init__
    monkeypatch.setattr(Ahead, "__init__", nothing_beforehand)
    assert_same_run(loop.distill(hybrid(tmp_path / "student", teacher)), undisturbed)


@pytest.mark.parametrize("kind", ["with a teacher", "rows split", "alone"])
def test_padding_that_is_cut_off_changes_nothing(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rows with documents in half of them."""

    def run(name: str) -> Path:
        if kind == "alone":
            return loop.distill(fresh(tmp_path / name, stage(steps=1, rows=1)))
        changes = {"rows": 2, "micro_rows": 1} if kind == "rows split" else {"rows": 1}
        stages = (stage(each, 1, **changes) for each in ("hidden_states", "distill"))
        return loop.distill(hybrid(tmp_path / name, teacher, *stages))

    lengths: list[int] = []
    take = Stepper.take

    def watched(stepper: Stepper, batch: Batch, waited: float) -> dict[str, Any]:
        lengths.append(batch.ids_BT.shape[1])
        return take(stepper, batch, waited)

    monkeypatch.setattr(Stepper, "take", watched)
    trimmed = run("trimmed")
    assert max(lengths) < stage()["length"]
    lengths.clear()
    monkeypatch.setattr(Batch, "trimmed", lambda batch: batch)
    whole = run("whole")
    assert set(lengths) == {stage()["length"]}
    for ours, wanted in zip(metrics(trimmed), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert ours["tokens"] == wanted["tokens"]


def test_compiled_code_has_rows_of_one_length(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    gradients = Stepper._gradients

    def watched(stepper: Stepper, batch: Batch) -> Any:
        shapes.append(batch.ids_BT.shape)
        return gradients(stepper, batch)

    monkeypatch.setattr(Stepper, "_gradients", watched)
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    compiled = {"parallel": {"compile": True}}
    loop.distill(hybrid(tmp_path / "student", teacher, stage("distill", 1, rows=1), **compiled))
    assert shapes == [(1, 288), (1, 288)]


@pytest.mark.parametrize(("changes", "ahead"), [({}, 3), ({"micro_rows": 1}, 0)])
def test_a_teacher_reads_ahead_unless_rows_are_split(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Values,
    ahead: int,
) -> None:
    """In the thread that makes the rows, which may be a batch further than the steps."""
    readers: list[str] = []
    teach = loop.teach

    def watched(*asked: Any) -> Batch:
        readers.append(threading.current_thread().name)
        return teach(*asked)

    monkeypatch.setattr(loop, "teach", watched)
    loop.distill(hybrid(tmp_path / "student", teacher, stage("distill", 3, **changes)))
    assert ahead <= len(readers) <= ahead + 1
    assert all(name.startswith("rows") for name in readers)


def test_what_is_recorded_of_a_step(teacher: Path) -> None:
    first, _, last = read_metrics(folder.work_folder(teacher) / "metrics.jsonl")
    assert (first["step"], first["stage"], first["tokens"]) == (1, "supervised", 576)
    assert first["loss"] == first["ce"] > 0
    assert first["gradient_norm"] > 0
    assert first["lr"] == pytest.approx(5e-3 / 1.3)  # one step of three tenths is warm-up
    assert last["tokens"] == 3 * 576
    assert first["tokens_per_second"] > 0
    assert (last["bad_steps"], last["skipped"], last["spike"], last["unused"]) == (0, 0, 0, {})
    assert sum(last["data"].values()) <= last["tokens"]


def test_the_clock_counts_all_that_passes(
    tmp_path: Path,
    teacher: Path,
    on_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waiting for rows, too; and it goes on where a run does."""
    batch = Ahead.batch

    def late(rows: Ahead) -> Batch:
        time.sleep(0.2)
        return batch(rows)

    monkeypatch.setattr(Ahead, "batch", late)
    wanted = hybrid(tmp_path / "student", teacher, stage("supervised", 4))
    on_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    loop.distill(wanted)
    records = read_metrics(folder.work_folder(wanted.out) / "metrics.jsonl")
    assert all(record["waited"] >= 0.2 for record in records)
    assert all(record["tokens_per_second"] <= 576 / 0.2 for record in records)
    clock = [0.0, *(record["seconds"] for record in records)]
    assert len(clock) == 5
    assert all(after - before >= 0.2 for before, after in pairwise(clock))


def test_a_finished_run_is_left_alone(
    teacher: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(undisturbed.parent)
    assert loop.distill(hybrid(undisturbed, teacher)) == undisturbed
    assert contents(undisturbed.parent) == before
    assert "already finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"stages": [stage("hidden_states")]},
        {"decontaminate": [{"kind": "arithmetic"}]},
    ],
)
def test_another_recipe_in_the_same_place_is_refused(
    teacher: Path, undisturbed: Path, changes: Values
) -> None:
    before = contents(undisturbed.parent)
    with pytest.raises(ValueError, match=r"undisturbed.training: holds another recipe's run"):
        loop.distill(hybrid(undisturbed, teacher, **changes))
    assert contents(undisturbed.parent) == before


def test_a_run_that_was_moved_is_the_same(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named from another folder, and under another name."""
    loop.distill(hybrid(tmp_path / "first", teacher, stage("supervised", 1)))
    for path in (tmp_path / "first", tmp_path / "first.training"):
        path.rename(path.with_name(path.name.replace("first", "second")))
    monkeypatch.chdir(tmp_path)
    loop.distill(hybrid(Path("second"), teacher, stage("supervised", 1)))
    assert "second: already finished" in capsys.readouterr().err


def test_force_starts_over(tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "student"
    loop.distill(hybrid(out, teacher, stage("supervised", 2)))
    loop.distill(hybrid(out, teacher, stage("supervised", 1), force=True))
    assert [record["step"] for record in metrics(out)] == [1]


def test_a_student_that_was_deleted_is_made_again(tmp_path: Path, teacher: Path) -> None:
    wanted = hybrid(tmp_path / "student", teacher, stage("supervised", 1))
    first = contents(loop.distill(wanted))
    for path in wanted.out.iterdir():
        path.unlink()
    wanted.out.rmdir()
    assert contents(loop.distill(wanted)) == first


def test_only_what_is_not_frozen_changes(tmp_path: Path, teacher: Path) -> None:
    student = {"start": "folder", "folder": teacher}
    frozen = stage(steps=2, freeze=["*.mlp.*", "model.embed_tokens.weight"])
    out = loop.distill(fresh(tmp_path / "tuned", frozen, student=student))
    before, after = (load_file(folder / weights.SINGLE) for folder in (teacher, out))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {n for n in before if ".mlp." in n or n == "model.embed_tokens.weight"}


@pytest.mark.parametrize("mixer", MIXER_KINDS)
def test_frozen_weights_of_a_student_stay_byte_for_byte(
    tmp_path: Path, teacher: Path, mixer: str
) -> None:
    """Those whose names fit a pattern and no others, in the stage that says so and no other."""
    patterns = ["*.in_proj.weight", "*.conv1d.*", "model.layers.1.*", "*norm.weight", "*.D"]
    stages = [stage("distill", 2, freeze=patterns), stage("supervised", 2, freeze=["*.mlp.*"])]
    changes = {"student": STUDENT | {"mixer": mixer}, "checkpoints": {"every": 2, "keep": 9}}
    wanted = hybrid(tmp_path / "student", teacher, *stages, **changes)
    start = prepare.prepare(wanted).student.state_dict()
    end = retort.load(loop.distill(wanted)).state_dict()
    state = folder.work_folder(wanted.out) / "checkpoints" / "step-000000002"
    (path,) = state.glob("*.safetensors")
    middle = load_file(path)
    names = start.keys() - {"lm_head.weight"}  # the embedding, once more
    first = {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}
    second = {name for name in names if ".mlp." in name}
    assert {name for name in names if torch.equal(start[name], middle[f"model.{name}"])} == first
    assert {name for name in names if torch.equal(middle[f"model.{name}"], end[name])} == second


def test_layer_wise_stages_leave_the_rest_alone(tmp_path: Path, teacher: Path) -> None:
    out = loop.distill(hybrid(tmp_path / "student", teacher, stage("mixing_matrices", 2)))
    before, after = retort.load(teacher).state_dict(), retort.load(out).state_dict()
    changed = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    assert changed == {"model.layers.0.input_layernorm.weight"}


# ---------------------------------------------------------------- other mixers, other layers


@pytest.mark.parametrize("mixer", ["discrete_mamba2", "mamba1"])
def test_a_run_of_each_mixer_may_be_stopped(
    tmp_path: Path,
    teacher: Path,
    on_step: Callable[[int, Callable[[], object]], None],
    mixer: str,
) -> None:
    student = STUDENT | {"mixer": mixer}
    undisturbed = loop.distill(hybrid(tmp_path / "undisturbed", teacher, student=student))
    wanted = hybrid(tmp_path / "stopped", teacher, student=student)
    on_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    assert_same_run(loop.distill(wanted), undisturbed)
    config = retort.load(undisturbed).config
    assert config.layer_types == (LINEAR, ATTENTION)
    assert config.mixer is not None
    assert config.mixer.kind == mixer


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        ({"kind": "every", "step": 2}, (LINEAR, ATTENTION)),
        ({"kind": "every", "step": 3}, (LINEAR, LINEAR)),
        ([], (LINEAR, LINEAR)),
        ([0], (ATTENTION, LINEAR)),
    ],
    ids=str,
)
def test_layers_that_stay(tmp_path: Path, teacher: Path, keep: Any, wanted: Any) -> None:
    student = STUDENT | {"keep_attention": keep}
    job = prepare.prepare(hybrid(tmp_path / "student", teacher, student=student))
    assert job.student.config.layer_types == wanted
    assert list(tmp_path.iterdir()) == []


def test_layers_of_the_paper_need_its_depth(tmp_path: Path, teacher: Path) -> None:
    student = STUDENT | {"keep_attention": {"kind": "paper"}}
    with pytest.raises(ValueError, match="hybrids of 16, 28 layers, and this teacher has 2"):
        loop.distill(hybrid(tmp_path / "student", teacher, student=student))


@pytest.fixture
def important(tmp_path: Path) -> Values:
    """A student that keeps the layer it can least do without, measured on plain text."""
    path = tmp_path / "texts.jsonl"
    texts = [f"Text number {i} says little, but says it twice. " * 2 for i in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"kind": "text", "path": path}
    keep = {"kind": "important", "count": 1, "data": data, "rows": 2, "length": 64}
    return STUDENT | {"keep_attention": keep}


def test_the_costliest_layer_stays(tmp_path: Path, teacher: Path, important: Values) -> None:
    wanted = hybrid(tmp_path / "student", teacher, stage("distill", 1), student=important)
    out = loop.distill(wanted)
    costs = importance.remembered(folder.work_folder(out), folder.identity(wanted))
    assert costs is not None
    assert costs.keys() == {0, 1}
    (kept,) = retort.load(out).config.attention_layers
    assert costs[kept] == max(costs.values()) > min(costs.values()) > 0


@pytest.mark.parametrize("highest", [0, 1])
def test_costs_decide(
    tmp_path: Path,
    teacher: Path,
    important: Values,
    monkeypatch: pytest.MonkeyPatch,
    highest: int,
) -> None:
    monkeypatch.setattr(importance, "measure", lambda *_: {highest: 2.0, 1 - highest: 1.0})
    job = prepare.prepare(hybrid(tmp_path / "student", teacher, student=important))
    assert job.student.config.attention_layers == (highest,)


@pytest.mark.parametrize("force", [False, True])
def test_layers_are_measured_once(
    tmp_path: Path,
    teacher: Path,
    important: Values,
    on_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    force: bool,
) -> None:
    """A run that is stopped goes on with the same layers; the student is the same, too."""
    undisturbed = loop.distill(hybrid(tmp_path / "undisturbed", teacher, student=important))
    on_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(hybrid(tmp_path / "stopped", teacher, student=important, force=force))
    monkeypatch.setattr(importance, "measure", lambda *_: pytest.fail("measured again"))
    assert_same_run(
        loop.distill(hybrid(tmp_path / "stopped", teacher, student=important)), undisturbed
    )


def test_a_student_is_the_same_when_nothing_is_measured_again(
    tmp_path: Path, teacher: Path, important: Values
) -> None:
    """A run killed before its first state starts from the same weights."""
    wanted = hybrid(tmp_path / "student", teacher, student=important)
    first = prepare.prepare(wanted)
    work = folder.work_folder(wanted.out)
    work.mkdir()
    importance.remember(work, folder.identity(wanted), first.costs)
    again = prepare.prepare(wanted).student.state_dict()
    assert all(torch.equal(again[n], tensor) for n, tensor in first.student.state_dict().items())


def test_starting_over_measures_again(
    tmp_path: Path, teacher: Path, important: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hybrid(tmp_path / "student", teacher, stage("distill", 1), student=important)
    loop.distill(wanted)
    monkeypatch.setattr(importance, "measure", lambda *_: {0: 7.0, 1: 8.0})
    again = wanted.model_copy(update={"force": True})
    loop.distill(again)
    costs = importance.remembered(folder.work_folder(wanted.out), folder.identity(wanted))
    assert costs == {0: 7.0, 1: 8.0}


def test_nothing_is_written_when_layers_are_measured_in_vain(
    tmp_path: Path, teacher: Path, important: Values
) -> None:
    out = tmp_path / "runs" / "student"
    wanted = hybrid(out, teacher, stage("distill", freeze=["*.nose"]), student=important)
    with pytest.raises(ValueError, match=r"'\*\.nose' matches no parameter"):
        loop.distill(wanted)
    assert not out.parent.exists()


# ---------------------------------------------------------------- a few layers at a time


def further(source: Path, **changes: Any) -> Values:
    """A student made from another one, without any attention left."""
    return STUDENT | {"source": source, "keep_attention": []} | changes


@pytest.mark.parametrize("mixer", MIXER_KINDS)
def test_a_student_taken_further(tmp_path: Path, teacher: Path, mixer: str) -> None:
    """Its trained mixer goes on as it was; the layer replaced now starts from its attention."""
    first = hybrid(
        tmp_path / "half", teacher, stage("distill", 2), student=STUDENT | {"mixer": mixer}
    )
    half = loop.distill(first)
    wanted = hybrid(
        tmp_path / "pure", teacher, stage("distill", 2), student=further(half, mixer=mixer)
    )
    start, before = prepare.prepare(wanted).student.state_dict(), retort.load(half).state_dict()
    assert {name for name in start if name not in before} == {
        name for name in start if name.startswith("model.layers.1.mamba.")
    }
    assert all(torch.equal(before[name], start[name]) for name in before.keys() & start.keys())
    wanted_rows = before["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(start["model.layers.1.mamba.out_proj.weight"], wanted_rows)
    assert retort.load(loop.distill(wanted)).config.layer_types == (LINEAR, LINEAR)
    assert contents(half) == contents(loop.distill(first))


def test_the_layers_left_are_measured(
    tmp_path: Path, teacher: Path, undisturbed: Path, important: Values
) -> None:
    student = further(undisturbed, keep_attention=important["keep_attention"])
    job = prepare.prepare(hybrid(tmp_path / "student", teacher, student=student))
    assert job.costs.keys() == {1}
    assert job.student.config.layer_types == (LINEAR, ATTENTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_attention": [0]}, "the teacher has no attention in layer 0"),
        ({"mixer": "mamba1"}, "linear layers have other mixers"),
        ({"settings": {"state_size": 24}}, "linear layers have other mixers"),
        ({"source": "missing"}, "missing: no such folder"),
    ],
    ids=str,
)
def test_students_that_cannot_be_taken_further(
    tmp_path: Path, teacher: Path, undisturbed: Path, changes: Values, message: str
) -> None:
    student = further(undisturbed) | changes
    with pytest.raises(ValueError, match=message):
        loop.distill(hybrid(tmp_path / "student", teacher, student=student))
    assert list(tmp_path.iterdir()) == []


def test_a_source_must_share_the_teachers_tokenizer(
    tmp_path: Path, teacher: Path, undisturbed: Path
) -> None:
    source = tmp_path / "other"
    weights.save(retort.load(undisturbed), source, train_tokenizer(["nothing of the kind"], 290))
    wanted = hybrid(tmp_path / "out", teacher, student=further(source))
    with pytest.raises(ValueError, match="other: its tokenizer differs from the teacher's"):
        loop.distill(wanted)


# ---------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_signal_saves_and_ends(
    tmp_path: Path,
    teacher: Path,
    undisturbed: Path,
    on_step: Callable[[int, Callable[[], object]], None],
    number: signal.Signals,
    step: int,
) -> None:
    """In the first step, in a stage's last one, in the second stage and in the very last step."""
    wanted, before = hybrid(tmp_path / "student", teacher), signal.getsignal(number)
    on_step(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        loop.distill(wanted)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert [record["step"] for record in metrics(wanted.out)] == list(range(1, step + 1))
    states = sorted((folder.work_folder(wanted.out) / "checkpoints").iterdir())
    assert states[-1].name == f"step-{step:09d}"
    assert not wanted.out.exists()
    assert_same_run(loop.distill(wanted), undisturbed)


def test_text_is_shuffled_alike_after_a_stop(
    tmp_path: Path, on_step: Callable[[int, Callable[[], object]], None]
) -> None:
    """Plain text, every token of it learnt; texts longer than a row go on in the next."""
    path = tmp_path / "texts.jsonl"
    texts = [f"Text number {i} says little, but says it twice. " * 2 for i in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stages = stage(data={"kind": "text", "path": path}, length=64, tokens=6 * 128)
    undisturbed, out = (tmp_path / name for name in ("undisturbed", "stopped"))
    loop.distill(fresh(undisturbed, stages))
    on_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(fresh(out, stages))
    loop.distill(fresh(out, stages))
    assert metrics(out) == metrics(undisturbed)
    assert contents(out) == contents(undisturbed)
    assert load_tokenizer(out).tokenize("Text number") == ["Text", "Ġnumber"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, teacher: Path, undisturbed: Path
) -> None:
    """Killed in a step before any state, in writing a state, and after steps not yet in one."""
    wanted = hybrid(tmp_path / "student", teacher)
    run_until_killed(wanted, Moment(STEP, 2))
    assert [record["step"] for record in metrics(wanted.out)] == [1]
    run_until_killed(wanted, Moment(WRITTEN, 4))  # the second state, at the stage's end
    states = folder.work_folder(wanted.out) / "checkpoints"
    assert sorted(path.name for path in states.iterdir()) == [".partial", "step-000000002"]
    run_until_killed(wanted, Moment(STEP, 5))
    assert [record["step"] for record in metrics(wanted.out)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in states.iterdir()) == ["step-000000003", "step-000000005"]
    assert_same_run(loop.distill(wanted), undisturbed)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_run_keeps_the_layers_it_has_measured(
    tmp_path: Path, teacher: Path, important: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = loop.distill(hybrid(tmp_path / "undisturbed", teacher, student=important))
    wanted = hybrid(tmp_path / "student", teacher, student=important)
    run_until_killed(wanted, Moment(STEP, 4))
    monkeypatch.setattr(importance, "measure", lambda *_: pytest.fail("measured again"))
    assert_same_run(loop.distill(wanted), undisturbed)


def test_a_damaged_state_costs_only_its_steps(
    tmp_path: Path,
    teacher: Path,
    undisturbed: Path,
    on_step: Callable[[int, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = hybrid(tmp_path / "student", teacher)
    on_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    newest = folder.work_folder(wanted.out) / "checkpoints" / "step-000000006"
    (path,) = newest.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert_same_run(loop.distill(wanted), undisturbed)
    told = capsys.readouterr().err
    assert f"{newest}: damaged" in told
    assert "continuing at step 5" in told


def test_damaged_states_alone_do_not_start_a_run_over(
    tmp_path: Path, teacher: Path, on_step: Callable[[int, Callable[[], object]], None]
) -> None:
    wanted = hybrid(tmp_path / "student", teacher)
    on_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    states = folder.work_folder(wanted.out) / "checkpoints"
    for path in states.rglob("values.json"):
        path.unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints: no state is whole; .* force=true"):
        loop.distill(wanted)
    assert contents(tmp_path) == before


def test_a_folder_has_one_run_at_a_time(tmp_path: Path, teacher: Path) -> None:
    wanted = hybrid(tmp_path / "student", teacher)
    work = folder.work_folder(wanted.out)
    work.mkdir()
    with locked(work), pytest.raises(ValueError, match=r"student\.training is being written by"):
        loop.distill(wanted)
    assert [path.name for path in work.iterdir()] == [LOCK]


def test_a_fresh_tokenizer_is_made_once(
    tmp_path: Path,
    on_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As importance is measured once: the model that goes on must have the same tokens."""
    undisturbed = loop.distill(fresh(tmp_path / "undisturbed"))
    wanted = fresh(tmp_path / "stopped")
    on_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "train_tokenizer", lambda *_: pytest.fail("made again"))
        assert contents(loop.distill(wanted)) == contents(undisturbed)
    made = []
    monkeypatch.setattr(
        prepare, "train_tokenizer", lambda *asked: made.append(1) or train_tokenizer(*asked)
    )
    loop.distill(wanted.model_copy(update={"force": True}))
    assert made == [1]
    assert contents(wanted.out) == contents(undisturbed)


def test_what_a_run_is_is_written_once(
    tmp_path: Path, teacher: Path, on_step: Callable[[int, Callable[[], object]], None]
) -> None:
    """Cut off while it is written, it would be another run's."""
    wanted = hybrid(tmp_path / "student", teacher)
    on_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(wanted)
    path = folder.work_folder(wanted.out) / folder.RECIPE
    before = path.stat()
    loop.distill(wanted)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_machines_that_share_no_disk_are_told(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_open_work", lambda *_: None)
    with pytest.raises(ValueError, match="must be on a disk that all machines share"):
        loop.distill(hybrid(tmp_path / "student", teacher))


def test_checkpoints_and_device_may_change_on_the_way(
    tmp_path: Path,
    teacher: Path,
    undisturbed: Path,
    on_step: Callable[[int, Callable[[], object]], None],
) -> None:
    on_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        loop.distill(hybrid(tmp_path / "student", teacher))
    other = {"checkpoints": {"every": 1, "keep": 1}, "device": "cpu:0"}
    assert_same_run(loop.distill(hybrid(tmp_path / "student", teacher, **other)), undisturbed)
    assert len(list((tmp_path / "student.training" / "checkpoints").iterdir())) == 1


# ---------------------------------------------------------------- mistakes, before all else


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "missing"}, "missing: no such folder"),
        ({"student": {"start": "folder", "folder": "missing"}}, "missing: no such folder"),
        (
            {"student": {"start": "transplant", "keep_attention": [2]}},
            "no layer 2; layers are 0 to 1",
        ),
        (
            {"student": {"start": "transplant", "settings": {"state_size": 4}}},
            "state_size 4 cannot hold",
        ),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"stages": [stage("distill", freeze=["*.nose"])]}, r"freeze: '\*.nose' matches no"),
        (
            {"stages": [stage("distill"), stage("hidden_states", freeze=["model.embed_tokens.*"])]},
            r"freeze: 'model.embed_tokens.\*' matches no parameter this stage trains",
        ),
        (
            {"stages": [stage("mixing_matrices", freeze=["*.mamba.*", "*norm*"])]},
            "freeze: leaves this stage no parameter to train",
        ),
        (
            {"stages": [stage("distill", data={"kind": "text", "path": "no.jsonl"})]},
            "no.jsonl: no such file",
        ),
        (
            {"student": {"start": "transplant", "keep_attention": [0, 1]}},
            "no layer is replaced",
        ),
    ],
)
def test_mistakes_show_before_anything_is_written(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Values,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        loop.distill(hybrid(Path("student"), teacher, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"mixer": "mamba1", "settings": {"groups": 2}}, "mamba1 takes heads, head_dim and groups"),
        ({"mixer": "mamba1", "settings": {"state_size": 5}}, "no multiple of the state size 5"),
        (
            {"mixer": "discrete_mamba2", "settings": {"heads": 4, "head_dim": 8, "groups": 4}},
            "a start from the attention needs its 2 heads of 16 and a group each",
        ),
    ],
    ids=str,
)
def test_mixers_that_cannot_be_are_refused(
    tmp_path: Path, teacher: Path, student: Values, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loop.distill(hybrid(tmp_path / "out", teacher, student=STUDENT | student))
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_compared_head_with_head(tmp_path: Path, teacher: Path) -> None:
    """Mixers with more heads than the attention had: hidden states can still be matched."""
    student = STUDENT | {
        "mixer": "discrete_mamba2",
        "initial": "identity",
        "settings": {"heads": 4, "head_dim": 8},
    }
    wanted = hybrid(tmp_path / "out", teacher, stage("mixing_matrices"), student=student)
    with pytest.raises(ValueError, match="mixers have 4 heads and the teacher's attention has 2"):
        loop.distill(wanted)
    assert list(tmp_path.iterdir()) == []
    loop.distill(hybrid(wanted.out, teacher, stage("hidden_states", 1), student=student))


def test_matrices_of_mamba1_are_refused_before_a_run(tmp_path: Path, teacher: Path) -> None:
    """Of a student from a folder, which a recipe alone does not tell."""
    tokenizer, half = load_tokenizer(teacher), tmp_path / "half"
    weights.save(transplant(retort.load(teacher), [LINEAR, ATTENTION], "mamba1"), half, tokenizer)
    student = {"start": "folder", "folder": half}
    wanted = hybrid(tmp_path / "out", teacher, stage("mixing_matrices"), student=student)
    with pytest.raises(ValueError, match="mamba1 has no mixing matrices to match; leave that"):
        loop.distill(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_folder_with_something_else_is_refused_at_the_start(
    tmp_path: Path, teacher: Path
) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        loop.distill(hybrid(tmp_path / "student", teacher))
    assert contents(tmp_path) == {"student/notes.txt": b"mine"}


def test_a_student_must_share_its_teachers_tokenizer(tmp_path: Path, teacher: Path) -> None:
    student = tmp_path / "other"
    weights.save(retort.load(teacher), student, train_tokenizer(["nothing of the kind"], 290))
    wanted = hybrid(tmp_path / "out", teacher, student={"start": "folder", "folder": student})
    with pytest.raises(ValueError, match="other: its tokenizer differs from the teacher's"):
        loop.distill(wanted)


def with_logits(teacher: Path, out: Path, count: int) -> Path:
    """The teacher with a head (and an embedding) of so many rows."""
    before = retort.load(teacher)
    wider = Decoder(replace(before.config, vocab_size=count))
    wider.reset_parameters()
    rows = min(count, before.config.vocab_size)
    tensors = {name: tensor[:rows] for name, tensor in before.state_dict().items()
               if "embed_tokens" in name or "lm_head" in name}  # fmt: skip
    mine = dict(wider.named_parameters())
    with torch.no_grad():
        for name, tensor in before.named_parameters():
            mine[name][: len(tensors.get(name, tensor))] = tensors.get(name, tensor)
    weights.save(wider, out, load_tokenizer(teacher))
    return out


def test_heads_of_one_tokenizer_may_be_padded_differently(tmp_path: Path, teacher: Path) -> None:
    wider = with_logits(teacher, tmp_path / "wider", 320)
    out = loop.distill(hybrid(tmp_path / "narrow", wider, stage("distill", 2)))
    assert retort.load(out).config.vocab_size == 320
    student = {"start": "folder", "folder": teacher}
    out = loop.distill(hybrid(tmp_path / "out", wider, stage("distill", 2), student=student))
    assert retort.load(out).config.vocab_size == 300
    same = hybrid(tmp_path / "same", teacher, stage("distill", 2), student=student)
    assert metrics(out) == metrics(loop.distill(same))


def test_heads_must_know_all_tokens(tmp_path: Path, teacher: Path) -> None:
    narrow = with_logits(teacher, tmp_path / "narrow", 290)
    student = {"start": "folder", "folder": teacher}
    with pytest.raises(ValueError, match="teacher: its head has 290 logits for the 300 tokens"):
        loop.distill(hybrid(tmp_path / "out", narrow, stage("distill"), student=student))


def test_a_teacher_must_read_what_a_student_writes(tmp_path: Path, teacher: Path) -> None:
    wider = with_logits(teacher, tmp_path / "wider", 320)
    objective = {"kind": "distill", "on_policy": {"share": 0.5}}
    wanted = hybrid(tmp_path / "out", teacher, stage("distill", objective=objective),
                    student={"start": "folder", "folder": wider})  # fmt: skip
    with pytest.raises(ValueError, match="vocab_size is 320, and the teacher's 300: on_policy"):
        loop.distill(wanted)


def test_layer_wise_stages_need_layers_of_the_same_shape(
    tmp_path: Path, teacher: Path, make_decoder: MakeDecoder
) -> None:
    tokenizer = load_tokenizer(teacher)
    weights.save(make_decoder("mam", vocab_size=300), tmp_path / "other", tokenizer)
    student = {"start": "folder", "folder": tmp_path / "other"}
    wanted = hybrid(tmp_path / "out", teacher, stage("hidden_states"), student=student)
    with pytest.raises(ValueError, match="layers is 3, but the teacher's is 2"):
        loop.distill(wanted)
