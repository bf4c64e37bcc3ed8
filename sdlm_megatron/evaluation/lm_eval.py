"""lm-evaluation-harness with the model `sdlm`: its own command line, with all of its options and tasks.

lm_eval 0.4.13 has no plugins: it knows a model only after a module that registers it was imported, which the plain
`lm_eval` command never does. This command registers `sdlm` and then runs `lm_eval`. From Python: `register()` of this
module, then `lm_eval.simple_evaluate(model="sdlm", ...)`.
"""

import argparse
import sys
from collections.abc import Sequence

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli

EXAMPLES = """sdlm evaluate lm_eval --model sdlm --model_args pretrained=DIR,alg=prob_conf,threshold=0.98 \\
    --tasks my_task --include_path TASK_DIR --apply_chat_template --batch_size 16 --output_path runs/lm_eval
sdlm evaluate lm_eval --model sdlm --model_args pretrained=DIR,alg=ar --tasks my_task ..."""
NOTES = """Arguments of --model_args for sdlm: pretrained, alg, n, threshold, product (default: the folder's
generation_config.json), dtype, device, likelihood, and those of the harness' own model hf: batch_size, max_length,
truncation, add_bos_token, prefix_token_id, logits_cache, softmax_dtype, chat_template_args, enable_thinking,
think_end_token.

All other options are those of lm_eval: sdlm evaluate lm_eval run --help"""


def register() -> None:
    """Registers the model `sdlm` with the harness in this process; ConfigError if it is not installed."""
    try:
        import accelerate  # noqa: F401  # required by lm_eval's transformers models, but not by its package
        import lm_eval.models  # noqa: F401  # the registry fills when this is imported
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed", fix="pip install 'sdlm-megatron[eval]'"
        ) from None
    # later versions of lm_eval register it themselves, through the entry point in setup.py
    if "sdlm" not in model_registry:
        model_registry.register("sdlm", target="sdlm_megatron.evaluation.lm_eval_model:SDLMForLMEval")


def build_parser() -> argparse.ArgumentParser:
    """The help text of this command; its options are parsed by lm_eval."""
    return make_parser("sdlm evaluate lm_eval", __doc__, example=EXAMPLES, notes=NOTES)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in ([], ["-h"], ["--help"]):
        print(build_parser().format_help(), end="")
        return
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *words]  # cli_evaluate takes no arguments
    cli_evaluate()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
