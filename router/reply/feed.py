"""Text that comes in pieces, for parsers that are generators: they yield while they need more of it.

What a parser finds depends on the text alone and not on where it was cut: a decision waits until there is text enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

_Found = TypeVar("_Found")
Reading = Generator[None, None, _Found]

# Text that is kept as it may turn out to be no call. A name and what comes before it is far shorter.
MAX_KEPT_CHARS = 65_536
# Space before a mark that belongs to no text.
_MAX_SPACE_CHARS = 64
_SPACE = re.compile(r"\s*")
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_LITERAL = re.compile(r"[\w+.-]*")


class Malformed(Exception):
    """The text is not what the format expects here."""


class Feed:
    """The text that is not read yet, from ``at`` on; what is kept before that can still be given back."""

    __slots__ = ("_kept_at", "at", "is_over", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self._kept_at: int | None = None
        self.is_over = False

    def add(self, text: str) -> None:
        start = self.at if self._kept_at is None else self._kept_at
        self.text = self.text[start:] + text
        self.at -= start
        if self._kept_at is not None:
            self._kept_at = 0

    def keep(self) -> None:
        """From here on, until `release` or `give_back`."""
        self._kept_at = self.at

    def release(self) -> None:
        """What was kept is what it seemed to be."""
        self._check_kept()
        self._kept_at = None

    def give_back(self) -> str:
        """What was kept, which counts as read."""
        if self._kept_at is None:
            return ""
        self.at = min(self.at, self._kept_at + MAX_KEPT_CHARS)
        kept = self.text[self._kept_at : self.at]
        self._kept_at = None
        return kept

    def rewind(self) -> None:
        """What was kept is still to be read."""
        if self._kept_at is not None:
            self.at, self._kept_at = self._kept_at, None

    @property
    def is_kept(self) -> bool:
        return self._kept_at is not None

    def more(self) -> Reading[bool]:
        """Waits for more text; False if there is none to come."""
        self._check_kept()
        if self.is_over:
            return False
        yield
        return True

    def _check_kept(self) -> None:
        if self._kept_at is not None and self.at - self._kept_at > MAX_KEPT_CHARS:
            raise Malformed

    def rest(self) -> str:
        """All that is here, which counts as read."""
        found = self.text[self.at :]
        self.at = len(self.text)
        return found

    def space(self) -> Reading[None]:
        """Reads white space."""
        yield from self._matching(_SPACE)

    def take(self, word: str) -> Reading[bool]:
        """Reads a word if it comes next."""
        while len(self.text) - self.at < len(word) and word.startswith(self.text[self.at :]):
            if not (yield from self.more()):
                break
        is_here = self.text.startswith(word, self.at)
        self.at += len(word) * is_here
        return is_here

    def expect(self, word: str) -> Reading[None]:
        if not (yield from self.take(word)):
            raise Malformed

    def matching(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Reads characters as long as the pattern, which matches any number of some, takes them."""
        found: list[str] = []
        yield from self._matching(pattern, found.append)
        return "".join(found)

    def _matching(self, pattern: re.Pattern[str], emit: Callable[[str], None] | None = None) -> Reading[None]:
        while True:
            match = pattern.match(self.text, self.at)
            if match is not None:
                if emit is not None:
                    emit(match[0])
                self.at = match.end()
            if self.at < len(self.text) or not (yield from self.more()):
                return

    def until(self, marks: Sequence[str], emit: Callable[[str], None], space: str) -> Reading[str | None]:
        """Emits text up to the first of the marks, which is read and returned; None at the end of all text.

        Characters of ``space`` before the mark are not emitted; from them on, the text is kept.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark, self.at)) >= 0]
            at, mark = min(found) if found else (len(self.text) - _overlap(self.text[self.at :], marks), None)
            certain = max(len(self.text[self.at : at].rstrip(space)) + self.at, at - _MAX_SPACE_CHARS)
            if certain > self.at:
                emit(self.text[self.at : certain])
                self.at = certain
            if mark is not None:
                self.keep()
                self.at = at + len(mark)
                return mark
            if not (yield from self.more()):
                if rest := self.rest():
                    emit(rest)
                return None

    def value(self, emit: Callable[[str], None]) -> Reading[None]:
        """Emits a JSON value as it is written: a string, a list, an object, or a number or word. It is followed to its
        last quote or bracket, and not checked. Raises Malformed if it does not end."""
        if (yield from self.next_character()) not in ('"', "{", "["):
            literal = yield from self.matching(_LITERAL)
            if not literal:
                raise Malformed
            emit(literal)
            return
        scan = _ValueScan()
        while True:
            start, self.at = self.at, scan.end(self.text, self.at)
            if self.at > start:
                emit(self.text[start : self.at])
            if scan.is_over:
                return
            if not (yield from self.more()):
                raise Malformed

    def next_character(self) -> Reading[str]:
        """It is not read; empty at the end of all text."""
        while self.at == len(self.text) and (yield from self.more()):
            pass
        return self.text[self.at : self.at + 1]


class _ValueScan:
    """Where a JSON string, list or object ends, in text that comes in pieces."""

    __slots__ = ("_depth", "_in_string", "_is_escaped", "is_over")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_over = False

    def end(self, text: str, at: int) -> int:
        """The value's end, or that of the text."""
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            self._step(found[0])
            if self._depth <= 0 and not self._in_string:
                self.is_over = True
                return at
        return at

    def _step(self, character: str) -> None:
        if character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if character in "{[" else -1


def _overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of the text that is a proper beginning of a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        end = text[-length:]
        if any(length < len(mark) and mark.startswith(end) for mark in marks):
            return length
    return 0
