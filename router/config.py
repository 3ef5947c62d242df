"""The router's settings: frozen, checked on construction, wrong values named. Read nowhere but here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from baton.address import is_anywhere, parse_address
from baton.errors import BadConfig, quoted
from baton.names import check_cluster, check_model_name
from baton.registry import RegistryConfig
from router.cluster.membership import MembershipConfig
from router.cluster.policy import PolicyConfig
from router.flow import FlowConfig


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    # Sequences that wait for a placement; one more is refused with Overloaded.
    max_queued: int = 1024
    # Sequences in flight, queued ones included.
    max_active: int = 8192
    # Beside others, one client (an API key, or an address where there are no keys) may hold this share of both; so
    # much more is for clients that have less than that when one has all.
    max_client_share: float = 0.5
    # Sequences of one client that run at once while others are there, for each node that generates; the rest waits in
    # the router. Every step computes all of a node's sequences, so one client's many make another's tokens slow.
    max_client_running: int = 8
    # A client has the nodes to itself when nobody else has had anything here for so long: short, since a monitor's
    # probe every few seconds is a client too.
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
    default_timeout_s: float = 600.0
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
    drain_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LinkConfig:
    connect_timeout_s: float = 5.0
    # Messages waiting to be sent to one node; a node that falls so far behind is broken.
    max_unsent: int = 8192
    ledger_timeout_s: float = 3.0
    # When a node has ended one of its sessions in good order, the other may take so long to follow.
    goodbye_timeout_s: float = 1.0
    max_message_bytes: int = 64 * 1024 * 1024
    # Nodes end a session over a longer message, and all its sequences with it: longer requests are refused.
    max_sent_bytes: int = 15 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WatchConfig:
    # The registry is asked so often, beside whenever it announces a change.
    poll_s: float = 1.0


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Raises BadConfig, naming the setting, for a value that cannot be served."""

    # host:port of each worker; may be empty with a registry.
    nodes: tuple[str, ...] = ()
    # Where more workers are registered.
    registry: RegistryConfig | None = None
    # What the metrics say where no registry names the cluster.
    cluster: str = "default"
    http_host: str = "127.0.0.1"
    # 0 asks for any free port; None turns the face off.
    http_port: int | None = 0
    grpc_host: str = "127.0.0.1"
    grpc_port: int | None = 0
    # Any of them lets a client in; none: everybody may use the API.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    # Folder with tokenizer.json and the model's JSON files. None: token ids only.
    model_folder: Path | None = None
    # Name clients ask for. None: the folder's, else the one that the nodes say.
    model_name: str | None = None
    # "auto": the sampling defaults in the folder's generation_config.json hold where a request says nothing, as in
    # vLLM; "none": the API's own do. The end-of-sequence ids there count in any case.
    generation_config: str = "auto"
    # Make OpenTelemetry spans; needs the extra `otel`.
    otel: bool = False
    # Written once, when both faces are bound: {"http", "grpc", "pid"}.
    ready_file: Path | None = None
    # Write it only when every listed node is up.
    ready_needs_nodes: bool = False
    # Show a subset of the metrics under vLLM's names as well.
    vllm_metrics: bool = True
    # Two live routers must not share one: a node ends the older session of the same router.
    router_id: str = field(default_factory=lambda: f"router-{secrets.token_hex(4)}")
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        has_source = len(self.nodes) > 0 or self.registry is not None
        _check(has_source, "nodes", self.nodes, "at least one host:port, or a registry")
        check_cluster(self.cluster)
        if self.model_name is not None:
            check_model_name(self.model_name)
        _check(len(set(self.nodes)) == len(self.nodes), "nodes", self.nodes, "distinct addresses")
        for address in self.nodes:
            host, _ = parse_address(address, "nodes", lowest_port=1)
            _check(not is_anywhere(host), "nodes", address, "a host that can be dialled, the node's own")
        is_good = all(key and key.isascii() and not any(c.isspace() for c in key) for key in self.api_keys)
        _check(is_good, "api_keys", "(hidden)", "ASCII without spaces, and not empty")
        for name in ("http_port", "grpc_port"):
            port_number = getattr(self, name)
            _check(port_number is None or 0 <= port_number < 65536, name, port_number, "a port, 0 or None")
        _check(self.http_port is not None or self.grpc_port is not None, "http_port", None, "http or grpc, or both")
        if self.model_folder is not None:
            _check(self.model_folder.is_dir(), "model_folder", str(self.model_folder), "a folder")
        _check(self.generation_config in ("auto", "none"), "generation_config", self.generation_config, "auto or none")
        for part in (self.limits, self.link, self.flow, self.membership, self.policy, self.watch):
            for setting in fields(part):
                value = getattr(part, setting.name)
                name = f"{type(part).__name__}.{setting.name}"
                _check(isinstance(value, int | float) and value > 0, name, value, "a positive number")
        share = self.limits.max_client_share
        _check(share <= 1, "LimitsConfig.max_client_share", share, "a share above 0 and at most 1")
        _check(self.membership.suspect_s < self.membership.lost_s, "membership.suspect_s", self.membership.suspect_s,
               f"less than lost_s ({self.membership.lost_s})")  # fmt: skip

    @property
    def cluster_name(self) -> str:
        return self.cluster if self.registry is None else self.registry.cluster

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> RouterConfig:
        """From parsed JSON or the like, nested for the parts; an unknown key is refused with its source."""
        parts = {"limits": LimitsConfig, "link": LinkConfig, "flow": FlowConfig, "membership": MembershipConfig,
                 "policy": PolicyConfig, "watch": WatchConfig, "registry": RegistryConfig}  # fmt: skip
        known = {f.name for f in fields(cls)}
        settings: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise BadConfig(f"{source}: unknown setting {quoted(key)}, expected one of {sorted(known)}", param=key)
            if key in parts:
                unknown = set(value) - {f.name for f in fields(parts[key])}
                if unknown:
                    raise BadConfig(f"{source}: unknown settings {quoted(sorted(unknown))} in {quoted(key)}", param=key)
                value = parts[key](**value)
            elif key in ("nodes", "api_keys"):
                value = tuple(value)
            elif key in ("model_folder", "ready_file") and value is not None:
                value = Path(value)
            settings[key] = value
        return cls(**settings)


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise BadConfig(f"setting {name} is {quoted(value)}, expected {expected}", param=name)
