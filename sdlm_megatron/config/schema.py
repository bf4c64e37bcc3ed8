"""Every setting of a training run. The text below a field is its help in `sdlm train --help`."""

import math
from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """Shape of the transformer. All sizes zero (the default): read from the base's config.json."""

    num_layers: int = 0
    """Transformer layers. 0: the whole model section is the base's, also where a preset has other values."""
    hidden_size: int = 0
    """Width of the residual stream."""
    ffn_hidden_size: int = 0
    """Width of the MLP, per projection (SwiGLU)."""
    num_attention_heads: int = 0
    """Query heads."""
    num_query_groups: int = 0
    """Key-value heads (grouped-query attention)."""
    head_dim: int = 0
    """Width of a head. 0: hidden_size / num_attention_heads."""
    vocab_size: int = 0
    """Rows of the embedding in the Hugging Face folder; padding for tensor parallelism is added on top."""
    rope_theta: float = 1e6
    """Base of the rotary position embedding."""
    rms_norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    tied_embeddings: bool = False
    """Share the weights of the embedding and the output head."""
    qkv_bias: bool = True
    """Biases on the query, key and value projections: Qwen2.5 has them, other families do not."""
    qk_norm: bool = False
    """RMSNorm of each query and key head, before the rotary embedding: Qwen3 has it."""
    nope_interval: int = 0
    """Each layer whose number (from 1) is a multiple of this has no rotary embedding: 4 in SmolLM3. 0: all have it."""
    rope_factor: float = 1.0
    """Rope scaling: divisor of the frequencies of long wavelengths. 1: no scaling."""
    rope_type: str = "llama3"
    """With rope_factor, the kind of scaling: llama3 | yarn."""
    rope_low_freq: float = 1.0
    """With rope_factor: wavelengths above rope_original_positions / this are scaled in full. beta_slow of YaRN."""
    rope_high_freq: float = 4.0
    """With rope_factor: wavelengths below rope_original_positions / this are not scaled; in between, in part.
    beta_fast of YaRN, where 32 is usual."""
    rope_original_positions: int = 8192
    """With rope_factor: positions of the model before its context was extended."""
    rope_attention_factor: float = 0.0
    """With yarn: factor of queries and keys. 0: 0.1 ln(rope_factor) + 1."""

    @property
    def head_size(self) -> int:
        """Dimension of an attention head: head_dim, or where that is 0 hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_magnitude(self) -> float:
        """Factor of queries and keys after the rotary embedding; 1 without YaRN."""
        if self.rope_type != "yarn" or self.rope_factor == 1:
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_factor) + 1


@dataclass
class DiffusionConfig:
    """SDLM's settings. Block size, target shift and mask token come from the dataset's manifest; a value set here is a
    check, and an error where the dataset has another one."""

    block_size: int = 0
    """Tokens D of a block. 0: the dataset's."""
    causal_attn: bool = False
    """Causal attention inside a block: a slot sees only itself and earlier slots."""
    # Three states, unlike the other two: false is a setting of its own, so it cannot mean "unset".
    target_shift: bool | None = None
    """Each slot predicts the token after its position, as in SDLM; false (an ablation): the token at its position.
    null: the dataset's."""
    next_token_weight: float = 0.0
    """Weight of the next-token loss on the clean tokens of the answers, relative to the blocks' loss, so that plain
    autoregressive decoding keeps working. 0, as in SDLM: off."""
    mask_token: str = ""
    """Token that fills slots 1 to D-1 of a block. Empty: the dataset's."""


@dataclass
class DataConfig:
    """Packed datasets."""

    path: str = ""
    """Folder of the packed dataset, written by `sdlm prepare`."""
    validation: str = ""
    """Folder of a held-out packed dataset with the same row length, block size and tokenizer; its loss is logged every
    observe.validate_every steps."""
    skip_rows: list[int] = field(default_factory=list)
    """Row numbers of the run, as in spikes.jsonl, whose documents are left out. All others stay in their steps."""


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the rest of the world size."""

    tensor: int = 1
    """Tensor parallelism (TP). Key-value heads are replicated where there are fewer than TP."""
    pipeline: int = 1
    """Pipeline stages (PP). num_layers must be a multiple of pipeline x virtual_pipeline."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage. Above 1: the interleaved schedule, which divides the bubble by this number."""
    context: int = 1
    """Context parallelism (CP): the tokens of a row are split over this many processes, which exchange keys and values.
    For rows that do not fit into memory."""
    sequence: bool = False
    """Sequence parallelism: split activations outside attention and MLP over TP. Needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state and fp32 master weights over data parallelism (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data parallelism during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated weights over data parallelism during the next forward pass. Needs distributed_optimizer and
    overlap_grad_reduce."""
    overlap_tensor: bool = False
    """Overlap tensor-parallel communication with matrix products. Needs TransformerEngine's layers."""

    @property
    def model_size(self) -> int:
        """Processes of one copy of the model: data parallelism counts these copies."""
        return self.tensor * self.pipeline * self.context

    @property
    def group(self) -> int:
        """The number that divides a rank's micro-batches: the interleaved schedule processes them in groups of PP."""
        return self.pipeline if self.virtual_pipeline > 1 else 1


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a transformer layer, by their names in Hugging Face folders."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA): the base's weights are frozen; adapters and the mask token's row of the embedding are
    trained."""

    rank: int = 0
    """Rank r of the adapters. 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    """Linear layers that get an adapter."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 5e-6
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Term added to the denominator of the update."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    decay_norms_and_biases: bool = False
    """Apply it to norms and biases too, as the reference does: one flat list of parameters."""
    clip_grad: float = 1.0
    """Maximum global gradient norm. 0: no clipping."""


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the step."""

    style: str = "constant"
    """constant | linear | cosine (from the peak towards min_lr) | wsd (constant, then linear decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the last of them has the peak rate. With decay_steps at most the steps of the run."""
    decay_steps: int = 0
    """With wsd: steps of the decay at the end, the first of them still at the peak."""
    min_lr: float = 0.0
    """Learning rate that the decay would reach one step after the last, so that no step has a rate of 0."""


@dataclass
class TrainConfig:
    """Length, batch, precision and memory of the training loop."""

    seed: int = 42
    """Seed of the order of the rows. (Blocks are drawn when the dataset is built.)"""
    steps: int = 0
    """Length of the schedule in steps. 0: as many as `epochs` take."""
    epochs: float | None = None
    """Length in epochs of the dataset. null: 1, or as train.steps says; both set is an error, so a file's epochs take
    --train.epochs=null beside --train.steps=N."""
    global_batch: int = 256
    """Batch of one step, in global_batch_unit."""
    global_batch_unit: str = "documents"
    """documents (converted to rows by the dataset's mean documents per row) | rows."""
    micro_batches: int = 0
    """Micro-batches of a data-parallel rank and step. The documents of a step fill them; fewer have longer rows, which
    take more memory. 0: the number with least padding."""
    stop_after: int = 0
    """Save and stop after this step; the schedule keeps its length. 0: run to the end."""
    precision: str = "bf16"
    """bf16 (with fp32 master weights) | fp32."""
    gradient_dtype: str = "fp32"
    """Dtype in which gradients are summed over micro-batches and over data parallelism: fp32 | bf16 (half the memory
    and traffic; each sum is rounded). Norm, clipping and update are in fp32 either way."""
    attention: str = "auto"
    """Attention backend: auto (the fastest available; printed at start) | per_document | triton | decomposed | flex |
    dense (an S x S mask, for comparisons at small sizes)."""
    layers: str = "auto"
    """Layer implementation: auto (TransformerEngine on a GPU where installed; printed at start) | megatron |
    transformer_engine."""
    fp8: str = "none"
    """Scaling of FP8 matrix products: none | delayed (by the maxima of earlier steps) | current (by the maximum of the
    operand). Needs TransformerEngine's layers. Delayed statistics restart when a run resumes."""
    recompute: str = "none"
    """Activation recomputation: none | selective (outputs of the norms; nearly free) | full (keep only the input of
    each layer: least memory, about 1/3 more FLOPs)."""
    recompute_layers: int = 0
    """With recompute full: recompute only the first N layers of each model chunk. 0: all layers."""
    # Logits of 5,632 tokens over Qwen2.5's 151,936 words take 3.4 GB in fp32; softmax and gradient take as much again.
    logits_mb: float = 512
    """Memory limit in MB per process for logits, their softmax and its gradient. Head and loss process the label rows
    in chunks of this size; larger chunks are faster."""
    loss_normalization: str = "targets"
    """targets (mean over all targets of the global batch) | rows (mean of the rows' means, as in the reference)."""
    next_token_balance: bool = False
    """Scale diffusion.next_token_weight by the ratio of the blocks' loss to the next-token loss over the last steps
    (running sums; 1/10 to 10), so that the two parts of the loss keep the proportion 1 : next_token_weight."""

    @property
    def full_epochs(self) -> float:
        """Length in epochs of a run whose length is not set in steps."""
        return 1.0 if self.epochs is None else self.epochs


@dataclass
class CheckpointConfig:
    """Initial weights and checkpoints."""

    base: str = ""
    """Hugging Face folder, or checkpoint written by `sdlm import`, with the initial weights. Empty: random weights."""
    adapter: str = ""
    """Folder of adapters in peft's format, written by `sdlm export --adapter`: with lora.rank, the adapters start from
    it. Empty: they start at random."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved. 0: only the last step."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; older ones are removed after a complete save. 0: keep all."""
    keep_every: int = 0
    """Never remove checkpoints of steps divisible by this; a multiple of save_every. 0: no such exception."""
    async_save: bool = True
    """Write checkpoints in the background; a step waits only for the copy to host memory. The last save blocks."""
    local_dir: str = ""
    """Folder on each node's local disk, such as /scratch/$USER. Checkpoints are written there first and then copied to
    the run folder; a checkpoint that is complete only there is copied at start. Empty: write to the run folder."""


@dataclass
class ObserveConfig:
    """Logging, samples and validation."""

    log_every: int = 1
    """Steps between console lines and records of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str = "disabled"
    """Weights & Biases: disabled | offline | online."""
    wandb_project: str = "sdlm_megatron"
    """Weights & Biases project."""
    sample_every: int = 0
    """Steps between samples: up to four prompts of the dataset are decoded, at a cost of up to 32 forward passes of a
    whole row; the last step always has samples. 0: never."""
    validate_every: int = 500
    """Steps between evaluations of data.validation; the last step always has one. 0: never."""
    validation_rows: int = 64
    """Rows of data.validation per evaluation: the same rows each time, spread over the dataset. 0: all rows."""


@dataclass
class FaultConfig:
    """Detection of hangs, stragglers, loss spikes and diverged replicas."""

    heartbeat_seconds: float = 10.0
    """Maximum interval at which each process writes its position to RUN/logs/ATTEMPT/heartbeat."""
    # 75 is EX_TEMPFAIL of sysexits.h, a failure that may not repeat: the job's driver starts another attempt.
    hang_factor: float = 10.0
    """A step is a hang when it takes this multiple of the median of the last 100 steps: the stacks of all processes
    are written and the attempt ends with exit code 75."""
    hang_min_seconds: float = 180.0
    """Minimum duration of a step before it counts as a hang."""
    # Generous, because loading a large checkpoint from a busy shared file system and compiling kernels count as start.
    start_seconds: float = 3600.0
    """Time limit of phases other than a step: start, loading, the first step, a save, validation, samples."""
    straggler_factor: float = 1.2
    """Flag a host as a straggler if its compute time exceeds this multiple of the median for three consecutive log
    steps. 0 disables."""
    spike_factor: float = 8.0
    """A loss or gradient norm this many robust standard deviations above the median of the last 100 steps is a spike;
    its worst documents are listed in RUN/spikes.jsonl. 0 disables."""
    replica_check_every: int = 0
    """Steps between bitwise comparisons of the weights of all data-parallel ranks. 0: never. With a distributed
    optimizer the weights are rewritten from one master at each update, so a wrong copy lasts for one step."""
    log_rows: bool = False
    """Write the documents that each step trains, and their rows, to RUN/rows/ATTEMPT."""


@dataclass
class RunConfig:
    """A training run."""

    run_dir: str = "runs/default"
    """Folder of the run. Training resumes from its newest complete checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
