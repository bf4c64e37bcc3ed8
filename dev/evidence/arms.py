"""What the evidence compares: models trained from the same conversations in different ways ("arms")."""

from dataclasses import dataclass, replace

DOCUMENTS_PER_STEP = 6
"""About so many documents fill the one row of a step: every arm makes the same number of steps."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    text: str
    """For tables."""
    block_size: int = 4
    causal_attn: bool = False
    next_token_weight: float = 0.0
    target_shift: bool = True
    share: float = 1.0
    """Of the conversations."""
    lr: float = 5e-4
    random_base: bool = False
    """Begin with random weights instead of the pretrained ones."""
    row_length: int = 960
    """Tokens of a row; a step is one row."""

    @property
    def repeat(self) -> int:
        """Blocks of one token repeat nothing: each answer token is a target once."""
        return 3 if self.block_size > 1 else 1


_AR = Arm("ar", "autoregressive (D = 1)", block_size=1, row_length=560)
"""A block of one token is its anchor's copy, which sees what the anchor sees: plain next-token training, exactly."""
_D4 = Arm("d4", "SDLM, D = 4")

MAIN = (
    _AR,
    _D4,
    Arm("d8", "SDLM, D = 8", block_size=8),
)
VARIANTS = (
    _D4,
    replace(_D4, name="unshifted", text="targets not shifted", target_shift=False),
    replace(_D4, name="causal", text="causal_attn", causal_attn=True),
    replace(_D4, name="next_token", text="with the AR loss on clean rows", next_token_weight=1.0),
)
"""Changes of one thing each, beside the first."""
SENSITIVITY = (
    replace(_D4, name="d4_half", text="D = 4, half of the conversations", share=0.5),
    replace(_D4, name="d4_quarter", text="D = 4, a quarter of the conversations", share=0.25),
    Arm("d2", "D = 2", block_size=2, row_length=800),
    replace(_D4, name="random", text="D = 4, from random weights", random_base=True),
)
"""Small looks, with fewer seeds."""
RATES = (
    replace(_AR, name="ar_slow", text="autoregressive, learning rate 1e-4", lr=1e-4),
    replace(_D4, name="d4_slow", text="SDLM, D = 4, learning rate 1e-4", lr=1e-4),
)
"""The comparison once more, at a fifth of the learning rate."""

ARMS = {arm.name: arm for arm in (*MAIN, *VARIANTS, *RATES, *SENSITIVITY)}
