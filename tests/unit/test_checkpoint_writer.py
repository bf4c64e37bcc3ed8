"""Host memory of the checkpoint writer: exact size, released with its registration."""

import gc
from types import SimpleNamespace

import pytest
import torch

from sdlm_megatron.checkpoint.async_writer import pinned


def test_pinned_memory_has_the_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of torch's binding of the CUDA runtime: HostRegister(address, bytes, flags), HostUnregister(address)."""
    calls: list[tuple] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: (
            calls.append(("register", pointer, size, flags)) or len(calls) - 1
        ),
        cudaHostUnregister=lambda pointer: calls.append(("unregister", pointer)),
    )

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError("out of memory (2)")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    memory = pinned(4_194_305)  # one byte above a power of two
    address = memory.data_ptr()
    assert memory.untyped_storage().nbytes() == memory.numel() == 4_194_305 and memory.dtype is torch.uint8
    assert calls == [("register", address, 4_194_305, 0)]
    del memory
    gc.collect()
    assert calls[1:] == [("unregister", address)]
    with pytest.raises(RuntimeError, match="out of memory"):
        pinned(64)
    assert [call[0] for call in calls] == ["register", "unregister", "register"]


def test_torch_has_these_functions() -> None:
    for name in ("cudart", "check_error"):
        assert callable(getattr(torch.cuda, name))
