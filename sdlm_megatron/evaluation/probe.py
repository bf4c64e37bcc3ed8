"""Probe: what a model proposes at every position of a text, from one forward pass over the text.

A window of decoding is a training block, so the text is expanded as in training, with a block at every anchor of the
answer; each block then holds the proposals that decoding would see there. As long as a decoding rule writes the probed
text, `follow` derives its passes from them without decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.diffusion.decode import SPECULATIVE
from sdlm_megatron.diffusion.decode_model import additive_mask
from sdlm_megatron.diffusion.decode_rules import choose, confidence, confident_prefix, verified_prefix
from sdlm_megatron.diffusion.layout import pack_row, row_positions
from sdlm_megatron.diffusion.mask import visible_row

LOGIT_ROWS = 1024  # rows of logits computed at a time: 200 MB with a vocabulary of 49,152


@dataclass(frozen=True)
class Probe:
    """Proposals before each of the R tokens of an answer, for n slots."""

    tokens: Tensor  # int64 (R, n)
    prob: Tensor  # float32 (R, n), confidence of prob_conf
    entropy: Tensor | None  # float32 (R, n), confidence of entropy_conf; None if it was not requested


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
    """Probes each answer (at least one token, end token included) after its prompt, both as token ids.

    Args:
        window: n; may differ from the trained block size.
        batch: texts per forward pass.
        entropy: also compute the entropy, which takes half of the time spent on logits.
        progress: called after each batch with the number of its texts.
    """
    # texts of similar length share a batch, which keeps padding small
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    probes: dict[int, Probe] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        texts = [(prompts[i], answers[i]) for i in part]
        probes |= dict(zip(part, _probe_batch(chat, texts, window, entropy), strict=True))
        if progress is not None:
            progress(len(part))
    return [probes[i] for i in range(len(prompts))]


@torch.inference_mode()
def _probe_batch(
    chat: ChatModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], window: int, entropy: bool
) -> list[Probe]:
    rows = []
    for prompt, answer in texts:
        clean = np.array([*prompt, *answer[:-1]], dtype=np.int32)  # nothing is predicted after the last token
        rows.append(
            pack_row(
                [(0, clean, np.arange(len(prompt) - 1, len(clean)))],
                block_size=window,
                mask_token_id=chat.config.decoding.mask_token_id,
                target_shift=chat.config.decoding.target_shift,
            )
        )
    size = max(layout.used for _, layout in rows)
    ids, positions = np.zeros((len(rows), size), np.int64), np.zeros((len(rows), size), np.int64)
    visible = np.zeros((len(rows), size, size), bool)
    for b, (tokens, layout) in enumerate(rows):
        ids[b, : layout.used], positions[b, : layout.used] = tokens, row_positions(layout)
        visible[b] = visible_row(layout, size, causal_attn=chat.config.decoding.causal_attn)
    model, device = chat.model, chat.model.device
    hidden = model.base_model(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=additive_mask(torch.from_numpy(visible).to(device), model.dtype),
        use_cache=False,
    ).last_hidden_state
    counts = [len(answer) for _, answer in texts]
    blocks = torch.cat([hidden[b, layout.n_clean : layout.used] for b, (_, layout) in enumerate(rows)])
    algs = ("prob_conf", "entropy_conf") if entropy else ("prob_conf",)
    parts = [x.view(-1, window).cpu().split(counts) for x in _proposals(model.get_output_embeddings(), blocks, algs)]
    return [Probe(tokens, prob, *(rest or [None])) for tokens, prob, *rest in zip(*parts, strict=True)]


def _proposals(head: torch.nn.Module, hidden: Tensor, algs: Sequence[str]) -> Iterator[Tensor]:
    """Tokens, then the confidence by each algorithm, (N,) each, of hidden states (N, h)."""
    parts = []
    for rows in hidden.split(LOGIT_ROWS):
        logits = head(rows)[:, None].float()
        tokens = choose(logits, None, None)
        parts.append((tokens, *(confidence(tokens, logits, alg) for alg in algs)))
    return (torch.cat(x) for x in zip(*parts, strict=True))


def follow(text: Sequence[int], probed: Probe, rule: DecodingRule) -> list[int] | None:
    """Tokens kept in each pass of a decoding that writes `text`; None if the rule would write something else.

    Args:
        text: R tokens; the end token is absent if the answer was cut at the token limit.
        probed: the text's probe with the rule's window.
    """
    target = torch.tensor(text)
    if rule.alg in SPECULATIVE:
        return _follow_drafts(target, probed)
    confidences = probed.prob if rule.alg == "prob_conf" else probed.entropy
    assert confidences is not None, "probed without the entropy"
    kept = confident_prefix(confidences, rule.threshold, rule.product).tolist()
    accepted, at = [], 0
    while at < len(target):
        count = min(kept[at], len(target) - at)
        if not torch.equal(probed.tokens[at, :count], target[at : at + count]):
            return None
        accepted.append(count)
        at += count
    return accepted


def _follow_drafts(target: Tensor, probed: Probe) -> list[int] | None:
    """`follow` for self-speculation, which writes the proposals of slot 0; diffusion.decode defines its passes.

    Lossless decoding has the same ones: its models predict by a clean token what they predict by slot 0.
    """
    first = probed.tokens[:, 0]
    if not torch.equal(first, target):
        return None
    window = probed.tokens.shape[1]
    accepted, at = [1], 1
    while at < len(target):
        verified = first[at : at + window]
        drafts = torch.cat([target[at - 1 : at], probed.tokens[at - 1, 1:]])[: len(verified)]
        count = int(verified_prefix(verified[None], drafts[None]))
        accepted.append(count)
        at += count
    return accepted
