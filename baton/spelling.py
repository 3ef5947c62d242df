"""What was probably meant by a name that does not exist: by spelling alone."""

from __future__ import annotations

from collections.abc import Iterable

# A comparison takes time with the product of both lengths; no name that exists is longer.
_MAX_LETTERS = 100


def meant(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known names that one slip for every three letters turns into ``word``, or ""."""
    bare = word.lstrip("-")
    if len(bare) > _MAX_LETTERS:
        return ""
    distances = {name: _distance(bare, name.lstrip("-")) for name in known if name.startswith("-") == (word[:1] == "-")}
    nearest = min(distances.values(), default=0)
    if nearest > max(1, len(bare) // 3):
        return ""
    near = [name for name, distance in distances.items() if distance == nearest]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _distance(a: str, b: str) -> int:
    """Letters changed, left out, put in, or swapped with their neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        oldest, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                cost = min(cost, oldest[j - 2] + 1)
            row.append(cost)
    return row[-1]
