"""Dtypes of weights and their names in our configs, in config.json, in safetensors and in torch's pickles."""

import torch

_TABLE = (
    # torch          configs, CLI  config.json  safetensors  storage class in a torch.save archive
    (torch.bfloat16, "bf16", "bfloat16", "BF16", "BFloat16Storage"),
    (torch.float16, "fp16", "float16", "F16", "HalfStorage"),
    (torch.float32, "fp32", "float32", "F32", "FloatStorage"),
)
PRECISIONS: dict[str, torch.dtype] = {row[1]: row[0] for row in _TABLE}
"""By the name used in configs and on command lines: bf16, fp16, fp32."""
HF_DTYPES: dict[str, torch.dtype] = {row[2]: row[0] for row in _TABLE}
"""By the name config.json uses: bfloat16, float16, float32."""
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {row[3]: row[0] for row in _TABLE}
STORAGE_DTYPES: dict[str, torch.dtype] = {row[4]: row[0] for row in _TABLE}


def precision_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return next(row[1] for row in _TABLE if row[0] is dtype)


def hf_name(dtype: torch.dtype) -> str:
    """bfloat16, float16 or float32."""
    return next(row[2] for row in _TABLE if row[0] is dtype)


def safetensors_name(dtype: torch.dtype) -> str:
    """BF16, F16 or F32."""
    return next(row[3] for row in _TABLE if row[0] is dtype)
