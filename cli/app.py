"""The commands that ask a cluster or look at this machine, and the entries of those that serve."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton import __version__
from baton.address import parse_address
from baton.api_keys import secret_of
from baton.client import Client, Options
from baton.errors import DeadlineExceeded, InvalidRequest, Unavailable
from baton.registry import RegistryConfig
from baton.settings import keys
from baton.types import MAX_PRIORITY, MIN_PRIORITY, Role
from cli import ask, bench, environment, plan, preflight
from cli.chaos.command import chaos
from cli.options import finite, path, plain
from cli.router import router
from cli.show import role_change, wide_console
from cli.up import up
from cli.usage import Commands, Serving, program
from cli.worker import worker
from router.config import GRPC_PORT

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve a language model on two pools: prefill nodes run prompts, decode nodes generate tokens.",
)

_DAY_S = 86_400.0
_MAX_INT32 = 2**31 - 1
_ROUTER = f"127.0.0.1:{GRPC_PORT}"
_CLUSTER = RegistryConfig().cluster
_REGISTRY = {key.path: key.about for key in keys(RegistryConfig)}

Router = Annotated[
    str, typer.Option("--router", "-r", envvar="BATON_ROUTER", help="host:port of the router's gRPC service.")
]
Relay = Annotated[bool, typer.Option("--relay", help="Print which nodes ran the request and how long each stage took.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=finite, help="0 always takes the likeliest token.")]
_MODELS_OWN = "Not given: the model's default."
TopP = Annotated[float | None, typer.Option(callback=finite, help=_MODELS_OWN)]
TopK = Annotated[int | None, typer.Option(min=0, max=_MAX_INT32, help=_MODELS_OWN)]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, max=_MAX_INT32)]
Registry = Annotated[
    str, typer.Option(envvar=_REGISTRY["url"].variable, show_envvar=True, help=plain(_REGISTRY["url"].help))
]
ClusterName = Annotated[
    str, typer.Option("--cluster", envvar=_REGISTRY["cluster"].variable, help=_REGISTRY["cluster"].help)
]
CacheSalt = Annotated[
    str, typer.Option(help="Only requests of the same salt share the KV of prompts that begin alike.")
]
Priority = Annotated[
    int,
    typer.Option(
        min=MIN_PRIORITY, max=MAX_PRIORITY, help="Of a client's waiting requests the smaller number is first."
    ),
]
ApiKey = Annotated[str, typer.Option(envvar="BATON_API_KEY", show_envvar=True, help="A key of the router's, if any.")]
AdminKey = Annotated[
    str, typer.Option(envvar="BATON_ADMIN_KEY", show_envvar=True, help="The router's admin key, if it has keys.")
]

for command in (up, worker, router, chaos):
    app.command(cls=Serving)(command)
app.command("serve", cls=Serving, help="As up: run a cluster on this machine, also with the options of `vllm serve`.")(
    up
)
app.add_typer(bench.app, name="bench")
app.add_typer(plan.app, name="plan")


class AskedRole(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    AUTO = "auto"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    router: Router = _ROUTER,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on to --max-tokens.")] = False,
    relay: Relay = False,
    cache_salt: CacheSalt = "",
    priority: Priority = 0,
    api_key: ApiKey = "",
) -> None:
    """Continue a text, as it comes."""
    console = Console()
    text = _standard_input() if prompt == "-" else prompt
    options = Options(stop=tuple(stop or ()), cache_salt=cache_salt, priority=priority)
    with _client(router, api_key) as client:
        finished = ask.generate(
            client, text, options, lambda part: ask.write_raw(console, part),
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos,
        )  # fmt: skip
    console.print()
    if relay:
        ask.print_relay(Console(stderr=True), finished)


@app.command()
def chat(
    router: Router = _ROUTER,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, max=_MAX_INT32, help=_MODELS_OWN)
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, callback=finite, help=_MODELS_OWN)] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    relay: Relay = False,
    cache_salt: CacheSalt = "",
    priority: Priority = 0,
    api_key: ApiKey = "",
) -> None:
    """Talk to the model; an empty line is ignored, Ctrl-C ends an answer, Ctrl-D ends the talk."""
    with _client(router, api_key) as client:
        ask.chat(
            client, Console(), Options(cache_salt=cache_salt, priority=priority), system=system, show_relay=relay,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        )  # fmt: skip


@app.command()
def status(
    router: Router = _ROUTER,
    ledger: Annotated[bool, typer.Option("--ledger", help="Also every block owner of every node.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.1, max=_DAY_S, callback=finite, help="Again every so many seconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Show nodes, roles, queues and blocks of a running cluster."""
    with _client(router, api_key, admin_key) as client, contextlib.suppress(KeyboardInterrupt):
        ask.show_status(client, wide_console(), with_ledger=ledger, as_json=as_json, watch_s=watch)


@app.command("cache")
def prefix_caches(
    drop: Annotated[bool, typer.Option("--drop", help="Have every node forget all of its blocks first.")] = False,
    router: Router = _ROUTER,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Show the prefix cache of every node, or drop them; exit code 1 if a node did not answer."""
    with _client(router, api_key, admin_key) as client:
        has_all = ask.show_caches(client, wide_console(), drop=drop, as_json=as_json)
    raise typer.Exit(0 if has_all else 1)


@app.command()
def trace(
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=path, metavar="PATH", help="Where to write it.")
    ] = Path("baton-trace.json"),
    last: Annotated[
        float,
        typer.Option(min=0.0, max=_DAY_S, callback=finite, help="Seconds back from now. 0: all that nodes keep."),
    ] = 10.0,
    router: Router = _ROUTER,
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Write what router and nodes did in the last seconds as a Chrome trace: steps, transfers, writes, requests."""
    from cli.trace import write

    preflight.writable_file(output, "--output")
    with _client(router, api_key, admin_key) as client:
        write(client, last, output, Console())


@app.command("drain")
def drain_node(
    node: Annotated[str, typer.Argument(help="Node id or host:port.")],
    router: Router = _ROUTER,
    grace: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=_DAY_S,
            callback=finite,
            help="Seconds until what still runs is cut off. 0: the node's own --grace.",
        ),
    ] = 0.0,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct",
            help="Ask the worker at host:port itself, not a router; BATON_CLUSTER_KEY has the key of its cluster.",
        ),
    ] = False,
    wait: Annotated[bool, typer.Option(help="Return only when the node has left.")] = True,
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Let a worker finish what it has and leave; it gets nothing new, and no request fails."""
    from cli import draining

    console = Console(soft_wrap=True)
    if direct:
        parse_address(node, "NODE", lowest_port=1)
        draining.drain_directly(node, grace, console, environment.access(), waits=wait)
        return
    with _client(router, api_key, admin_key) as client:
        draining.drain(client, node, grace, console, waits=wait)


@app.command("role")
def set_role(
    node: Annotated[str, typer.Argument(help="Node id or host:port.")],
    role: Annotated[
        AskedRole,
        typer.Argument(help="The pool that it belongs to from now on; auto: where it started or schedulers put it."),
    ],
    router: Router = _ROUTER,
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Put a worker into another pool without a restart; what it has goes on, and no request fails."""
    with _client(router, api_key, admin_key) as client:
        answer = client.set_role(node, None if role is AskedRole.AUTO else Role(role.value)).role
    Console(soft_wrap=True).print(role_change(answer), markup=False, highlight=False)


@app.command()
def profile(
    router: Router = _ROUTER,
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=path, metavar="FILE", help="The profile, for the planner.")
    ] = Path("profile.json"),
    api_key: ApiKey = "",
    admin_key: AdminKey = "",
) -> None:
    """Measure steps and transfers of an idle cluster by requests of chosen shapes; write a profile for the planner."""
    from cli.profile import Shapes
    from cli.profile import profile as measure

    preflight.writable_folder(out.resolve().parent, "--out")
    parse_address(router, "--router", lowest_port=1)
    measure(router, admin_key or api_key, out, Shapes(), wide_console())


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of a worker or router (gRPC).")],
    live: Annotated[bool, typer.Option("--live", help="Whether it is well, rather than ready for work.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=_DAY_S, callback=finite, help="Seconds.")] = 3.0,
) -> None:
    """Exit code 0 if a process is healthy, 1 if not: for containers and scripts."""
    from cli.draining import check_health

    parse_address(address, "ADDRESS", lowest_port=1)
    answer = check_health(address, environment.access(), live=live, timeout_s=timeout)
    Console(soft_wrap=True).print(answer or "healthy", markup=False, highlight=False)
    raise typer.Exit(1 if answer else 0)


@app.command()
def certs(
    folder: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="Where they go; an authority in it signs.")
    ],
    host: Annotated[
        list[str],
        typer.Option(
            help="Name or address of a process, or several joined by commas; once for each certificate.",
            metavar="NAME[,NAME...]",
        ),
    ],
    days: Annotated[int, typer.Option(min=1, max=36_500, help="How long they are valid.")] = 365,
) -> None:
    """Make an authority of your own and certificates for TLS between processes and towards clients."""
    from cli.certs import CA_CERT, make

    console = Console(soft_wrap=True)
    for cert in make(folder, host, days):
        own = f"--tls-cert {cert} --tls-key {cert.with_suffix('.key')} --tls-ca {folder / CA_CERT}"
        console.print(own, markup=False, highlight=False)


@app.command()
def doctor(
    model: Annotated[str, typer.Option("--model", "-m", help="Also look at this model.")] = "",
    registry: Registry = "",
    cluster_name: ClusterName = _CLUSTER,
) -> None:
    """Say what is installed, what will be used, and what is missing; exit code 1 if this machine cannot serve."""
    from cli.doctor import examine, report

    raise typer.Exit(report(examine(model, registry, cluster_name), wide_console()))


@app.command("try-kernels", hidden=True)
def try_kernels(device: Annotated[str, typer.Option()] = "auto") -> None:
    """`doctor`'s child: one small kernel, compiled and run."""
    from cli.trial import run

    typer.echo(run(device))


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="Your own model instead of the demo's.")] = "",
) -> None:
    """Start 1 router, 2 prefill and 2 decode workers, send prompts through both APIs, show the relay, stop."""
    preflight.worker_packages()
    from cli.demo import run

    raise typer.Exit(run(model, Console()))


def _standard_input() -> str:
    if sys.stdin is None:
        raise InvalidRequest("standard input is closed, expected the prompt there")
    try:
        return typer.get_text_stream("stdin").read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}: {error.reason}") from error


# What gRPC says when nothing answers.
_NO_ANSWER_IN_TIME = "Deadline Exceeded"
_NOTHING_THERE = ("failed to connect", "DNS resolution failed", "errors resolving")


# What gRPC says of a port that answers and does not talk of TLS as we do.
_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
_NO_TLS = "WRONG_VERSION_NUMBER"
_OTHER_PROTOCOL = ("Socket closed", "missing selected ALPN")


def _hint(address: str, message: str) -> str:
    ca = environment.trust()["tls_ca"]
    if any(reason in message for reason in _UNTRUSTED):
        return (
            f"the certificate of {address} is not one that BATON_TLS_CA ({ca}) vouches for, or names another host "
            f"(BATON_TLS_NAME): {message}"
        )
    if _NO_TLS in message:
        return f"{address} speaks no TLS, which BATON_TLS_CA ({ca}) asks for: unset it, or look at the port ({message})"
    if any(reason in message for reason in _OTHER_PROTOCOL):
        tls = " with TLS?" if ca else "? One with TLS needs BATON_TLS_CA, the file of its authority"
        return f"{address} takes connections and speaks otherwise; is it the gRPC port of a router{tls} ({message})"
    return f"no answer from a router at {address} ({message}); `{program()} up --model MODEL` starts one"


@contextlib.contextmanager
def _client(address: str, api_keys: str, admin_key: str = "") -> Iterator[Client]:
    parse_address(address, "--router", lowest_port=1)
    # The variable may hold all the keys of a router that was started with it.
    with Client(address, api_key=admin_key or secret_of(api_keys), **environment.trust()) as client:
        try:
            yield client
        except Unavailable as error:
            if not any(reason in error.message for reason in _NOTHING_THERE):
                raise
            raise Unavailable(_hint(address, error.message)) from error
        except DeadlineExceeded as error:
            if error.message != _NO_ANSWER_IN_TIME:
                raise
            message = f"{address} takes connections and does not answer in time; is it the gRPC port of a router?"
            raise DeadlineExceeded(message) from error


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass
