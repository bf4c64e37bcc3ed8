"""Memory of real training steps, by counting tensors; prints one JSON line per case and process.

`python tests/measure_memory.py NAME…` runs the cases of CASES with these names, all for one number of processes.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.bench.timing import LiveTensors
from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.diffusion.layout import RowLayout, draw_starts, pack_row
from sdlm_megatron.diffusion.row import make_micro_batch
from sdlm_megatron.planner.memory import RowTokens

LENGTH, D, REPEAT = 512, 4, 3
BASE = {
    "model.num_layers": 4,
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 384,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.head_dim": 32,
    "model.vocab_size": 1000,
    "train.precision": "bf16",
    "train.attention": "decomposed",
    "train.logits_mb": 1,
    "diffusion.block_size": D,
}
LARGE = {"model.vocab_size": 16000, "train.recompute": "full", "train.logits_mb": 8}
LORA, SOME = {"lora.rank": 8}, ["q_proj", "v_proj", "up_proj"]
CASES: dict[str, tuple[int, int, dict[str, object]]] = {
    # name: processes, micro-batches, settings
    "bf16, tied": (1, 2, {"model.tied_embeddings": True}),
    "fp32, replicated optimizer": (1, 1, {"train.precision": "fp32", "parallel.distributed_optimizer": False}),
    "full recompute, wide": (1, 1, {"train.recompute": "full", "model.ffn_hidden_size": 1024}),
    "2 of 4 layers recomputed": (1, 1, {"train.recompute": "full", "train.recompute_layers": 2}),
    "selective recompute": (1, 1, {"train.recompute": "selective"}),  # counts norm outputs that are freed earlier
    "large vocabulary": (1, 1, {**LARGE, "model.tied_embeddings": True}),
    "large vocabulary, one chunk": (1, 1, {**LARGE, "train.precision": "fp32", "train.logits_mb": 512}),
    "TP2 + SP, tied": (2, 1, {"parallel.tensor": 2, "parallel.sequence": True, "model.tied_embeddings": True}),
    "TP2, one KV head": (2, 1, {"parallel.tensor": 2, "model.num_query_groups": 1, "model.qkv_bias": False}),
    "PP2, fp32, tied": (2, 4, {"parallel.pipeline": 2, "train.precision": "fp32", "model.tied_embeddings": True}),
    "PP2, full recompute": (2, 4, {"parallel.pipeline": 2, "train.recompute": "full"}),
    "PP2 x VPP2": (2, 4, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "DP2": (2, 1, {}),
    "norms of q and k": (1, 1, {"model.qk_norm": True, "model.qkv_bias": False, "model.head_dim": 48}),
    "CP2": (2, 1, {"parallel.context": 2}),
    "CP2, full recompute, wide": (
        2, 1, {"parallel.context": 2, "train.recompute": "full", "model.ffn_hidden_size": 1024}
    ),
    "LoRA, tied": (1, 2, {"model.tied_embeddings": True, **LORA}),
    "LoRA, 3 layers, full recompute": (1, 1, {"train.recompute": "full", "lora.targets": SOME, **LORA}),
    "LoRA, 3 layers": (1, 1, {"lora.targets": SOME, **LORA}),
    "LoRA, large vocabulary": (1, 1, {**LARGE, **LORA}),
    "LoRA, TP2 + SP": (2, 1, {"parallel.tensor": 2, "parallel.sequence": True, **LORA}),
    "LoRA, PP2, tied": (2, 4, {"parallel.pipeline": 2, "model.tied_embeddings": True, **LORA}),
    "LoRA, DP2": (2, 1, LORA),
    "DP2, bf16 gradients": (2, 1, {"train.gradient_dtype": "bf16"}),
}  # fmt: skip


def config_of(settings: dict[str, object]) -> RunConfig:
    """Configuration of a case."""
    config = RunConfig()
    for key, value in {**BASE, **settings}.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


def packed_row(seed: int) -> tuple[np.ndarray, RowLayout]:
    """A nearly full row of short documents."""
    rng, room, documents = np.random.default_rng(seed), LENGTH, []
    while room > 40:
        length = int(rng.integers(20, 60))
        anchors = np.arange(length // 3, length - 1)
        blocks = min(REPEAT * len(anchors), room - length) // D
        starts = draw_starts(anchors, blocks, seed=seed, epoch=0, document=len(documents))
        documents.append((len(documents), rng.integers(5, 250, length).astype(np.int32), starts))
        room -= length + blocks * D
    return pack_row(documents, block_size=D, mask_token_id=3)


def row_of(layout: RowLayout, targets: int) -> RowTokens:
    """The planner's description of the row."""
    block = layout.n_block_tokens
    return RowTokens(LENGTH, layout.n_clean, block, block / REPEAT, targets, D)


@dataclass
class Measured:
    """Memory of one process in bytes."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    peak: int
    """Peak of a forward and backward pass, in addition to the rest."""


def measure(name: str) -> tuple[Measured, RowTokens]:
    """Builds the case's model on this process and measures it."""
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import init_groups
    from sdlm_megatron.parallel.simulate import static_bytes

    _, micro_batches, settings = CASES[name]
    config = config_of(settings)
    groups = init_groups(config.parallel, seed=1)
    shape: ModelConfig = config.model
    engine = Engine(
        config, shape, groups, row_length=LENGTH, max_positions=LENGTH + D, steps=10, initialize=True, mask_token_id=3
    )
    batches = []
    for i in range(micro_batches):
        tokens, layout = packed_row(i)
        made = make_micro_batch(tokens, layout, row_length=LENGTH, pad_token_id=0, eos_token_id=2)
        batches.append(engine.prepare(made))
    engine.train_step(batches, 1)
    parameters = [p for module in engine.modules for p in module.parameters()]
    known = [
        *parameters,
        *(x for m in engine.modules for x in m.buffers()),
        *(p.main_grad for p in parameters if p.requires_grad),
    ]
    for x in batches:
        known += [x.tokens, x.positions, x.label_index, x.label_targets, x.label_slots]
    from megatron.core import parallel_state

    parallel_state.get_global_memory_buffer().buffer.clear()  # so that the gathered sequence is included
    live = LiveTensors()
    live.known.update(x.untyped_storage()._cdata for x in known)
    with live:
        engine.forward_backward(batches)
    labels = round(sum(x.row_labels or len(x.label_index) for x in batches) / len(batches))
    return Measured(groups.pp_rank, **static_bytes(engine), peak=live.peak), row_of(batches[0].layout, labels)


def main(names: list[str]) -> None:
    """Measures one case after the other in the same processes."""
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()
    from megatron.core import parallel_state

    for name in names:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        measured, row = measure(name)
        line = json.dumps({"case": name, **vars(measured), "row": vars(row)}) + "\n"
        os.write(1, line.encode())  # a single write, because other processes write there too


if __name__ == "__main__":
    main(sys.argv[1:])
