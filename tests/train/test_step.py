"""One step: micro-batches add up, gradients are clipped, and bad steps are passed over."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor

from retort import recipe as recipes
from retort.data.packing import Batch
from retort.model.config import ATTENTION, LINEAR
from retort.model.decoder import Decoder
from retort.model.transplant import transplant
from retort.recipe import Guard, Parallel, Stage
from retort.train.objectives import Loss
from retort.train.parallel import Trained, note_trained, spread_student, spread_teacher
from retort.train.state import Progress, State
from retort.train.step import Stepper
from retort.train.world import World, open_world

MakeDecoder = Callable[..., Decoder]

GUARD = Guard()


def stage(kind: str = "supervised", **changes: Any) -> Stage:
    values = {
        "name": kind,
        "objective": {"kind": kind},
        "data": {"kind": "worked", "problems": {"kind": "arithmetic"}},
        "tokens": 8 * 12 * 100,
        "rows": 8,
        "length": 12,
        "optim": {"lr": 1e-2, "warmup": 0.0, "decay": 0.0},
    }
    return recipes.parse(Stage, values | changes)


def stepper(
    student: Decoder, teacher: Decoder | None, stage: Stage, world: World, guard: Guard = GUARD
) -> Stepper:
    trained = spread_student(student.train(), world, Parallel())
    state = State(student, Progress())
    state.begin(stage)
    return Stepper(trained, teacher, state, stage, guard, world)


def uneven_batch() -> Batch:
    """Eight rows with between none and eleven learnt tokens, and padding."""
    document_BT = torch.zeros(8, 12, dtype=torch.long)
    learn_BT = torch.zeros(8, 12, dtype=torch.bool)
    for row, learnt in enumerate([0, 0, 1, 11, 3, 0, 9, 2]):
        learn_BT[row, :learnt] = True
        document_BT[row, 12 - row :] = -1
    ids_BT = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT, document_BT, learn_BT & (document_BT >= 0))


# ---------------------------------------------------------------- accumulation


def gradients(
    student: Decoder, teacher: Decoder, kind: str, micro_rows: int, world: World
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of one step, and the means that it records."""
    taken = stage(kind, micro_rows=micro_rows, optim={"lr": 1.0, "clip": 1e9})
    made = stepper(student, teacher, taken, world)
    means, _ = made._gradients(uneven_batch())
    named = made.state.named
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found, means


@pytest.mark.parametrize("kind", ["mixing_matrices", "hidden_states", "distill", "supervised"])
def test_micro_batches_add_up(make_decoder: MakeDecoder, world: World, kind: str) -> None:
    """With masks as uneven as can be: a mean of means would be far off."""
    teacher = make_decoder("aa")
    student = transplant(teacher, [LINEAR, ATTENTION])
    wanted, wanted_means = gradients(student, teacher, kind, 8, world)
    for micro_rows in (4, 2, 1):
        found, means = gradients(student, teacher, kind, micro_rows, world)
        assert means == pytest.approx(wanted_means, rel=1e-6)
        assert found.keys() == wanted.keys()
        error = nn.utils.get_total_norm([found[name] - wanted[name] for name in wanted])
        assert error <= 1e-6 * nn.utils.get_total_norm(wanted.values())


def test_gradients_are_clipped(make_decoder: MakeDecoder, world: World) -> None:
    student = make_decoder("a")
    made = stepper(student, None, stage(optim={"lr": 1.0, "clip": 1e-3}), world)
    _, norm = made._gradients(uneven_batch())
    assert norm > 0.1  # as it was before
    clipped = [p.grad for p in student.parameters() if p.grad is not None]
    assert nn.utils.get_total_norm(clipped).item() == pytest.approx(1e-3, rel=1e-3)


def test_a_batch_with_nothing_to_learn_moves_nothing(
    make_decoder: MakeDecoder, world: World
) -> None:
    student = make_decoder("m")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    batch = uneven_batch()
    empty = batch._replace(learn_BT=torch.zeros_like(batch.learn_BT))
    optim = {"lr": 1e-2, "weight_decay": 0.0}
    record = stepper(student, None, stage(optim=optim), world).take(empty)
    assert (record["loss"], record["gradient_norm"]) == (0, 0)
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_draws_no_random_numbers(make_decoder: MakeDecoder, world: World) -> None:
    made = stepper(make_decoder("am"), None, stage(), world)
    before = torch.get_rng_state()
    made.take(uneven_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_waiting_counts_towards_the_pace(make_decoder: MakeDecoder, world: World) -> None:
    batch = uneven_batch()
    found = stepper(make_decoder("a"), None, stage(), world).take(batch, waited=1000.0)
    assert found["waited"] == 1000
    assert 0 < found["tokens_per_second"] < batch.ids_BT.numel() / 1000


# ---------------------------------------------------------------- steps that go wrong


def spoil(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiplies the loss of some steps, and with it every gradient."""
    forward, calls = Trained.forward, iter(range(1, 1000))

    def spoilt(*arguments: Any) -> Loss:
        loss = forward(*arguments)
        factor = factors.get(next(calls), 1.0)
        return Loss(loss.sum * factor, {k: v * factor for k, v in loss.parts.items()})

    monkeypatch.setattr(Trained, "forward", spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_passed_over(
    make_decoder: MakeDecoder, world: World, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    student = make_decoder("am")
    made = stepper(student, None, stage(), world)
    spoil(monkeypatch, {2: value, 3: value, 5: value})
    weights, records = [], []
    for _ in range(5):
        records.append(made.take(uneven_batch()))
        weights.append(student.lm_head.weight.clone())
    assert [record["bad_steps"] for record in records] == [0, 1, 2, 0, 1]
    assert [record["skipped"] for record in records] == [0, 1, 1, 0, 1]
    assert (made.state.progress.skipped, made.state.progress.updates) == (3, 2)
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [False, False, True, False]
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())


def test_too_many_bad_steps_end_the_run(
    make_decoder: MakeDecoder, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stepper(make_decoder("a"), None, stage(), world, Guard(bad_steps=2))
    spoil(monkeypatch, dict.fromkeys(range(1, 9), float("nan")))
    made.take(uneven_batch())
    with pytest.raises(ValueError, match=r"stage supervised: 2 steps in a row .* optim.lr"):
        made.take(uneven_batch())


def test_a_spike_is_told_and_counted(
    make_decoder: MakeDecoder,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = stage(optim={"lr": 1e-5})
    made = stepper(make_decoder("a"), None, slow, world, Guard(window=8))
    spoil(monkeypatch, {12: 50.0})
    spikes = [made.take(uneven_batch())["spike"] for _ in range(14)]
    assert [number for number, spike in enumerate(spikes, start=1) if spike] == [12]
    assert made.state.progress.spikes == 1
    assert "step 12 of supervised: the loss jumped to" in capsys.readouterr().err


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["mixing_matrices", "hidden_states", "distill"])
def test_blocks_are_freed_one_after_the_other(
    make_decoder: MakeDecoder, kind: str, recompute: str
) -> None:
    """Sharded, no more of them are whole in the backward pass than the plan counts with."""
    settings = recipes.parse(Parallel, {"dtype": "bfloat16", "recompute": recompute})
    whole: list[int] = []
    with open_world("cpu", settings) as world:
        teacher = make_decoder("aaaaaa")
        student = transplant(teacher, [LINEAR] * 6, "mamba2", chunk_size=8).train()
        projections = [block.mamba.in_proj for block in student.blocks]

        def look(gradient: Tensor) -> None:
            whole.append(sum(not isinstance(each.weight, DTensor) for each in projections))

        def watch(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            if made.requires_grad:
                made.register_hook(look)

        for each in projections:
            each.register_forward_hook(watch)
        trained = spread_student(student, world, settings)
        state = State(student, Progress())
        state.begin(stage(kind))
        note_trained(trained)
        spread = spread_teacher(teacher, world, settings)
        Stepper(trained, spread, state, stage(kind), GUARD, world).take(uneven_batch())
    assert len(whole) >= len(projections)
    assert max(whole) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler trips over its own
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_blocks_are_compiled(
    make_decoder: MakeDecoder, world: World, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """Whole: a compiler leaves a block that it cannot take without a word."""
    counter = CompileCounter()
    compiler = partial(torch.compile, backend=counter)
    monkeypatch.setattr(torch, "compile", compiler)
    settings = recipes.parse(Parallel, {"compile": True, "recompute": recompute})
    trained = spread_student(make_decoder("mmam").train(), world, settings)
    state = State(trained.student, Progress())
    state.begin(stage())
    Stepper(trained, None, state, stage(), GUARD, world).take(uneven_batch())
    assert counter.frame_count >= 2
