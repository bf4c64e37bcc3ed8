"""README.md of an export: how to use the model, and what the run says about how it was made."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdlm_megatron.weights.hf_reader import HFConfig


def model_card(config: HFConfig, dtype: str, run: Mapping[str, Any], name: str, remarks: Sequence[str] = ()) -> str:
    """The card as Markdown.

    Args:
        dtype: of the weights.
        run: run.json of the checkpoint (sdlm_megatron.ops.run_facts) and its step; {} where nothing is known.
        name: of the model.
        remarks: sentences for the limits.
    """
    if not config.is_sdlm:
        return f"# {name}\n\nA Qwen2-shaped language model in {dtype}, exported from Megatron-Core.\n"
    parts = [_head(config, dtype, run, name), _usage(config)]
    if run:
        parts += [_recipe(run), _data(run.get("data", {})), _losses(run.get("losses", {})), _versions(run)]
    return "\n".join(filter(None, [*parts, _limits(remarks)]))


def _head(config: HFConfig, dtype: str, run: Mapping[str, Any], name: str) -> str:
    base = f" Trained from {run['base']}." if run.get("base") else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- sdlm
- diffusion
---
# {name}

A Sequential Diffusion Language Model (arXiv 2509.24007), block size {config.block_size}: it proposes several tokens in
one forward pass and keeps those it is sure of.{base} {config.num_layers} layers, hidden size {config.hidden_size},
vocabulary {config.vocab_size}, weights in {dtype}.
"""


def _usage(config: HFConfig) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
answer = model.generate(
    **inputs, max_new_tokens=256, sdlm_alg="prob_conf", sdlm_n={config.block_size}, sdlm_threshold=0.9
)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`sdlm_alg` is `prob_conf`, `entropy_conf`, `self_speculative` or `ar` (one token a pass). A higher `sdlm_threshold`
keeps fewer tokens a pass; `sdlm_n` is the size of the window. Needs transformers 4.57 or newer. The folder also loads
as plain `Qwen2ForCausalLM`. `sha256sum -c SHA256SUMS` checks the files.
"""


def _recipe(run: Mapping[str, Any]) -> str:
    settings = run["settings"]
    train, optimizer, schedule, diffusion = (settings[k] for k in ("train", "optimizer", "schedule", "diffusion"))
    rows = {
        "steps made": run.get("step"),
        "rows a step": run.get("rows_per_step"),
        "rows trained on": run.get("consumed_rows"),
        "block size D": diffusion["block_size"],
        "attention inside a block": "causal" if diffusion["causal_attn"] else "both ways",
        "loss": f"mean over {train['loss_normalization']} of the global batch",
        "weight of the next-token loss on clean tokens": diffusion.get("next_token_weight", 0.0),
        "optimizer": f"AdamW, betas {optimizer['beta1']:g} and {optimizer['beta2']:g}, eps {optimizer['eps']:g}, "
        f"weight decay {optimizer['weight_decay']:g}, gradient norm at most {optimizer['clip_grad']:g}",
        "learning rate": f"{optimizer['lr']:g} {schedule['style']}, {schedule['warmup_steps']} steps of warm-up",
        "precision": train["precision"] + ("" if train["fp8"] == "none" else f", FP8 {train['fp8']}"),
        "seed": train["seed"],
        "layout of the last run": f"TP {settings['parallel']['tensor']} x PP {settings['parallel']['pipeline']} x "
        f"DP {run['data_parallel']}",
    }
    return "## Recipe\n\n" + _table(("setting", "value"), ((k, v) for k, v in rows.items() if v is not None))


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    epochs = data.get("epochs", [])
    tokenizer = data.get("tokenizer", {})
    facts = {
        "dataset": data["name"],
        "fingerprint of its manifest": data.get("checksum"),
        "tokenizer": tokenizer.get("name"),
        "fingerprint of the tokenizer": tokenizer.get("fingerprint"),
        "rows of the first epoch": f"{epochs[0]['rows']} of {data['row_length']} tokens" if epochs else None,
        "documents": epochs[0]["documents"] if epochs else None,
        "clean tokens": epochs[0]["clean"] if epochs else None,
        "block tokens": epochs[0]["block"] if epochs else None,
        "targets": epochs[0]["targets"] if epochs else None,
        "epochs packed": len(epochs) or None,
        "seed of the blocks": data.get("seed"),
        "system turn where there was none": data.get("system_prompt"),
    }
    text = "## Data\n\n" + _table(("", ""), ((k, v) for k, v in facts.items() if v is not None))
    sources = [
        (
            " ".join(str(s[k]) for k in ("name", "hub", "subset", "revision") if s.get(k)),
            *(s.get(k, "") for k in ("weight", "rows")),
            s.get("packed", 0) + s.get("truncated", 0),
            s.get("clean_tokens", ""),
            s.get("licence", ""),
        )
        for s in data.get("sources", [])
    ]
    if sources:
        text += "\n" + _table(("source", "weight", "rows", "documents", "clean tokens", "licence"), sources)
    return text


def _losses(losses: Mapping[str, Any]) -> str:
    slots = sorted((k for k in losses if k.startswith("loss_pos_")), key=lambda k: int(k.removeprefix("loss_pos_")))
    if "loss" not in losses:
        return ""
    rows = [("all", losses["loss"]), *((k.removeprefix("loss_pos_"), losses[k]) for k in slots)]
    return f"## Training loss at step {losses['step']}\n\nOf one step's rows, in nats a token.\n\n" + _table(
        ("slot", "loss"), ((slot, f"{loss:.4f}") for slot, loss in rows)
    )


def _versions(run: Mapping[str, Any]) -> str:
    return "## Versions\n\n" + _table(("package", "version"), run.get("versions", {}).items())


def _limits(remarks: Sequence[str]) -> str:
    own = "".join(f"- {remark[0].upper()}{remark[1:]}.\n" for remark in remarks)
    return f"""## Limits

- The run measured training losses only: quality and speed need an evaluation of their own.
- Tokens a pass depend on the text and on `sdlm_threshold`; a low threshold costs quality.
{own}"""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(_cell(value) for value in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
