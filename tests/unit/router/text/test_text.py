"""Tokens to text and back: characters are never halved, stop strings never leak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from baton.chat import ChatMessage
from baton.errors import BadConfig, InvalidRequest, UnsupportedModel
from router.text.chat import ChatTemplate, Conversation
from router.text.detokenizer import StopFinder, TextStream
from router.text.model_files import load_facts
from router.text.tokenizer import Tokenizer
from tests.support.router import VOCAB_SIZE, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


def streamed(stream: TextStream, token_ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces of text as they come when tokens come in chunks of these sizes."""
    pieces, at = [], 0
    for size in [*sizes, len(token_ids)]:
        pieces.append(stream.push(token_ids[at : at + size]).text)
        at += size
    return [*pieces, stream.flush().text]


IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)
SIZES = st.lists(st.integers(1, 5), max_size=40)


@given(ids=IDS, sizes=SIZES)
def test_any_tokens_in_any_chunks_give_the_tokenizers_own_text(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int]
) -> None:
    for skip in (True, False):
        pieces = streamed(TextStream(tokenizer, skip_special_tokens=skip), ids, sizes)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30), sizes=SIZES)
def test_valid_text_never_shows_a_broken_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    text = text.replace("\ufffd", "")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    pieces = streamed(TextStream(tokenizer), ids, sizes)
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


def test_window_detokenizer_for_sentencepiece_like_tokenizers() -> None:
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"▁hello": 256, "▁world": 257, "!": 258}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(inner)
    assert tokenizer.byte_table is None
    ids = [256, 257, 258, *"é🎽".encode(), 256]
    pieces = streamed(TextStream(tokenizer), ids, [1] * len(ids))
    assert "".join(pieces) == "hello world!é🎽 hello"
    assert not any("\ufffd" in p for p in pieces)
    assert tokenizer.token_name(256) == " hello"
    assert tokenizer.token_bytes(0xC3) == b"\xc3"


@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_finder_lets_nothing_of_a_stop_string_out(text: str, stops: list[str]) -> None:
    finder, out, hit = StopFinder(stops, include=False), "", None
    for character in text:
        piece, hit = finder.push(character)
        out += piece
        if hit is not None:
            break
    else:
        out += finder.flush()
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (out, hit) == (text, None)
    else:
        assert hit in stops
        whole = text[: min(ends)]
        assert whole.endswith(hit)
        assert not any(s in out for s in stops)
        assert whole.startswith(out)


def test_stop_string_over_token_borders_and_its_token_count(tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode("alpha STOP beta", add_special_tokens=False))
    for include, expected in ((False, "alpha "), (True, "alpha STOP")):
        stream = TextStream(tokenizer, stops=["STOP"], include_stop=include)
        part = stream.push(ids)
        assert (part.text, part.stop) == (expected, "STOP")
        assert tokenizer.decode(part.token_ids, skip_special_tokens=True) == "alpha STOP"


def test_stop_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi", add_special_tokens=False), 300]
    assert TextStream(tokenizer, stop_token_ids=(300,)).push(ids).text == "hi"
    assert TextStream(tokenizer, stop_token_ids=(300,), include_stop=True).push(
        ids
    ).text == "hi" + tokenizer.token_bytes(300).decode("utf-8", "replace")


def test_folder_facts(folder: Path, tmp_path: Path) -> None:
    assert load_facts(folder).eos_token_ids == (1,)
    assert load_facts(folder).max_model_tokens == 4096
    assert load_facts(tmp_path).eos_token_ids == ()
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_facts(tmp_path)
    for key, value in (("eos_token_id", ["2"]), ("eos_token_id", 1.5), ("max_position_embeddings", "long")):
        (tmp_path / "config.json").write_text(json.dumps({key: value}))
        with pytest.raises(UnsupportedModel, match=key):
            load_facts(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadConfig, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_template_from_its_own_file(folder: Path, tmp_path: Path) -> None:
    copy = write_model_folder(tmp_path / "m", chat_template="from config")
    (copy / "chat_template.jinja").write_text("from file")
    loaded = Tokenizer.load(copy)
    assert loaded is not None
    assert loaded.facts.chat_template == "from file"
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "chat_template.jinja").unlink()
    loaded = Tokenizer.load(copy)
    assert loaded is not None
    assert loaded.facts.chat_template == "d"


def test_chat_template_features() -> None:
    source = (
        "{%- for m in messages -%}{%- if m.role == 'system' %}{% continue %}{% endif -%}"
        "{{ m | tojson }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{%- endfor -%}"
        "{{ bos_token }}{{ strftime_now('%Y')[:2] }}{{ extra }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    messages = (ChatMessage("system", "no"), ChatMessage("user", " <é> "))
    text = template.render(Conversation(messages, variables={"extra": "!"}))
    assert text == '{"role": "user", "content": " <é> "}<é><s>20!'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ],
)
def test_chat_template_is_sandboxed_and_refuses_clearly(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(source, {}).render(Conversation((ChatMessage("user", "x"),)))
    assert refused.value.param == "messages"


def test_broken_template_stops_the_start() -> None:
    with pytest.raises(BadConfig):
        ChatTemplate("{% if %}", {})
