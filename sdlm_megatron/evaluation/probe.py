"""What a model proposes at every place of a text: one forward pass instead of a decode for each setting.

A block of training and a window of decoding are the same thing, so the text is expanded as training expands it, with
a block at every anchor of the answer, and each block's proposals are those that decoding would see there. While a
setting's decode stays on the text, all it does follows from them: `follow`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.diffusion.decode_model import additive_mask
from sdlm_megatron.diffusion.decode_rules import choose, confidence, sure_prefix, verified_prefix
from sdlm_megatron.diffusion.layout import pack_row, row_positions
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.evaluation.decoding import Setting

LOGIT_ROWS = 1024
"""Rows of logits at a time: 200 MB at a vocabulary of 49152."""


@dataclass(frozen=True)
class Probe:
    """The proposals behind each token before an answer token: R places of n slots."""

    tokens: Tensor
    """int64 (R, n)."""
    prob: Tensor
    """float32 (R, n), confidence of prob_conf."""
    entropy: Tensor | None
    """float32 (R, n), confidence of entropy_conf, where it was asked for."""


def probe(
    chat: ChatModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    window: int,
    batch: int = 32,
    entropy: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Probe]:
    """Probes each answer (R tokens, end token included, R >= 1) behind its prompt, both as ids.

    Args:
        window: n; may differ from the trained block size.
        batch: texts at a time.
        entropy: take it too; half of what reading the logits costs.
        progress: called with the number of texts done after each batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    found: dict[int, Probe] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        texts = [(prompts[i], answers[i]) for i in part]
        found |= dict(zip(part, _probe_batch(chat, texts, window, entropy), strict=True))
        if progress is not None:
            progress(len(part))
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def _probe_batch(
    chat: ChatModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], window: int, entropy: bool
) -> list[Probe]:
    rows = []
    for prompt, answer in texts:
        clean = np.array([*prompt, *answer[:-1]], dtype=np.int32)  # nothing is proposed behind the last token
        rows.append(
            pack_row(
                [(0, clean, np.arange(len(prompt) - 1, len(clean)))],
                block_size=window,
                mask_token_id=chat.config.text_mask_token_id or 0,
                target_shift=chat.config.target_shift,
            )
        )
    size = max(layout.used for _, layout in rows)
    ids, positions = np.zeros((len(rows), size), np.int64), np.zeros((len(rows), size), np.int64)
    visible = np.zeros((len(rows), size, size), bool)
    for b, (tokens, layout) in enumerate(rows):
        ids[b, : layout.used], positions[b, : layout.used] = tokens, row_positions(layout)
        visible[b] = visible_row(layout, size, causal_attn=chat.config.causal_attn)
    model, device = chat.model, chat.model.device
    hidden = model.base_model(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=additive_mask(torch.from_numpy(visible).to(device), model.dtype),
        use_cache=False,
    ).last_hidden_state
    places = [len(answer) for _, answer in texts]
    blocks = torch.cat([hidden[b, layout.n_clean : layout.used] for b, (_, layout) in enumerate(rows)])
    algs = ("prob_conf", "entropy_conf") if entropy else ("prob_conf",)
    read = [x.view(-1, window).cpu().split(places) for x in _read(model.get_output_embeddings(), blocks, algs)]
    return [Probe(tokens, sure[0], sure[1] if entropy else None) for tokens, *sure in zip(*read, strict=True)]


def _read(head: torch.nn.Module, hidden: Tensor, algs: Sequence[str]) -> Iterator[Tensor]:
    """Tokens and each confidence, (N,) each, of hidden states (N, h)."""
    parts = []
    for some in hidden.split(LOGIT_ROWS):
        logits = head(some)[:, None].float()
        tokens = choose(logits, None, None)
        parts.append((tokens, *(confidence(tokens, logits, alg) for alg in algs)))
    return (torch.cat(x) for x in zip(*parts, strict=True))


def follow(text: Sequence[int], seen: Probe, setting: Setting) -> list[int] | None:
    """Tokens kept in each pass of a decode that writes `text`; None where the setting would write something else.

    Args:
        text: R tokens, end token included; cut by the token limit it may lack it.
        seen: its probe with the setting's window.
    """
    wanted = torch.tensor(text)
    if setting.alg == "self_speculative":
        return _follow_drafts(wanted, seen)
    sure = seen.prob if setting.alg == "prob_conf" else seen.entropy
    assert sure is not None, "probed without the entropy"
    kept = sure_prefix(sure, setting.threshold, setting.product).tolist()
    accepted, at = [], 0
    while at < len(wanted):
        count = min(kept[at], len(wanted) - at)
        if not torch.equal(seen.tokens[at, :count], wanted[at : at + count]):
            return None
        accepted.append(count)
        at += count
    return accepted


def _follow_drafts(wanted: Tensor, seen: Probe) -> list[int] | None:
    """Self-speculation writes what slot 0 says; see diffusion.decode for what a pass keeps."""
    if not torch.equal(seen.tokens[:, 0], wanted):
        return None
    window, first = seen.tokens.shape[1], seen.tokens[:, 0]
    accepted, at = [1], 1
    while at < len(wanted):
        said = first[at : at + window]
        drafts = torch.cat([wanted[at - 1 : at], seen.tokens[at - 1, 1:]])[: len(said)]
        count = int(verified_prefix(said[None], drafts[None]))
        accepted.append(count)
        at += count
    return accepted
