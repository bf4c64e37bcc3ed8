"""One process that holds the whole model, for conversions on a machine of any kind."""

from typing import TYPE_CHECKING

from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig, RunConfig
from sdlm_megatron.parallel import compat, cpu

if TYPE_CHECKING:
    from sdlm_megatron.parallel.engine import Engine


def whole_model(shape: ModelConfig, diffusion: DiffusionConfig, *, precision: str) -> "Engine":
    """An engine with TP = PP = 1 on the CPU, weights not filled. `precision`: bf16, fp16 or fp32."""
    compat.silence_known_notices()
    cpu.install()
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import init_groups

    config = RunConfig(diffusion=diffusion)
    config.train.precision = precision
    groups = init_groups(config.parallel, seed=0)
    return Engine(config, shape, groups, max_positions=1, steps=0, initialize=False)
