"""Every setting of a training run; `python -m sdlm_megatron.train --config PRESET --print-config` resolves them."""

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """Shape of the transformer. All zero (the default): read it from the base's config.json."""

    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    """KV heads (GQA)."""
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    vocab_size: int = 0
    """Rows of the embedding in the Hugging Face folder (padding for tensor parallelism is added on top)."""
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tied_embeddings: bool = False
    qkv_bias: bool = True
    """Biases of q, k and v: Qwen2.5 has them, Llama shapes do not."""


@dataclass
class DiffusionConfig:
    """What SDLM adds; block size and mask token must be those that the dataset was expanded with."""

    block_size: int = 4
    """Tokens D of a block."""
    causal_attn: bool = False
    """True: inside a block a slot sees only itself and earlier slots."""
    target_shift: bool = True
    """As the dataset was built: False is an ablation in which every slot predicts the token of its own place."""
    next_token_weight: float = 0.0
    """Weight of the plain next-token loss on the clean tokens of the answers, beside the blocks' 1, so that the model
    can be decoded plainly too; 0: none, as in SDLM."""
    mask_token: str = "<text_mask>"
    """The token that fills slots 1..D-1. Its id is looked up in the base's tokenizer; if it is not there, the first
    free id is used (Qwen2.5: 151665)."""


@dataclass
class DataConfig:
    """Where the rows come from."""

    path: str = ""
    """Folder written by `python -m data_prep.build`."""
    validation: str = ""
    """Another such folder, of conversations that are not trained on, built with the same row length, block size and
    tokenizer: what the model makes of them is measured every observe.validate_every steps."""
    skip_rows: list[int] = field(default_factory=list)
    """Numbers of rows of the run (as spikes.jsonl names them) to leave out: an empty row takes the place of each, the
    other rows of its step stay what they were."""


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what remains of the world size."""

    tensor: int = 1
    """TP. KV heads fewer than TP are replicated."""
    pipeline: int = 1
    """PP. num_layers must divide by it (by pipeline x virtual_pipeline)."""
    virtual_pipeline: int = 1
    """Model chunks of each stage: above 1 the interleaved schedule, with a bubble that many times smaller."""
    sequence: bool = False
    """Sequence parallelism: activations outside attention and MLP split over TP; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Optimizer state and fp32 master weights split over data parallelism (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data parallelism while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights over data parallelism while the next forward pass runs; needs distributed_optimizer and
    overlap_grad_reduce."""
    overlap_tensor: bool = False
    """Overlap the communication of tensor parallelism with the matrix products; needs TransformerEngine's layers."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 5e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Not applied to biases and norms."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0: no clipping."""


@dataclass
class ScheduleConfig:
    """Learning rate against step."""

    style: str = "constant"
    """constant | linear | cosine (from the peak to min_lr at the last step) | wsd (constant, then linear decay)."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """wsd only: length of the decay at the end."""
    min_lr: float = 0.0


@dataclass
class TrainConfig:
    """The loop."""

    seed: int = 42
    """Order of the rows (the draws of the blocks were seeded when the dataset was built)."""
    steps: int = 0
    """0: as many as `epochs` take."""
    epochs: float = 1.0
    """Used when steps is 0."""
    global_batch: int = 256
    """Size of a step, in `global_batch_unit`."""
    global_batch_unit: str = "documents"
    """documents (converted by the dataset's mean documents a row) | rows."""
    stop_after: int = 0
    """Save and stop after this step although the schedule goes on; 0: run to the end."""
    precision: str = "bf16"
    """bf16 (fp32 master weights and gradients) | fp32."""
    attention: str = "auto"
    """auto (what is fastest here; the choice is printed) | per_document | decomposed | flex | dense (an S x S mask: for
    comparisons at small sizes)."""
    layers: str = "auto"
    """auto (TransformerEngine where it is installed and there is a GPU; the choice is printed) | megatron |
    transformer_engine."""
    fp8: str = "none"
    """none | delayed | current (scaling of FP8 matrix products: by the largest values of earlier steps, or of the
    product itself); needs TransformerEngine's layers. A resumed run with delayed begins its statistics anew."""
    recompute: str = "none"
    """none | selective (norms' outputs are made again in the backward: nearly free) | full (a layer keeps its input
    only and runs forward again: least memory, about 1/3 more FLOPs)."""
    recompute_layers: int = 0
    """With recompute full: only the first so many layers of each model chunk; 0: all."""
    logits_mb: float = 512
    """Most memory of logits, their softmax and its gradient, in MB a process: head and loss take so many label rows at
    a time. Fewer, larger chunks are faster."""
    loss_normalization: str = "targets"
    """targets: mean over all targets of the global batch | rows: mean of the rows' means (the reference's weighing)."""


@dataclass
class CheckpointConfig:
    """Weights in, checkpoints out."""

    base: str = ""
    """A Hugging Face folder, or one written by `python -m checkpoints_tools.hf_to_mcore`; empty: random weights."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_last: int = 2
    """Older checkpoints are removed after a complete save; 0: keep all."""
    keep_every: int = 0
    """Checkpoints of every so many steps are never removed; a multiple of save_every. 0: only keep_last counts."""
    async_save: bool = True
    """Write while training goes on; a step waits only for the copy to host memory. The last save is waited for."""
    local_dir: str = ""
    """A folder on each node's own disk, such as /scratch/$USER: checkpoints are written there first, then copied to the
    run folder; at a start, one that is whole only there is copied. Empty: straight to the run folder."""


@dataclass
class ObserveConfig:
    """What is written about the run, apart from the console line and metrics.jsonl."""

    log_every: int = 1
    tensorboard: bool = True
    wandb: str = "disabled"
    """disabled | offline | online."""
    wandb_project: str = "sdlm_megatron"
    sample_every: int = 0
    """Steps between samples: four prompts of the dataset decoded with the weights of that step, a forward pass of a
    whole row for each of up to 32 passes. 0: none."""
    validate_every: int = 500
    """Steps between looks at data.validation, where that is set; the last step always has one. 0: never."""
    validation_rows: int = 64
    """Rows of data.validation to look at, the same each time, drawn from all of it; 0: all."""


@dataclass
class FaultConfig:
    """What a run notices of hangs, and how soon."""

    heartbeat_seconds: float = 10.0
    """Each process writes at least so often where it stands, into RUN/logs/ATTEMPT/heartbeat."""
    hang_factor: float = 10.0
    """A step that takes so many times the usual one (median of the last 100) is a hang: the stacks of all processes
    are written down and the attempt ends with exit code 75."""
    hang_min_seconds: float = 180.0
    """But no step is a hang before so long."""
    start_seconds: float = 3600.0
    """The same limit for all that is no usual step: start, loading, the first step, a save, validation, samples."""
    straggler_factor: float = 1.2
    """A host that computes so many times as long as the median one before gradients are reduced, in each of three log
    steps, is named. 0: none."""
    spike_factor: float = 8.0
    """A loss or gradient norm that lies so many robust standard deviations above the median of the last 100 steps is a
    spike: its worst rows are named in RUN/spikes.jsonl. 0: none."""
    replica_check_every: int = 0
    """Steps between checks that all data-parallel ranks hold the same weights, bit for bit. 0: none. (With a
    distributed optimizer each update makes the weights anew from one master: a wrong one then lasts a step.)"""
    log_rows: bool = False
    """Write the numbers of the rows that each step has loaded to RUN/rows/ATTEMPT."""


@dataclass
class RunConfig:
    """A whole run."""

    run_dir: str = "runs/default"
    """Folder of the run; training resumes by itself from its newest complete checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
