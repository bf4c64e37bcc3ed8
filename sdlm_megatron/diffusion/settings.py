"""SDLM's settings in a Hugging Face folder: the one mapping between them and config.json / generation_config.json.

Ships with every export next to `modeling_sdlm.py`, so it may import nothing else of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST = 10_000_000
"""Largest number in a setting: more than any vocabulary."""
MOST_BLOCK, MOST_DRAFTS = 4096, 128
"""Largest block size and window n, and the one of self-speculation, which feeds n + n² tokens in a pass."""


class SettingError(ValueError):
    """A setting that cannot be read.

    Args:
        what: description of the problem.
        file: name of the JSON file that holds the setting.
        field: its key there.
    """

    def __init__(self, what: str, file: str, field: str) -> None:
        super().__init__(f"{what} ({file}, field '{field}')")
        self.what, self.file, self.field = what, file, field


LOSSLESS_UNTRAINED = (
    "lossless follows the model's next-token distribution, which this model learned at the anchors of its blocks only "
    "(config.json has no next_token_weight)"
)


def lossless_fault(causal_attn: bool, target_shift: bool) -> str | None:
    """Reason why a model cannot be decoded with alg "lossless", as the end of a sentence; None if it can."""
    if not causal_attn:
        why = "causal_attn, and the slots of this one's blocks see each other both ways"
    elif not target_shift:
        why = "the target shift, and the blocks of this one have no slot for a clean token"
    else:
        return None
    return f"needs a model trained with {why}"


@dataclass(frozen=True)
class SDLMSettings:
    """Settings of the training that decoding depends on, and the default settings of decoding."""

    block_size: int
    """Tokens D of a training block; the default window when decoding."""
    mask_token_id: int
    mask_token: str | None = None
    """Text of the mask token; None in a folder that records only the id."""
    causal_attn: bool = False
    """Attention inside a block is causal instead of bidirectional."""
    target_shift: bool = True
    """Each slot predicts the token after its position; False: the token at its position."""
    next_token_weight: float = 0.0
    """Weight of the next-token loss on clean tokens during training."""
    alg: str = "prob_conf"
    """Default decoding algorithm, one of `decode.ALGORITHMS` or "ar"."""
    n: int | None = None
    """Tokens proposed per pass; None: block_size."""
    threshold: float = 0.9
    """Confidence, 0 to 1, that an accepted token must exceed."""
    product: bool = False
    """The threshold applies to the product of the confidences of all accepted tokens."""

    @property
    def window(self) -> int:
        """Tokens proposed per pass."""
        return self.block_size if self.n is None else self.n

    @property
    def decode_options(self) -> dict[str, Any]:
        """Arguments of `diffusion.decode.decode` that follow from how the model was trained."""
        return {"mask_token_id": self.mask_token_id, "causal_attn": self.causal_attn, "target_shift": self.target_shift}

    @property
    def lossless(self) -> bool:
        """Whether the model can be decoded with alg "lossless"."""
        return lossless_fault(self.causal_attn, self.target_shift) is None

    @property
    def trains_plain_pass(self) -> bool:
        """Whether a loss was put on what a causal pass without windows predicts; causal blocks begin with just that,
        and a block of one token is nothing else."""
        return bool(self.next_token_weight) or (self.target_shift and (self.causal_attn or self.block_size == 1))

    @classmethod
    def from_config_json(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "SDLMSettings | None":
        """Reads the content of config.json and generation_config.json.

        Returns None for a folder without `block_size`: a plain next-token model. Raises SettingError on a missing
        mask token id or a value of the wrong type.
        """
        if config.get("block_size") is None:
            return None
        if config.get("text_mask_token_id") is None:
            what = "an SDLM folder (its config.json has block_size) lacks the mask token's id"
            raise SettingError(what, "config.json", "text_mask_token_id")

        def read(name: str, kind: type, default: Any, least: float = 0, most: float = MOST) -> Any:
            return _checked(config, "config.json", name, kind, default, least, most)

        def read_default(name: str, kind: type, default: Any, least: float = 0, most: float = MOST) -> Any:
            return _checked(generation or {}, "generation_config.json", name, kind, default, least, most)

        block_size = read("block_size", int, None, 1, MOST_BLOCK)
        n = read_default("sdlm_n", int, None, 1, MOST_BLOCK)
        # The folders published by the paper's authors spell the key `casual_attn`.
        causal, casual = read("causal_attn", bool, None), read("casual_attn", bool, None)
        if None not in (causal, casual) and causal != casual:
            raise SettingError(f"it is {causal}, and casual_attn is {casual}", "config.json", "causal_attn")
        return cls(
            block_size=block_size,
            mask_token_id=read("text_mask_token_id", int, None),
            mask_token=read("text_mask_token", str, None),
            causal_attn=causal if causal is not None else bool(casual),
            target_shift=read("target_shift", bool, True),
            next_token_weight=float(read("next_token_weight", float, 0.0)),
            alg=read_default("sdlm_alg", str, cls.alg),
            # A window equal to the block size follows the block size when the model is trained on with another one.
            n=None if n == block_size else n,
            threshold=read_default("sdlm_threshold", float, cls.threshold, most=1),
            product=read_default("sdlm_product", bool, False),
        )

    def to_config_json(self) -> dict[str, Any]:
        """The keys of config.json. Keys that published folders lack are written only where they differ from the
        default, so that the other folders stay as the authors' code writes them."""
        values: dict[str, Any] = {
            "block_size": self.block_size,
            "causal_attn": self.causal_attn,
            "text_mask_token": self.mask_token,
            "text_mask_token_id": self.mask_token_id,
        }
        if not self.target_shift:
            values["target_shift"] = False
        if self.next_token_weight:
            values["next_token_weight"] = self.next_token_weight
        return values

    def to_generation_json(self) -> dict[str, Any]:
        """The keys of generation_config.json."""
        values = {"sdlm_alg": self.alg, "sdlm_n": self.window, "sdlm_threshold": self.threshold}
        return values | ({"sdlm_product": True} if self.product else {})


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _checked(
    values: Mapping[str, Any], file: str, field: str, kind: type, default: Any, least: float, most: float
) -> Any:
    """A setting of the type `kind`, numbers from `least` to `most`; `default` where it is absent or null."""
    value = values.get(field)
    if value is None:
        return default
    number = kind in (int, float)
    # By its type: True is an int.
    right = type(value) in ((int, float) if kind is float else (kind,))
    if not right or (number and not least <= value <= most):
        limits = f" from {least:g} to {most:g}" if number else ""
        raise SettingError(f"{field} is {value!r:.60}, expected {_KINDS[kind]}{limits}", file, field)
    return value
