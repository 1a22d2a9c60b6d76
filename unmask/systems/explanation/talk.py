"""Words about how far something is."""

from __future__ import annotations

import time


def rate(done: int, total: int, started: float, unit: str = "masks") -> str:
    """``128 of 512 masks, 40 a second, 10 s left``. started: ``time.monotonic()`` at the beginning."""
    speed = done / max(time.monotonic() - started, 1e-6)
    left = (total - done) / max(speed, 1e-9)
    shown = f"{left / 60:.0f} min" if left >= 120 else f"{left:.0f} s"
    pace = f"{speed:.0f} a second" if speed >= 10 else f"{speed:.1f} a second"
    return f"{done} of {total} {unit}, {pace}, {shown} left"
