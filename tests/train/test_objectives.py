"""The four objectives against plain loops, and whom they teach."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from retort.data.packing import Batch
from retort.model.config import ATTENTION, LINEAR
from retort.model.decoder import Decoder
from retort.model.transplant import transplant
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Supervised
from retort.train.objectives import count, evaluate, replaced_layers, teach, trainable

MakeDecoder = Callable[..., Decoder]

MATRICES = MixingMatrices(kind="mixing_matrices")
BLOCKS = HiddenStates(kind="hidden_states")
MIXERS = HiddenStates(kind="hidden_states", compare="mixer")
REVERSE = Distill(kind="distill", direction="reverse")
BOTH = Distill(kind="distill", ce_weight=0.25)
SUPERVISED = Supervised(kind="supervised")
OBJECTIVES = [MATRICES, BLOCKS, MIXERS, REVERSE, BOTH, SUPERVISED]
MIXER_KINDS = ["mamba2", "discrete_mamba2", "mamba1"]
NAMES = ["matrices", "blocks", "mixers", "reverse", "forward+ce", "supervised"]


@pytest.fixture
def teacher(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder("aaa")


@pytest.fixture
def student(teacher: Decoder) -> Decoder:
    """Layers 0 and 2 replaced; every weight may get a gradient."""
    return transplant(teacher, [LINEAR, ATTENTION, LINEAR], chunk_size=4)


def batch(documents: list[list[int]], length: int = 12) -> Batch:
    """Rows of documents of the given lengths; about half of their tokens are to be learnt."""
    ids_BT = torch.randint(61, (len(documents), length))
    document_BT = torch.full((len(documents), length), -1)
    for row, lengths in enumerate(documents):
        numbers = torch.repeat_interleave(torch.tensor(lengths))
        document_BT[row, : len(numbers)] = numbers
    followed = document_BT[:, :-1] == document_BT[:, 1:]
    inside_BT = torch.nn.functional.pad(followed, (0, 1)) & (document_BT >= 0)
    return Batch(ids_BT, document_BT, inside_BT & (torch.rand(len(documents), length) < 0.5))


PACKED = [[5, 7], [3, 1, 6], [12]]


def documents_of(packed: Batch) -> list[Tensor]:
    """Each document alone, ids_1T."""
    rows = zip(packed.ids_BT, packed.document_BT, strict=True)
    return [ids[n == i][None] for ids, n in rows for i in range(int(n.max()) + 1)]


# ---------------------------------------------------------------- what is done beforehand


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_a_teacher_may_have_read_a_batch_before(
    student: Decoder, teacher: Decoder, objective: Objective
) -> None:
    """The loss is the same, in micro-batches too, and the teacher is not asked again."""
    packed = batch(PACKED)
    wanted = evaluate(student, teacher, packed, objective).sum
    ready = teach(teacher, packed, objective)
    silent = deepcopy(teacher)
    silent.model.embed_tokens.weight.data.zero_()  # the head is another tensor
    found = evaluate(student, silent, ready, objective).sum
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    parts = [evaluate(student, silent, part, objective).sum for part in ready.split(2)]
    torch.testing.assert_close(torch.stack(parts).sum(), wanted)
    assert not any(tensor.requires_grad for tensor in ready.taught)


# ---------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize("objective", [MATRICES, BLOCKS, MIXERS, REVERSE], ids=NAMES[:4])
def test_a_copy_of_the_teacher_has_no_loss(make_decoder: MakeDecoder, objective: Objective) -> None:
    teacher = make_decoder("mam")
    loss = evaluate(deepcopy(teacher), teacher, batch(PACKED), objective)
    assert abs(loss.sum.item()) < 1e-4
    assert count(batch(PACKED), objective) > 0


def padded(decoder: Decoder, rows: int) -> Decoder:
    """The same decoder with logits more than there are tokens, which get what is best of all."""
    config = replace(decoder.config, vocab_size=decoder.config.vocab_size + rows)
    wider, tensors = Decoder(config), dict(decoder.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], 9 * torch.randn(rows, config.hidden_size)])
    wider.load_state_dict(tensors)
    return wider


@pytest.mark.parametrize("objective", [REVERSE, BOTH], ids=["reverse", "forward+ce"])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_padding_of_a_head_is_not_compared(
    student: Decoder, teacher: Decoder, objective: Objective, wide: str
) -> None:
    """Models of several sizes with one tokenizer differ in nothing but that."""
    packed = batch(PACKED)
    wanted = evaluate(student.requires_grad_(), teacher, packed, objective)
    wanted.sum.backward()
    ours = padded(student, 7) if wide == "student" else deepcopy(student)
    ours.zero_grad()
    theirs = padded(teacher, 7) if wide == "teacher" else teacher
    found = evaluate(ours, theirs, packed, objective)
    found.sum.backward()
    torch.testing.assert_close(found.parts, wanted.parts)
    theirs_by_name = dict(student.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs_by_name[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        torch.testing.assert_close(parameter.grad[: len(gradient)], gradient)
        assert not parameter.grad[len(gradient) :].any()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_copy_of_the_teacher_has_no_gradient(make_decoder: MakeDecoder, direction: str) -> None:
    teacher = make_decoder("am")
    student = deepcopy(teacher).requires_grad_()
    objective = Distill.model_validate({"kind": "distill", "direction": direction})
    evaluate(student, teacher, batch(PACKED), objective).sum.backward()
    assert all(p.grad is not None and p.grad.abs().max() < 1e-4 for p in student.parameters())


# ---------------------------------------------------------------- plain loops


@pytest.mark.parametrize("squared", [False, True])
def test_mixing_matrices_layer_by_layer(teacher: Decoder, student: Decoder, squared: bool) -> None:
    """Whole rows of one document each: for every row, layer and head one distance."""
    rows = batch([[12], [12]])
    objective = MixingMatrices(kind="mixing_matrices", squared=squared)
    loss = evaluate(student, teacher, rows, objective)
    parts = {0: 0.0, 2: 0.0}
    for ids_1T in documents_of(rows):
        context = teacher.context(ids_1T, None, None)
        h_BTD = teacher.model.embed_tokens(ids_1T)
        for i in range(3):
            if i in parts:
                wanted = teacher.blocks[i].mixing_matrix(h_BTD, context)
                found = student.blocks[i].mixing_matrix(h_BTD, context)
                for head in range(4):
                    squares = (wanted - found)[0, head].square().sum().item()
                    parts[i] += (squares if squared else squares**0.5) / 4
            h_BTD = teacher.blocks[i](h_BTD, context)
    assert count(rows, objective) == 2
    assert {name: part.item() for name, part in loss.parts.items()} == pytest.approx(
        {f"layer_{i}": value for i, value in parts.items()}, rel=1e-4
    )
    assert loss.sum.item() == pytest.approx(sum(parts.values()), rel=1e-4)


def test_padding_does_not_count_in_mixing_matrices(teacher: Decoder, student: Decoder) -> None:
    """Attention among padding is nothing to imitate."""
    short = batch([[8]], length=8)
    padded = Batch(
        *(
            torch.nn.functional.pad(x, (0, 4), value=v)
            for x, v in zip(short[:3], (0, -1, 0), strict=True)
        )
    )
    alone, behind = (evaluate(student, teacher, rows, MATRICES) for rows in (short, padded))
    assert behind.sum.item() == pytest.approx(alone.sum.item(), rel=1e-4)


@pytest.mark.parametrize("objective", [BLOCKS, MIXERS], ids=["blocks", "mixers"])
def test_hidden_states_document_by_document(
    teacher: Decoder, student: Decoder, objective: HiddenStates
) -> None:
    packed = batch(PACKED)
    loss = evaluate(student, teacher, packed, objective)
    wanted, tokens = 0.0, 0
    for ids_1T in documents_of(packed):
        context = teacher.context(ids_1T, None, None)
        states = teacher.hidden_states(ids_1T)
        tokens += ids_1T.shape[1]
        for i in (0, 2):
            if objective.compare == "block":
                difference = student.blocks[i](states[i], context) - states[i + 1]
            else:
                ours, theirs = (d.blocks[i].mix(states[i], context) for d in (student, teacher))
                difference = ours - theirs
            wanted += difference.norm(dim=-1).sum().item()
    assert count(packed, objective) == tokens == 34
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-4)


def test_divergence_of_learnt_tokens_alone(teacher: Decoder, student: Decoder) -> None:
    packed = batch(PACKED)
    loss = evaluate(student, teacher, packed, REVERSE)
    ours, theirs = (
        d(packed.ids_BT, document_BT=packed.document_BT).log_softmax(-1) for d in (student, teacher)
    )
    kl_BT = (ours.exp() * (ours - theirs)).sum(-1)
    assert loss.sum.item() == pytest.approx(kl_BT[packed.learn_BT].sum().item(), rel=1e-4)
    assert count(packed, REVERSE) == int(packed.learn_BT.sum())


def test_divergence_is_blind_to_tokens_that_are_not_learnt(
    teacher: Decoder, student: Decoder
) -> None:
    """What follows the last learnt token of a row cannot matter, nor can another document."""
    packed = batch([[6, 6]])
    learn_BT = torch.zeros(1, 12, dtype=torch.bool)
    learn_BT[0, 7:9] = True
    changed_ids = packed.ids_BT.clone()
    changed_ids[0, [0, 1, 4, 10, 11]] = 60 - changed_ids[0, [0, 1, 4, 10, 11]]
    before = evaluate(student, teacher, packed._replace(learn_BT=learn_BT), REVERSE)
    changed = packed._replace(ids_BT=changed_ids, learn_BT=learn_BT)
    after = evaluate(student, teacher, changed, REVERSE)
    assert after.sum.item() == pytest.approx(before.sum.item(), rel=1e-4)
    assert count(changed, REVERSE) == 2


def test_supervised_is_the_cross_entropy_of_what_follows(student: Decoder) -> None:
    packed = batch(PACKED)
    loss = evaluate(student, None, packed, SUPERVISED)
    logits_BTV = student(packed.ids_BT, document_BT=packed.document_BT)
    wanted = 0.0
    for row, t in packed.learn_BT.nonzero().tolist():
        wanted += cross_entropy(logits_BTV[row, t], packed.ids_BT[row, t + 1]).item()
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-4)
    assert count(packed, SUPERVISED) == int(packed.learn_BT.sum())


def test_cross_entropy_is_mixed_in_by_its_weight(teacher: Decoder, student: Decoder) -> None:
    packed = batch(PACKED)
    loss = evaluate(student, teacher, packed, BOTH)
    kl = evaluate(student, teacher, packed, Distill(kind="distill")).sum
    ce = evaluate(student, None, packed, SUPERVISED).sum
    assert loss.sum.item() == pytest.approx((0.75 * kl + 0.25 * ce).item(), rel=1e-5)
    assert loss.parts["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.parts["ce"].item() == pytest.approx(ce.item(), rel=1e-5)


def test_nothing_learnt_in_a_micro_batch(teacher: Decoder, student: Decoder) -> None:
    packed = batch(PACKED)
    silent = packed._replace(learn_BT=torch.zeros_like(packed.learn_BT))
    for objective in (REVERSE, BOTH, SUPERVISED):
        loss = evaluate(student.requires_grad_(), teacher, silent, objective)
        loss.sum.backward()
        assert (loss.sum.item(), count(silent, objective)) == (0, 0)


# ---------------------------------------------------------------- who learns


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_gradients_are_those_of_trainable_parameters(
    teacher: Decoder, student: Decoder, objective: Objective
) -> None:
    names = trainable(student, objective)
    evaluate(student.requires_grad_(), teacher, batch(PACKED), objective).sum.backward()
    taught = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught <= names
    if objective is MATRICES:
        # Gate, norm and output projection come after the matrix: nothing teaches them yet.
        parts = ("mamba.norm.weight", "mamba.out_proj.weight")
        names = {name for name in names if not name.endswith(parts)}
    assert taught == names
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", MIXER_KINDS)
def test_trainable_names(teacher: Decoder, kind: str) -> None:
    student = transplant(teacher, [LINEAR, ATTENTION, LINEAR], kind)
    every = {name for name, _ in student.named_parameters()}
    replaced = {name for name in every if name.startswith(("model.layers.0.", "model.layers.2."))}
    assert replaced_layers(student) == [0, 2]
    assert trainable(student, SUPERVISED) == trainable(student, REVERSE) == every
    assert trainable(student, BLOCKS) == replaced
    mixers = {name for name in replaced if ".mlp." not in name and ".post_" not in name}
    assert trainable(student, MATRICES) == trainable(student, MIXERS) == mixers
    own = {name for name, _ in student.blocks[0].mixer.named_parameters()}
    assert {"in_proj.weight", "conv1d.bias", "D", "out_proj.weight"} <= own
    names = {f"mamba.{name}" for name in own} | {"input_layernorm.weight"}
    assert mixers == {f"model.layers.{i}.{name}" for i in (0, 2) for name in names}


# ---------------------------------------------------------------- every mixer learns


@pytest.mark.parametrize("kind", MIXER_KINDS)
@pytest.mark.parametrize("objective", [MATRICES, BLOCKS, MIXERS, REVERSE], ids=NAMES[:4])
def test_the_loss_goes_down(teacher: Decoder, kind: str, objective: Objective) -> None:
    student = transplant(teacher, [LINEAR, ATTENTION, LINEAR], kind, chunk_size=4)
    if kind == "mamba1" and objective is MATRICES:
        with pytest.raises(ValueError, match="mamba1 mixes the tokens of each channel"):
            evaluate(student, teacher, batch(PACKED), objective)
        return
    first, *_, last = losses(student, teacher, objective)
    assert last < 0.85 * first


def losses(student: Decoder, teacher: Decoder, objective: Objective) -> list[float]:
    """Of a few steps on the same rows; only what the objective is said to train moves."""
    names, rows = trainable(student, objective), batch(PACKED)
    learning = [p for name, p in student.named_parameters() if name in names]
    optimizer, found = torch.optim.Adam(learning, lr=5e-3), []
    for _ in range(20):
        loss = evaluate(student, teacher, rows, objective)
        loss.sum.backward()
        optimizer.step()
        student.zero_grad()
        found.append(loss.sum.item())
    return found


def test_a_start_as_the_identity_learns(teacher: Decoder) -> None:
    """Hidden states of a student whose mixers have other heads than the teacher's attention."""
    kinds = [LINEAR, ATTENTION, LINEAR]
    settings = {"start": "identity", "heads": 3, "head_dim": 10, "state_size": 5}
    student = transplant(teacher, kinds, "discrete_mamba2", **settings)
    first, *_, last = losses(student, teacher, BLOCKS)
    assert last < 0.85 * first
