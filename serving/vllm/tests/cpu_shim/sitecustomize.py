"""Runs Triton's kernels interpreted, on a machine without a GPU: vLLM's second model runner needs a Triton backend."""

import os

if os.environ.get("SDLM_VLLM_CPU"):
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class _Backend:
        compiler, driver = None, _Driver

    triton.backends.backends["cpu"] = _Backend
