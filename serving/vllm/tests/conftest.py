"""Settings of vLLM for a small machine without a GPU, for this process and the servers it starts."""

import os
from pathlib import Path

SHIM = str(Path(__file__).parent / "cpu_shim")
os.environ |= {
    "SDLM_VLLM_CPU": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "PYTHONPATH": os.pathsep.join([SHIM, *filter(None, [os.environ.get("PYTHONPATH")])]),
}
