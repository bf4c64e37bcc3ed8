"""README.md of an export (the model card): how to use the model and how it was trained."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import markdown
from sdlm_megatron.weights.hf_config import FAMILIES, HFConfig

PLAIN_PASS = """\
- Training put no loss on the predictions of a plain causal pass (`forward`, `sdlm_alg="ar"`): likelihoods and
  perplexities computed that way do not measure this model.
"""

ATTENTION = {True: "causal", False: "bidirectional"}
TARGET = {True: "the next token", False: "the token at its position"}

LOSSLESS = """, `lossless` (draft and verify: the text of `ar`, or samples of its distribution, in fewer passes)"""


def model_card(config: HFConfig, dtype: str, run: Mapping[str, Any], name: str, remark: str = "") -> str:
    """The card as Markdown.

    Args:
        dtype: of the weights.
        run: run.json of the checkpoint (ops/run_facts.py) and its step; {} where it has none.
        name: of the model.
        remark: a limitation of this export, as a sentence without its full stop.
    """
    if config.sdlm is None:
        return f"# {markdown(name)}\n\nA {config.model_type} model in {dtype}, exported from Megatron-Core.\n"
    stock = FAMILIES[config.model_type].stock_class
    parts = [_head(config, config.sdlm, dtype, run, name), _usage(config.sdlm, stock)]
    if "settings" in run:
        parts += [_recipe(run), _data(run.get("data", {})), _losses(run.get("losses", {}))]
        parts.append("## Versions\n\n" + _table(("package", "version"), run.get("versions", {}).items()))
    return "\n".join(filter(None, [*parts, _limits(remark, config.sdlm)]))


def _head(config: HFConfig, sdlm: SDLMSettings, dtype: str, run: Mapping[str, Any], name: str) -> str:
    start = f" Trained from {markdown(str(run.get('base')))}{_adapter(run, ' with the adapters')}."
    base = start if run.get("base") else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- sdlm
- diffusion
---
# {markdown(name)}

A Sequential Diffusion Language Model (arXiv 2509.24007) with block size {sdlm.block_size}: each forward pass proposes
several tokens and accepts the first ones whose confidence is high enough.{base} {config.shape.num_layers} layers,
hidden size {config.shape.hidden_size}, vocabulary {config.shape.vocab_size}, weights in {dtype}.
"""


def _usage(sdlm: SDLMSettings, stock: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype="auto")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
answer = model.generate(
    **inputs, max_new_tokens=256, sdlm_alg="{sdlm.alg}", sdlm_n={sdlm.window}, sdlm_threshold={sdlm.threshold:g}
)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`sdlm_alg` is one of `prob_conf` and `entropy_conf` (accept tokens by confidence), `self_speculative` (draft and verify:
the text of the first slot of a window alone){LOSSLESS * sdlm.lossless} and `ar` (one token per pass). `sdlm_n` is the
number of tokens proposed per pass. A higher `sdlm_threshold` accepts fewer tokens per pass. The model needs
transformers 4.57 or newer; the folder also loads as plain `{stock}`. `sha256sum -c SHA256SUMS` verifies the files.
"""


def adapter_card(sdlm: SDLMSettings, base: str, run: Mapping[str, Any], name: str) -> str:
    """README.md of a folder with adapters alone.

    Args:
        sdlm: settings of the training.
        base: name of the base.
        run, name: as of `model_card`.
    """
    recipe = f"\n{_recipe(run)}" if run else ""
    return f"""---
library_name: peft
---
# {markdown(name)}

Adapters (LoRA) and the mask token's row of the embedding, trained for SDLM (arXiv 2509.24007) beside the frozen weights
of {markdown(base or "a base")}{_adapter(run, ", from the adapters")}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=True, dtype="auto")
model = PeftModel.from_pretrained(base, FOLDER)
```

BASE is the base as an SDLM folder, which has the decoding code, a row for the mask token and the settings of
`sdlm.json`: block size {sdlm.block_size}, {ATTENTION[sdlm.causal_attn]} attention inside a block, slots that predict
{TARGET[sdlm.target_shift]}, mask token {markdown(str(sdlm.mask_token))} with id {sdlm.mask_token_id}.

```
sdlm import --hf BASE_MODEL --adapter FOLDER --out BASE_CHECKPOINT
sdlm export --ckpt BASE_CHECKPOINT --out BASE
```
{recipe}"""


def _adapter(run: Mapping[str, Any], words: str) -> str:
    return f"{words} {markdown(str(run['adapter']))}" if run.get("adapter") else ""


def _recipe(run: Mapping[str, Any]) -> str:
    settings = run.get("settings", {})
    diffusion, fp8 = settings.get("diffusion", {}), settings.get("train", {}).get("fp8", "none")
    lora = settings.get("lora", {})
    context = " x CP {parallel[context]}" if settings.get("parallel", {}).get("context", 1) > 1 else ""
    rows = {
        "steps": "{step}",
        "rows per step": "{rows_per_step}",
        "rows trained on": "{consumed_rows}",
        "block size D": "{diffusion[block_size]}",
        "attention inside a block": ATTENTION.get(diffusion.get("causal_attn"), "{diffusion[causal_attn]}"),
        "target of a slot": TARGET[bool(diffusion.get("target_shift", True))],
        "loss": "mean over {train[loss_normalization]} of the global batch",
        "weight of the next-token loss on clean tokens": f"{diffusion.get('next_token_weight', 0.0)}",
        "optimizer": "AdamW, betas {optimizer[beta1]:g} and {optimizer[beta2]:g}, eps {optimizer[eps]:g}, "
        "weight decay {optimizer[weight_decay]:g}, gradient norm clipped at {optimizer[clip_grad]:g}",
        "learning rate": "{optimizer[lr]:g} {schedule[style]}, {schedule[warmup_steps]} warm-up steps",
        "precision": "{train[precision]}" + ("" if fp8 == "none" else ", FP8 {train[fp8]}"),
        "seed": "{train[seed]}",
        "parallel layout": "TP {parallel[tensor]} x PP {parallel[pipeline]}" + context + " x DP {data_parallel}",
    }
    known = {}
    if lora.get("rank"):
        targets = ", ".join(map(str, lora.get("targets", [])))
        known["adapters"] = f"rank {lora['rank']}, alpha {lora.get('alpha')}, of {targets}"
    for name, template in rows.items():
        with suppress(KeyError):  # a checkpoint of an older version records less
            known[name] = template.format_map({**settings, **run})
    return "## Recipe\n\n" + _table(("setting", "value"), known.items())


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    epochs = data.get("epochs", [])
    tokenizer, first = data.get("tokenizer", {}), epochs[0] if epochs else {}
    facts = {
        "dataset": data.get("name"),
        "fingerprint of its manifest": data.get("checksum"),
        "tokenizer": tokenizer.get("name"),
        "fingerprint of the tokenizer": tokenizer.get("fingerprint"),
        "rows in the first epoch": f"{first['rows']} of {data.get('row_length')} tokens" if "rows" in first else None,
        **{f"{key} tokens": first.get(key) for key in ("clean", "block")},
        **{key: first.get(key) for key in ("documents", "targets")},
        "epochs packed": len(epochs) or None,
        "seed of the block positions": data.get("seed"),
        "default system turn": data.get("system_prompt"),
    }
    text = "## Data\n\n" + _table(("property", "value"), ((k, v) for k, v in facts.items() if v is not None))
    sources = [
        (
            " ".join(str(s[k]) for k in ("name", "hub", "subset", "revision") if s.get(k)),
            *(s.get(k, "") for k in ("weight", "rows")),
            sum(n for key in ("packed", "truncated") if isinstance(n := s.get(key), int)),
            s.get("clean_tokens", ""),
            s.get("licence", ""),
        )
        for s in data.get("sources", [])
    ]
    if sources:
        text += "\n" + _table(("source", "weight", "rows", "documents", "clean tokens", "licence"), sources)
    return text


def _losses(losses: Mapping[str, Any]) -> str:
    slots = sorted((k for k in losses if re.fullmatch(r"loss_pos_\d+", k, re.ASCII)), key=lambda k: int(k[9:]))
    if not losses.keys() >= {"loss", "step"}:
        return ""
    rows = [("all", losses["loss"]), *((k.removeprefix("loss_pos_"), losses[k]) for k in slots)]
    return f"## Training loss at step {losses['step']}\n\nOver the rows of one step, in nats per token.\n\n" + _table(
        ("slot", "loss"), ((slot, f"{loss:.4f}") for slot, loss in rows)
    )


def _limits(remark: str, sdlm: SDLMSettings) -> str:
    likelihoods = "" if sdlm.trains_plain_pass else PLAIN_PASS
    own = f"- {remark[0].upper()}{remark[1:]}.\n" if remark else ""
    return f"""## Limitations

- Only training losses were measured during the run: evaluate quality and speed before relying on them.
- `forward(labels=...)` computes the plain next-token loss, not the loss over blocks that the model was trained with:
  training with it alone does not train the proposal of several tokens per pass.
- The number of tokens accepted per pass depends on the text and on `sdlm_threshold`; a low threshold costs quality.
{likelihoods}{own}"""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(markdown(str(value)) for value in line) + " |\n" for line in lines)
