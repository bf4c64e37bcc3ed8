"""Temperature, top-k, top-p and min-p with one value per row, in the order and by the definitions of transformers.

vLLM's own apply min-p before top-p; a seed gives the text of `generate` only with the same rules. V: vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def warp_rows(logits: Tensor, states: Any, slot: Tensor, on_host: np.ndarray) -> Tensor:
    """Logits (N, V) that tokens are drawn from; excluded tokens get -inf. Rows with temperature 0 are undefined.

    Args:
        logits: float32 (N, V).
        states: vLLM's SamplingStates: the parameters of each request slot.
        slot: int64 (N,), request slot of each row.
        on_host: the slots of all requests of the step, on the host: what none of them uses is left out.
    """
    temperature = states.temperature.gpu[slot]
    logits = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    if (states.top_k.np[on_host] < states.vocab_size).any():
        kth = logits.sort(-1, descending=True).values.gather(1, states.top_k.gpu[slot].long()[:, None] - 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if (states.top_p.np[on_host] < 1).any():
        logits = _top_p(logits, states.top_p.gpu[slot])
    if states.min_p.np[on_host].any():
        probability = logits.softmax(-1)
        least = states.min_p.gpu[slot][:, None] * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(probability < least, -torch.inf)
    return logits


def _top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """The fewest tokens whose probabilities add up to `top_p` (N,), at least one."""
    ordered, index = logits.sort(-1)
    out = ordered.softmax(-1).cumsum(-1) <= (1 - top_p)[:, None]
    out[:, -1] = False
    # a row with top_p = 1 keeps all: its first sums may round to 0
    out &= (top_p < 1)[:, None]
    return logits.masked_fill(torch.zeros_like(out).scatter(1, index, out), -torch.inf)
