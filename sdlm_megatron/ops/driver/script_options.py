"""What the scripts in slurm/ take from their environment."""

import os
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.errors import ConfigError

VARIABLES = {"DATA": "data.path", "BASE": "checkpoint.base", "RUN_DIR": "run_dir"}


def environment_overrides(overrides: Sequence[str]) -> list[str]:
    """The variables as settings, `--data.path=...`; a setting given as an override needs no variable.

    ConfigError when a dataset or a base is named by neither.
    """
    found = []
    for variable, key in VARIABLES.items():
        given = any(o.startswith(f"--{key}=") for o in overrides)
        value = os.environ.get(variable, "")
        if value and not given:
            found.append(f"--{key}={Path(value).absolute()}")
        elif not value and not given and variable != "RUN_DIR":
            raise ConfigError(
                f"{variable} is not set",
                "the environment",
                f"{variable}=DIR before the command, or -- --{key}=DIR after it",
            )
    return found
