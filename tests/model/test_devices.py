"""Devices by name."""

import pytest
import torch

from retort.model.devices import fast_dtype, open_device


def test_the_cpu_is_always_there() -> None:
    assert open_device("cpu") == torch.device("cpu")
    assert fast_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", ["toaster", "cuda:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used here: ") as caught:
        open_device(name)
    assert "\n" not in str(caught.value)
