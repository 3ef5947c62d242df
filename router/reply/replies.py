"""How one model's replies are read: which requests it can serve, and a reader for each choice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.errors import InvalidRequest, quoted
from router.reply.forced import reply_grammar
from router.reply.formats import MARKS, THINK_BEGIN, THINK_END, CallFormat, ReplyFormat
from router.reply.parser import ReplyParser
from router.text.chat import Conversation
from router.text.deltas import ContentText
from router.text.detokenizer import Part
from router.text.tokenizer import Tokenizer

# Tokens at the end of a prompt that show whether it has opened the reasoning.
_PROMPT_END_TOKENS = 16


class Replies:
    """Of the served model."""

    def __init__(self, form: ReplyFormat, tokenizer: Tokenizer) -> None:
        self.form = form
        self._tokenizer = tokenizer
        # Special tokens that readers need to see.
        self.shown_ids = tuple(i for mark in sorted(MARKS) if (i := tokenizer.token_id(mark)) in tokenizer.special_ids)

    def check(self, conversation: Conversation) -> None:
        """Raises InvalidRequest for tools that cannot be served."""
        choice, names = conversation.tool_choice, [tool.name for tool in conversation.tools]
        if conversation.requires_calls and not names:
            raise InvalidRequest("tool_choice requires a call, but there are no tools", param="tool_choice")
        known = set(names)
        for name in choice.names:
            if name not in known:
                raise InvalidRequest(
                    f"tool_choice names {quoted(name)}, expected one of the tools", param="tool_choice"
                )
        if len(known) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InvalidRequest(f"tools has {quoted(twice)} twice, expected each name once", param="tools")
        if conversation.has_tools and self.form.calls is None:
            raise InvalidRequest(
                "the model's chat template shows no format of tool calls that the server knows; the setting "
                "--tool-call-parser names one",
                param="tools",
            )

    def reader(self, conversation: Conversation, prompt_token_ids: Sequence[int], salt: str) -> ReplyReader | None:
        """None where all output is content. ``salt``: of this choice alone; its calls have the same ids whenever it is
        read."""
        calls = self.form.calls if conversation.has_tools else None
        if calls is None and self.form.reasoning is None:
            return None
        parser = ReplyParser(
            calls=calls,
            reasoning=self.form.reasoning,
            prompt_end=self._prompt_end(conversation, prompt_token_ids),
            tools=conversation.tools,
            max_calls=None if conversation.tool_choice.is_parallel else 1,
            new_id=_call_ids(f"{salt}/{len(conversation.messages)}", is_short=calls is CallFormat.MISTRAL),
        )
        return ReplyReader(parser, counts_reasoning=self.form.reasoning is not None)

    def grammar(self, conversation: Conversation, prompt_token_ids: Sequence[int], answer: str) -> str:
        """Of the whole reply: it has the calls that are required, or its answer follows the grammar ``answer``."""
        prompt_end = self._prompt_end(conversation, prompt_token_ids)
        return reply_grammar(self.form, conversation, prompt_end, self._tokenizer, answer)

    def _prompt_end(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        """What shows whether the prompt has opened the reasoning."""
        if conversation.continues_final:
            said = conversation.messages[-1].last_text
            return THINK_BEGIN if said.rfind(THINK_BEGIN) > said.rfind(THINK_END) else THINK_END
        return self._tokenizer.decode(token_ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False).rstrip()


class ReplyReader:
    """One choice: its parts with what they say."""

    __slots__ = ("_num_tokens", "_parser", "_tail", "counts_reasoning")

    def __init__(self, parser: ReplyParser, *, counts_reasoning: bool) -> None:
        self._parser = parser
        # While the end of reasoning has not come; parts then need the texts of their tokens.
        self.counts_reasoning = counts_reasoning
        self._num_tokens = 0
        self._tail = ""

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    @property
    def num_reasoning_tokens(self) -> int:
        """With the mark at its end."""
        return self._num_tokens if self._parser.has_reasoned else 0

    def read(self, part: Part, *, is_last: bool) -> Part:
        if self.counts_reasoning:
            self._count(part.token_texts)
        deltas = self._parser.push(part.text)
        if is_last:
            deltas += self._parser.close()
        text = "".join(delta.text for delta in deltas if isinstance(delta, ContentText))
        return replace(part, text=text, deltas=deltas)

    def _count(self, token_texts: Sequence[str]) -> None:
        for text in token_texts:
            self._num_tokens += 1
            self._tail += text
            if THINK_END in self._tail:
                self.counts_reasoning = False
                return
            self._tail = self._tail[-len(THINK_END) :]


def _call_ids(salt: str, *, is_short: bool) -> Callable[[], str]:
    """Mistral's templates take ids of nine letters and digits."""
    num_calls = 0

    def new() -> str:
        nonlocal num_calls
        digest = hashlib.blake2b(f"{salt}/{num_calls}".encode(), digest_size=12).hexdigest()
        num_calls += 1
        return digest[:9] if is_short else f"call_{digest}"

    return new
