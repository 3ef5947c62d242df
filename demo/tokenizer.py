"""Builds the demo tokenizer: byte-level BPE in which every word of the demo is one token and any text round-trips."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from demo.words import DAYS, FRAME, LETTERS, MONTHS, NAMES, NUMBERS, OPENERS, THINGS

EOS = "<|eos|>"
SPECIAL_TOKENS = (EOS, "<|system|>", "<|user|>", "<|assistant|>")

# Turns are trimmed, so that a reply in the next request has the tokens with which it was generated. Tools and calls are
# written as Hermes models write them. The model has not learned them: it calls a tool where the request requires it.
CHAT_TEMPLATE = (
    "{%- if tools -%}"
    "{{ '<|system|>Tools:' }}{%- for tool in tools -%}{{ '\\n' ~ tool | tojson }}{%- endfor -%}"
    '{{ \'\\nA call:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>\' }}'
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{%- if message['content'] -%}{{ ' ' + message['content'] | trim }}{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ '<tool_call>\\n{\"name\": ' ~ call['function']['name'] | tojson ~ ', \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson ~ '}\\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ '<|eos|>' }}"
    "{%- else -%}"
    "{{ '<|' ~ ('user' if message['role'] == 'tool' else message['role']) ~ '|>' ~ message['content'] | trim }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def _words() -> list[str]:
    inside = [*FRAME, *NAMES, *THINGS, *DAYS, *MONTHS, *LETTERS, *NUMBERS]
    return [*OPENERS, *(f" {word}" for word in dict.fromkeys(inside))]


def _bpe(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that make one token of each word.

    Words are added one after another: the pieces that earlier merges leave of a word are joined from the left. A later
    merge has a lower rank, so it never changes how an earlier word is split.
    """
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = list(byte_level.pre_tokenize_str(word)[0][0])
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            known = [pair for pair in pairs if pair in ranks]
            left, right = min(known, key=ranks.__getitem__) if known else pairs[0]
            if not known:
                ranks[left, right] = len(ranks)
                tokens.append(left + right)
            merged: list[str] = []
            for part in parts:
                is_pair = bool(merged) and (merged[-1], part) == (left, right)
                merged[-1:] = [left + right] if is_pair else [*merged[-1:], part]
            parts = merged
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, list(ranks)


def build(vocab_size: int = 0) -> Tokenizer:
    """The tokenizer; the same words give the same ids. Unused tokens pad it to ``vocab_size``."""
    vocab, merges = _bpe(_words())
    for i in range(len(vocab), vocab_size):
        vocab[f"\u0120unused{i}"] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja in transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
