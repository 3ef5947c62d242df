"""Parts of SVG pictures: texts, the frame of a document, round steps for axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#1c1e21}.bold{font-weight:600}.soft{fill:#5d636b}"
    ".in{fill:#fff;font-size:10px}.end{text-anchor:end;fill:#5d636b}.middle{text-anchor:middle;fill:#5d636b}"
)


def document(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """``label`` is read to those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def text(x: float, y: float, said: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(said)}</text>'


def round_step(length: float, most: int = 10) -> float:
    """1, 2 or 5 times a power of ten, so that at most so many fit."""
    power = 10.0 ** math.floor(math.log10(length / (most / 2)))
    return next(power * factor for factor in (1, 2, 5, 10) if length / (power * factor) <= most)
