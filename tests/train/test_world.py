"""The processes of a run, told by one among them."""

import pytest
import torch.distributed as dist

from retort import cli
from retort.recipe import Parallel
from retort.train.world import KnownToAll, OfOneProcess, World, open_world, own_device

ALL = Parallel()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As torchrun describes the third of eight processes of a machine."""
    told = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "8"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_each_process_has_a_gpu_of_its_own(launched: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda:2"
    assert own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device: cuda:1 is one GPU for several processes"):
        own_device("cuda:1")
    launched.setenv("LOCAL_WORLD_SIZE", "1")
    assert own_device("cuda:1") == "cuda:1"


def test_a_gpu_without_a_number_is_the_first() -> None:
    """A device without a number cannot be made the current one."""
    assert own_device("cuda") == "cuda:0"
    assert own_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(("rank", "kind"), [("0", ValueError), ("5", OfOneProcess)])
def test_a_gpu_that_is_not_there_is_told_by_whom_it_concerns(
    launched: pytest.MonkeyPatch, rank: str, kind: type[ValueError]
) -> None:
    launched.setenv("RANK", rank)
    launched.setattr("platform.node", lambda: "gpu-3")
    with pytest.raises(ValueError, match="cannot be used here") as found, open_world("meta:x", ALL):
        pass
    assert found.type is kind
    assert ("process 5 on gpu-3: " in str(found.value)) == (rank == "5")


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_what_all_know_of_one_process_tells(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str, told: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    for error, heard in [(KnownToAll("a row"), told), (OfOneProcess("process 1: a GPU"), True)]:

        def fail(error: ValueError = error) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert (f"error: {error}" in capfd.readouterr().err) == heard


def test_what_one_process_finds_all_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("mine")

    assert world.agree(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        world.agree(fail)
    monkeypatch.setattr(World, "gather", lambda self, problem: [problem, "row 3 is bad"])
    with pytest.raises(ValueError, match="row 3 is bad"):
        world.agree(lambda: 3)


@pytest.mark.parametrize(("error", "leaves"), [(RuntimeError, False), (SystemExit, True)])
def test_one_of_several_that_fails_waits_for_no_other(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], leaves: bool
) -> None:
    left = []

    def fail(patch: pytest.MonkeyPatch) -> None:
        with open_world("cpu", Parallel()):
            patch.setattr(dist, "get_world_size", lambda: 2)
            patch.setattr(dist, "destroy_process_group", lambda: left.append(True))
            raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        fail(patch)
    dist.destroy_process_group()
    assert bool(left) == leaves
