"""Forward pass of decoding through a transformers model, with a cache whose columns are token positions.

The rows of a batch keep different numbers of tokens per pass. Each row writes at its own columns: a clean token at
its position, the windows behind the row's last token, where the next pass overwrites them. So the cache is never
padded, cut or moved, and with `fixed_shape` no shape changes between passes.

Example, n = 3, a row of 5 tokens of which 3 are cached; the pass feeds x[3], x[4] and the window of anchor 4:

    input        x[3]  x[4] | x[4]   M    M
    position       3     4  |   4    5    6
    cache column   3     4  |   5    6    7     the window sees columns 0..3 (not 4: slot 0 stands for x[4]) and 5..7

With `clean_anchors` (lossless) slot 0 is not fed again: the window is [M M] at the columns 5, 6 and sees column 4 too.

The exporter copies this file into the model folder unchanged. Shapes: B rows, C new clean tokens (of the longest
row; shorter rows are filled on the left), W windows of n slots, K cache columns in use, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .decode_step import Step

PREFILL_FROM = 2048
"""Prompts longer than this first pass through the model causally, which avoids a P x P mask."""
_GROW = 256


class RowCache(Cache):
    """Keys and values (B, heads, capacity, d) of each layer, written at the columns in `write_at`.

    The last column is a scratch column: the fill of shorter rows is written there and never read.
    """

    def __init__(self, capacity: int, *, fixed: bool) -> None:
        super().__init__(layers=[])
        self.capacity, self.fixed = capacity, fixed
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.write_at: tuple[Tensor, Tensor]
        """Row int64 (B, 1) and column int64 (B, C + W n) of each token of the pass."""
        self.used = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple:
        """Writes (B, heads, C + W n, d) at `write_at` and returns the first `used` columns."""
        if layer_idx == len(self.keys):
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        rows, columns = (x.to(key_states.device) for x in self.write_at)  # layers may be on several devices
        filled = []
        for buffer, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            buffer[rows, :, columns] = new.transpose(1, 2)
            filled.append(buffer[:, :, : self.used])
        return filled[0], filled[1]

    def _empty(self, like: Tensor) -> Tensor:
        buffer = like.new_zeros(like.shape[0], like.shape[1], self.capacity, like.shape[3])
        if self.fixed:
            torch._dynamo.mark_static_address(buffer)  # a CUDA graph records the address and writes there again
        return buffer

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Always 0: transformers derives positions and masks from it, and this module passes both explicitly."""
        return 0

    def reserve(self, columns: int) -> None:
        """Makes room for `columns` columns in use."""
        if columns >= self.capacity:  # >=, because the scratch column comes on top
            more = columns + 1 + max(_GROW, columns // 4) - self.capacity
            self._replace(lambda x: torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], 2))
            self.capacity += more

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but these, int64 (B',)."""
        self._replace(lambda x: x[rows.to(x.device)])

    def fill(self, prefix: Any) -> None:
        """Copies the columns of a DynamicCache."""
        for layer in prefix.layers:
            for buffers, states in ((self.keys, layer.keys), (self.values, layer.values)):
                buffers.append(self._empty(states))
                buffers[-1][:, :, : states.shape[2]] = states

    def _replace(self, change: Any) -> None:
        self.keys, self.values = [change(x) for x in self.keys], [change(x) for x in self.values]


class TransformersProposer:
    """Proposer over a causal LM of transformers in eval mode.

    Args:
        model: with attn_implementation "sdpa" or "eager".
        mask_token_id: token of the slots 1..n-1.
        causal_attn: the model was trained with causal attention inside a block.
        target_shift: False: the model was trained without the shift; a window starts behind its anchor.
        capacity: columns of a cache that never grows; 0: the cache grows with the rows.

    Raises:
        ValueError: the model's attention backend does not take dense masks.
    """

    def __init__(
        self, model: Any, *, mask_token_id: int, causal_attn: bool, target_shift: bool = True, capacity: int = 0
    ) -> None:
        backend = model.config._attn_implementation
        if backend not in ("sdpa", "eager"):
            raise ValueError(f"decoding needs attn_implementation 'sdpa' or 'eager' (dense masks), not '{backend}'")
        self.model, self.mask_token_id = model, mask_token_id
        self.causal_attn, self.target_shift = causal_attn, target_shift
        self.cache = RowCache(capacity or _GROW, fixed=bool(capacity))

    def prefill(self, ids: Tensor) -> None:
        """Feeds tokens (B, P) causally without a mask; all rows start at column 0, so shorter rows overwrite later."""
        prefix = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        self.cache.reserve(ids.shape[1])
        self.cache.fill(prefix)

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, W, n, V) of the proposals; afterwards the cache contains the new clean tokens."""
        if step.kept_rows is not None:
            self.cache.keep_rows(step.kept_rows)
        windows = step.anchors.shape[1] if step.window > 1 else 0
        size = step.window - step.clean_anchors  # tokens of a window
        used = step.longest + windows * size
        if not self.cache.fixed:
            self.cache.reserve(used)
        self.cache.used = self.cache.capacity if self.cache.fixed else used
        chunk = step.end[:, None] - step.width + torch.arange(step.width, device=step.end.device)  # positions (B, C)
        real, positions = chunk >= step.cached[:, None], chunk.clamp(min=0)
        ids, columns = step.ids.gather(1, positions), torch.where(real, positions, self.cache.capacity - 1)
        # bool (B, C, K): a clean token sees the columns up to its own
        visible = torch.arange(self.cache.used, device=positions.device) <= positions[:, :, None]
        if windows:
            slots = torch.arange(windows * size, device=chunk.device).view(windows, -1)
            place = step.end[:, None, None] + slots  # columns (B, W, tokens of a window)
            tokens, starts = torch.full_like(place, self.mask_token_id), step.anchors
            if self.target_shift and not step.clean_anchors:
                tokens[:, :, 0] = step.ids.gather(1, step.anchors)
            else:
                starts = starts + 1
            ahead = starts[:, :, None] + slots[0]
            ids = torch.cat([ids, tokens.flatten(1)], 1)
            positions = torch.cat([positions, ahead.flatten(1)], 1)
            columns = torch.cat([columns, place.flatten(1)], 1)
            visible = torch.cat([visible, window_rows(starts, place, self.cache.used, self.causal_attn)], 1)
        self.cache.write_at = torch.arange(len(columns), device=columns.device)[:, None], columns
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=additive_mask(visible, self.model.dtype),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=max(1, windows * step.window),  # n per window, its clean anchor included
        ).logits
        if step.clean_anchors:  # the anchors are the last clean tokens, the windows follow them
            anchors, masks = logits.split([windows, windows * size], 1)
            return torch.cat([anchors[:, :, None], masks.view(len(masks), windows, size, -1)], 2)
        return logits.view(len(logits), max(1, windows), -1, logits.shape[-1])


def window_rows(starts: Tensor, place: Tensor, columns: int, causal_attn: bool) -> Tensor:
    """Visibility of the slots of windows, bool (B, W n, K); `diffusion.mask.visible` in terms of cache columns.

    Args:
        starts: int64 (B, W), position of slot 0; the clean column of that position is hidden, slot 0 replaces it.
        place: int64 (B, W, n), column of each slot.
        columns: K.
        causal_attn: a slot sees only itself and earlier slots of its window.
    """
    column = torch.arange(columns, device=starts.device)
    prefix = (column < starts[:, :, None])[:, :, None]
    last = place if causal_attn else place[:, :, -1:].expand_as(place)
    own = (column >= place[:, :, :1, None]) & (column <= last[..., None])
    return (prefix | own).flatten(1, 2)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask (B, 1, queries, keys) added to the scores by eager attention; sdpa takes the same."""
    # the most negative finite number, as in transformers' own masks: -inf - -inf would be NaN in softmax
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
