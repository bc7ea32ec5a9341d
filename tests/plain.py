"""What CPUs have kernels for, in plain torch: memory is planned for that."""

import pytest

from retort.model import context
from retort.ops import conv, kernels, norms, rotary, ssd


def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels from here on to the test's end."""
    monkeypatch.setattr(conv, "has_kernel", lambda x: False)
    for module in (conv, norms, rotary):
        monkeypatch.setattr(module, "in_training", lambda x: False)
    monkeypatch.setattr(kernels, "open_scan", lambda device, dtype: ssd.scan_chunked)
    monkeypatch.setattr(context, "runs", lambda document_BT: None)
