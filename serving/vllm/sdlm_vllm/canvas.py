"""The canvas of a request: the tokens that one pass feeds, and which of them see which.

A pass needs the keys of all known tokens before the window, and the window itself. A token that was kept from a window
has no keys of its own yet, since a mask token stood in its place; so the pass also feeds the last tokens before the
window again. Example, n = 4, 20 known tokens x[0..19], of which up to 4 have no keys yet:

    canvas        x[15] x[16] x[17] x[18] | x[19]  M    M    M        one pass, 8 queries
    position        15    16    17    18  |   19   20   21   22
    attention             causal          |   both directions, and everything before position 19
    key cache       written, clean        |   overwritten by the next pass

Slot 0 stands at the position of the last known token and hides nothing else: no token occurs twice. Always feeding n
tokens, whatever the previous pass kept, makes the shape of a pass known before the previous pass has ended.
`n` tokens are fed again, except

- with `causal_attn`, or n = 1, slot 0 has the keys of a clean token, so one less;
- without the target shift, the window starts behind the last known token.

Lossless decoding needs `causal_attn`: all of a canvas is causal, and mask tokens behind a clean token are its window.
So n-1 drafts d, where there are any, stand between the last known token and its n-1 mask tokens, one at each position:

    first pass    x[19]  M    M    M                         its slots 1..3 propose the drafts d[21] d[22] d[23]
    next pass     x[20] d[21] d[22] d[23]  M    M    M       if it keeps d[21..23] and x[24], then its slots 4..6
    position       20    21    22    23   24   25   26       propose d[25] d[26] d[27]

A token that was kept as a draft has clean keys, so no token is fed again but the last. Where a draft is not kept, the
proposals behind it follow a wrong token, and the next pass is a first one.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Canvas:
    """What the layout of a canvas depends on besides the request. All methods take ints, NumPy arrays or tensors."""

    most: int
    """The largest window of a request."""
    causal_attn: bool
    target_shift: bool
    max_model_len: int

    @property
    def width(self) -> int:
        """Tokens of the largest canvas."""
        return 2 * self.most

    def lead(self, n: Any) -> Any:
        """1 where slot 0 repeats the last known token."""
        return (n == 1) | self.target_shift

    def causal(self, n: Any) -> Any:
        """Whether the window is causal, so that the whole canvas is."""
        return (n == 1) | self.causal_attn

    def clean(self, total: Any, n: Any, lossless: Any = False) -> Any:
        """Known tokens that precede the window in the canvas of a request with `total` known tokens."""
        before = total - self.lead(n) * 1
        needed = self._refed(n) * (lossless ^ True)
        fed = before - (before - needed) * (before > needed)
        # Where a full canvas does not fit into max_model_len, the keys of a prompt are all clean, and a request
        # that has answered has ended, see `limit`.
        return fed * (total + fed + n <= self.max_model_len)

    def rows(self, total: Any, n: Any, lossless: Any = False, drafts: Any = 0) -> Any:
        """Tokens of the canvas; the window is what follows the first `clean` of them, with `drafts` in it."""
        full = self.clean(total, n, lossless) + n + drafts
        room = self.max_model_len - total
        return full - (full - room) * (full > room)

    def limit(self, n: Any, lossless: Any = False) -> Any:
        """Known tokens at which a request ends, so that a full canvas fits into max_model_len until then; a lossless
        one may be cut, since its slot 0 is all that a pass needs."""
        return self.max_model_len - (self._refed(n) + n - 1) * (lossless ^ True)

    def drafts(self, total: Any, n: Any) -> Any:
        """Drafts in the lossless canvas of a request that has some: n-1, or 0 where the canvas would not fit."""
        return (n - 1) * (total + 2 * n - 1 <= self.max_model_len)

    def _refed(self, n: Any) -> Any:
        return n - (self.causal(n) & self.lead(n)) * 1
