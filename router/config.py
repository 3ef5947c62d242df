"""The router's settings: frozen, checked on construction, wrong values named."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from baton.access import AccessConfig, is_loopback
from baton.address import is_anywhere, parse_address
from baton.api_keys import ApiKey
from baton.errors import BadConfig, quoted
from baton.faults.config import FaultsConfig
from baton.names import check_model_name
from baton.registry import RegistryConfig
from baton.settings import check, computed, setting
from baton.types import MAX_SLO_S, Slo
from router.cluster.config import PolicyConfig
from router.cluster.membership import MembershipConfig
from router.flow.config import FlowConfig
from router.grammar.check import GrammarConfig
from router.reply.formats import AUTO, NONE, CallFormat, ReasoningFormat

# Of the commands. A router in another program takes any free port.
HTTP_PORT = 8000
# Scheme, host and port, as browsers send it.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
GRPC_PORT = 50051


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    # Sequences that wait for a placement; one more is refused with Overloaded.
    max_queued: int = 1024
    # Sequences in flight, queued ones included.
    max_active: int = 8192
    # Beside others, one client (an API key, or an address where there are no keys) may hold this share of both; so
    # much more is for clients that have less than that when one has all.
    max_client_share: float = field(default=0.5, metadata=setting(most=1))
    # Sequences of one client that run at once while others are there, for each node that generates; the rest waits in
    # the router. Every step computes all of a node's sequences, so one client's many make another's tokens slow.
    max_client_running: int = 8
    # A client has the nodes to itself when no other client has had anything here for so long: short, since a
    # monitor's probe every few seconds is a client too.
    client_alone_s: float = 2.0
    # Choices of one request (n times the number of prompts). OpenAI takes 128 too; turns bound what they cost others.
    max_choices: int = 128
    # Of one body, whatever the model. Below that a body may have what the context can need: so many bytes for each of
    # its tokens (English has 4.5, escaped CJK 9), and so many at least, as several prompts may come at once.
    max_body_bytes: int = 32 * 1024 * 1024
    body_bytes_per_token: int = 32
    least_body_bytes: int = 4 * 1024 * 1024
    # Of all bodies that are being read or tokenized.
    max_bodies_bytes: int = 64 * 1024 * 1024
    # Parts of a body's JSON. A parser holds up every stream for 30 ns a value or an escaped character, 0.3 us a text,
    # 2 us a list or object. Of values and escapes there may always be two for each token of the context.
    max_body_values: int = 300_000
    max_body_escapes: int = 400_000
    max_body_texts: int = 32_768
    max_body_containers: int = 8192
    # Threads that parse, render and tokenize large requests, and how many of those may run and wait.
    num_offload_threads: int = 2
    max_offloaded: int = 64
    # Characters or ids of prompts that an answer may repeat over all of its choices (echo, return_token_ids).
    max_repeated: int = 2_000_000
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    # Longest prompt, in characters for each token of the context, where the tokenizer proves no bound itself.
    prompt_chars_per_token: int = 64
    # Of a request that says none.
    default_timeout_s: float = 600.0
    # The longest that a request may ask for.
    max_timeout_s: float = 3600.0
    # A client that takes no byte for so long is gone. One that takes a little now and then is only slow.
    write_timeout_s: float = 60.0
    # What may wait for one slow reader, which is a whole answer of 4,000 tokens with 20 logprobs each, and for all of
    # them. A sequence with more waiting fails.
    max_stream_bytes: int = 1024 * 1024
    max_unread_bytes: int = 256 * 1024 * 1024
    # An answer that is not streamed, with all of its choices, while it is put together.
    max_answer_bytes: int = 64 * 1024 * 1024
    # Connections of clients over HTTP; fewer if the process may not open so many files. When all are taken, the one
    # that has been without a request for longest makes room.
    max_connections: int = 4096
    # From the connection, or the first byte of its next request, to the end of the request's head.
    head_timeout_s: float = 10.0
    # A connection between two requests is kept for so long.
    keep_alive_s: float = 30.0
    max_head_bytes: int = 64 * 1024
    max_headers: int = 128
    # New requests are refused at once when no node has been available for so long.
    refuse_after_s: float = 2.0
    # How long tokens of many streams may be held back to leave in one chunk when the process is behind.
    max_hold_s: float = 0.05
    # Work in pieces (tokens of many streams, long answers, placing what waits) leaves the rest to the event loop's next
    # turn after so long: sessions, `/health` and first tokens come in between.
    max_turn_s: float = 0.01
    # Running requests get this long to end on their own at shutdown.
    drain_s: float = field(
        default=5.0,
        metadata=setting(
            "--grace",
            "Seconds that running work may take to end after SIGTERM.",
            least=0.1,
            most=86_400,
            up_flag=False,
        ),
    )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Responses that are kept for clients that fetch or continue them (`/v1/responses`), in this router's memory."""

    # 0: none are kept.
    max_responses: int = field(default=10_000, metadata=setting(least=0))
    # With their conversations; about 100,000 turns of usual length.
    max_bytes: int = 256 * 1024 * 1024
    # Since the last use. A conversation is seldom continued on another day.
    max_age_s: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class LinkConfig:
    # From dialling a node to its welcome.
    connect_timeout_s: float = 5.0
    # Messages waiting to be sent to one node; a node that falls so far behind is broken.
    max_unsent: int = 8192
    ledger_timeout_s: float = 3.0
    max_message_bytes: int = 64 * 1024 * 1024
    # Nodes end a session over a longer message, and all its sequences with it: longer requests are refused.
    max_sent_bytes: int = 15 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SloConfig:
    """What a request is to be served within that says nothing itself."""

    ttft_s: float | None = field(
        default=None,
        metadata=setting(
            "--slo-ttft-ms",
            "Objective for the time to the first token, of requests without one of their own. 0: none.",
            unit=1e-3,
            none=0,
            most=MAX_SLO_S * 1e3,
        ),
    )
    tbt_s: float | None = field(
        default=None,
        metadata=setting(
            "--slo-tbt-ms",
            "Objective for the mean time between two tokens, of requests without one of their own. 0: none.",
            unit=1e-3,
            none=0,
            most=MAX_SLO_S * 1e3,
        ),
    )

    @property
    def default(self) -> Slo:
        return Slo(self.ttft_s, self.tbt_s)


@dataclass(frozen=True, slots=True)
class WatchConfig:
    # The registry is asked so often, beside whenever it announces a change.
    poll_s: float = 1.0


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Raises BadConfig, naming the setting, for a value that cannot be served."""

    nodes: tuple[str, ...] = field(
        default=(), metadata=setting("--node", "host:port of a worker; once for each.", up_file=False)
    )
    # Where more workers are registered.
    registry: RegistryConfig = field(default_factory=RegistryConfig, metadata=setting(up_file=False))
    # How workers and this router know each other, and its certificate for clients.
    access: AccessConfig = field(default_factory=AccessConfig, metadata=setting(up_file=False))
    http_host: str = field(default="127.0.0.1", metadata=computed())
    # 0 asks for any free port; None turns the face off.
    http_port: int | None = field(default=0, metadata=setting(least=0, most=65535, is_key=False))
    grpc_host: str = field(default="127.0.0.1", metadata=computed())
    grpc_port: int | None = field(default=0, metadata=setting(least=0, most=65535, is_key=False))
    # Folder with tokenizer.json and the model's JSON files. None: token ids only.
    model_folder: Path | None = field(default=None, metadata=computed())
    # None: the folder's, else the one that the nodes say.
    model_names: tuple[str, ...] = field(
        default=(),
        metadata=setting(
            "--model-name",
            "What the API calls the model; may be given more than once: a request may have any of the names, answers "
            "and metrics have the first. Default: the folder's name or the hub id.",
            aliases=("--served-model-name",),
            up_file=False,
        ),
    )
    # With the files beside it. Empty: the model's.
    tokenizer: str = field(
        default="",
        metadata=setting("--tokenizer", "A folder or hub id with another tokenizer.json. Default: the model's folder."),
    )
    chat_template: str = field(
        default="",
        metadata=setting(
            "--chat-template", "A file with another chat template, or the template itself. Default: the tokenizer's."
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=setting(
            "--seed",
            "Requests without a seed draw theirs from this one, in the order they come: the same requests one after "
            "the other have the same answers after a restart. Default: no request is like another.",
            least=0,
            most=2**63 - 1,
        ),
    )
    # Any of them lets a client in. None: the API asks for no key.
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata=setting(
            "--api-key",
            "Clients must give one of these as `Authorization: Bearer KEY`; may be given more than once. "
            "NAME:WEIGHT=KEY: beside others it gets so much more of the work than a key of weight 1. "
            "NAME:WEIGHT/REQUESTS/SEQUENCES=KEY: it may send so many requests a minute and have so many sequences at "
            "once; 0: no limit.",
            variable="BATON_API_KEY",
        ),
    )
    # Clients' keys do not open what is the operators' to do.
    admin_key: str = field(
        default="",
        repr=False,
        metadata=setting(
            "--admin-key",
            "A secret of the operators, as `Authorization: Bearer KEY`: it opens drain, roles, ledgers, prefix caches, "
            "traces and the status page's data, which no client's key does. Without it they are closed where there are "
            "API keys, else open.",
            variable="BATON_ADMIN_KEY",
        ),
    )
    # A page in a browser may ask whatever answers it, so none may unless the operator says so.
    allowed_origins: tuple[str, ...] = field(
        default=(),
        metadata=setting(
            "--allowed-origins",
            "Web pages of this origin, such as https://chat.example.com, may use the HTTP API; may be given more than "
            "once. *: pages of every origin may. Default: none.",
        ),
    )
    # A tenant that can hit another's blocks can tell by the time what the other's prompts begin with.
    prefix_cache_scope: str = field(
        default="auto",
        metadata=setting(
            "--prefix-cache-scope",
            "key: only requests of one API key share the KV of prompts that begin alike. all: requests of all keys do. "
            "auto: key where there are API keys, else all.",
            choices=("auto", "key", "all"),
        ),
    )
    # The end-of-sequence ids of generation_config.json count in any case.
    generation_config: str = field(
        default="auto",
        metadata=setting(
            "--generation-config",
            "auto: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens of the model's "
            "generation_config.json hold where a request says nothing. none: the API's own defaults.",
            choices=("auto", "none"),
            synonyms=(("vllm", "none"),),
        ),
    )
    ignore_unknown_fields: bool = field(
        default=False,
        metadata=setting(
            "--ignore-unknown-fields",
            "Leave out fields of a request's body that no API has, and log each name once, instead of refusing them: a "
            "misspelled one has no effect then.",
        ),
    )
    tool_call_parser: str = field(
        default=AUTO,
        metadata=setting(
            "--tool-call-parser",
            "The format in which the model writes tool calls. auto: the one that its chat template shows. none: "
            "requests with tools are refused.",
            choices=(AUTO, *(form.value for form in CallFormat), NONE),
        ),
    )
    reasoning_parser: str = field(
        default=AUTO,
        metadata=setting(
            "--reasoning-parser",
            "The format in which the model reasons before it answers. auto: the one that its chat template shows. "
            "none: reasoning is part of the answer's text.",
            choices=(AUTO, *(form.value for form in ReasoningFormat), NONE),
        ),
    )
    vllm_metrics: bool = field(
        default=True,
        metadata=setting(
            "--vllm-metrics/--no-vllm-metrics", "Show a subset under vLLM's names as well.", up_flag=False
        ),
    )
    # Needs the extra `otel`.
    otel: bool = field(
        default=False,
        metadata=setting(
            "--otel",
            "Make OpenTelemetry spans of requests; the OTEL_* variables say where they go.",
            variable="BATON_OTEL",
        ),
    )
    # Written once, when both faces are bound: {"http", "grpc", "pid"}.
    ready_file: Path | None = field(default=None, metadata=setting(up_file=False))
    # Write it only when every listed node is up.
    ready_needs_nodes: bool = field(default=False, metadata=setting(up_file=False))
    # Two live routers must not share one: a node ends the older session of the same router.
    router_id: str = field(default_factory=lambda: f"router-{secrets.token_hex(4)}")
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    grammar: GrammarConfig = field(default_factory=GrammarConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata=setting(up_file=False))

    def __post_init__(self) -> None:
        check(self)
        if not self.nodes and not self.registry.is_used:
            message = "no workers are named: give --node HOST:PORT once for each, or --registry redis://HOST:PORT"
            raise BadConfig(message, param="nodes")
        for name in self.model_names:
            check_model_name(name, "model_names")
            _expect(self.model_names.count(name) == 1, "model_names", name, "each name once")
        for address in self.nodes:
            host, _ = parse_address(address, "nodes", lowest_port=1)
            _expect(not is_anywhere(host), "nodes", address, "a host that can be dialled, the node's own")
            count = self.nodes.count(address)
            if count > 1:
                raise BadConfig(f"nodes has {address} {count} times, expected it once", param="nodes")
        secrets_given = [key.secret for key in self.client_keys]
        _expect(len(set(secrets_given)) == len(secrets_given), "api_keys", "(hidden)", "each key once")
        if self.admin_key:
            is_usable = self.admin_key.isascii() and self.admin_key.isprintable() and " " not in self.admin_key
            _expect_hidden(is_usable, "admin_key", "printable ASCII without spaces")
            _expect_hidden(self.admin_key not in secrets_given, "admin_key", "another key than those of clients")
        for origin in self.allowed_origins:
            expected = "* or an origin such as https://chat.example.com, without a path"
            _expect(_ORIGIN.fullmatch(origin) is not None, "allowed_origins", origin, expected)
        if self.prefix_cache_scope == "key":
            _expect(
                bool(self.api_keys), "prefix_cache_scope", "key", "API keys beside it (--api-key), else auto or all"
            )
        self.access.check_certificate()
        self._check_open()
        _expect(self.http_port is not None or self.grpc_port is not None, "http_port", None, "http or grpc, or both")
        if self.model_folder is not None:
            _expect(self.model_folder.is_dir(), "model_folder", str(self.model_folder), "a folder")
        _expect(self.membership.suspect_s < self.membership.lost_s, "membership.suspect_s", self.membership.suspect_s,
                f"less than lost_s ({self.membership.lost_s})")  # fmt: skip

    def _check_open(self) -> None:
        """Raises BadConfig if clients on other machines could do what is the operators' to do."""
        faces = {"http_host": (self.http_host, self.http_port), "grpc_host": (self.grpc_host, self.grpc_port)}
        for name, (host, port) in faces.items():
            is_reached = port is not None and not is_loopback(host)
            if is_reached and not (self.admin_key or self.api_keys or self.access.allow_open):
                raise BadConfig(
                    f"{name} is {quoted(host)}, where other machines reach this router, and every client could drain "
                    "its nodes: expected --admin-key (BATON_ADMIN_KEY), or --api-key (BATON_API_KEY) for clients as "
                    "well; or --allow-open",
                    param=name,
                )

    @property
    def client_keys(self) -> tuple[ApiKey, ...]:
        return tuple(map(ApiKey.parse, self.api_keys))

    @property
    def shares_between_keys(self) -> bool:
        """Whether prompts of different API keys may share KV."""
        return self.prefix_cache_scope == "all" or not self.api_keys


def _expect_hidden(ok: bool, name: str, expected: str) -> None:
    if not ok:
        raise BadConfig(f"{name} is '(hidden)', expected {expected}", param=name)


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise BadConfig(f"{name} is {quoted(value)}, expected {expected}", param=name)
