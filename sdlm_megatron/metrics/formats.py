"""Short forms of counts and durations, for the console and the reports."""

import math


def format_count(value: float) -> str:
    """At most 5 characters: 12345 -> "12.3k", 1.5e6 -> "1.50M"."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if value < limit * 0.9995:  # 999.6 rounds to 1000, which is written 1.00k
            scaled = value / divisor
            if not unit:
                return f"{scaled:.0f}"
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0e}"


def format_duration(seconds: float) -> str:
    """Seconds to "41s", "2m41s", "12h03m", "3d04h"; "?" for negative and non-finite values."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"
