"""Checks a command's settings before anything starts: files, ports, Redis, the model. Each fault is a BadConfig that
names the option and the remedy; nothing is left behind but the folders that were requested."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.access import AccessConfig
from baton.address import join_address, why_not_listen
from baton.errors import BadConfig, Unavailable, quoted
from baton.registry import Registry, RegistryConfig
from baton.settings import Given
from baton.tls import dialling_context, face_files, peer_files
from cli.launch.host import gpus, has_card
from cli.launch.process import ReservedPort
from cli.usage import program

if TYPE_CHECKING:
    from baton.types import KvLayout
    from engine.config import EngineConfig
    from kvtransfer.config import TransferConfig
    from router.config import RouterConfig

_COMPUTES_WITH = ("llvmlite", "numpy", "safetensors", "torch", "xxhash")


def writable_file(path: Path, option: str) -> None:
    """It may exist, also as a device or a pipe; nothing is written to it yet."""
    with _told(path, option):
        _in_a_folder(path, option)
        if not path.exists():
            _try_beside(path)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def replaceable_file(path: Path, option: str) -> None:
    """A file that is to be replaced whole, by way of another one beside it."""
    with _told(path, option):
        _in_a_folder(path, option)
        if path.exists() and not path.is_file():
            raise BadConfig(f"{option} is {quoted(str(path))}, which is no regular file; expected one", param=option)
        _try_beside(path)


def certificates(access: AccessConfig) -> None:
    """Files that a listener or a call would fail at, before a model is loaded."""
    peer_files(access)
    face_files(access)
    dialling_context(access)


def _in_a_folder(path: Path, option: str) -> None:
    if path.is_dir() or not path.name:
        raise BadConfig(f"{option} is {quoted(str(path))}, which is a folder; expected a file", param=option)
    if not path.parent.is_dir():
        raise BadConfig(f"{option} is {quoted(str(path))}, but there is no folder {path.parent}: make it", param=option)


def _try_beside(path: Path) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.touch()
    draft.unlink()


def writable_folder(path: Path, option: str) -> None:
    """Makes it, with its parents, where it is missing."""
    with _told(path, option):
        if path.is_file():
            raise BadConfig(f"{option} is {quoted(str(path))}, which is a file; expected a folder", param=option)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


@contextlib.contextmanager
def _told(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        message = f"{option}: cannot write {quoted(str(path))}: {reason}; give a path that this user may write to"
        raise BadConfig(message, param=option) from error


@contextlib.contextmanager
def reserved_port(host: str, port: int, option: str) -> Iterator[int]:
    """Keeps the port (0: a free one) until a server of ours listens there, and for it between its lives."""
    try:
        reserved = ReservedPort(host, port)
    except OSError as error:
        raise why_not_listen(host, port, option, error) from error
    try:
        yield reserved.port
    finally:
        reserved.close()


@contextlib.contextmanager
def reserved_ports(wanted: Sequence[tuple[str, str, int]]) -> Iterator[None]:
    """``wanted``: (option, host, port). Two options of one process on one port are refused as well."""
    with contextlib.ExitStack() as ports:
        taken: dict[tuple[str, int], str] = {}
        for option, host, port in wanted:
            if port and (other := taken.setdefault((host, port), option)) != option:
                message = f"{other} and {option} are both {join_address(host, port)}, expected two different ports"
                raise BadConfig(message, param=option)
            ports.enter_context(reserved_port(host, port, option))
        yield


async def registry_answers(config: RegistryConfig) -> None:
    """Ends within seconds: RegistryConfig.timeout_s bounds it."""
    registry = Registry(config)
    try:
        await registry.check_writable()
    except Unavailable as error:
        cure = "start redis-server there, or give --registry the URL of one that runs and can be written"
        message = f"{error.message.rstrip('.')}; {cure}"
        raise BadConfig(message, param="registry") from error
    finally:
        await registry.close()


def worker_packages() -> None:
    """Of the extra: a router's install has none of them."""
    missing = [name for name in _COMPUTES_WITH if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join(missing)
        raise BadConfig(
            f"workers need the extra worker ({packages} not installed); `{program()} doctor` says what to install"
        )


def model_files(folder: Path) -> None:
    """What a worker needs is there, whole, and of the shapes that config.json says. Raises UnsupportedModel; reads no
    weights."""
    from engine.model_config import ModelConfig
    from engine.shards import weight_files
    from engine.tensors import TensorFiles

    config = ModelConfig.from_folder(folder)
    weight_files(folder)
    if importlib.util.find_spec("safetensors") is None:
        return  # A router's install does not open weights.
    with TensorFiles(folder, "numpy") as files:
        files.has_own_head(config)


def tokenizer_files(folder: Path, config: RouterConfig) -> None:
    """What a router reads of the folder can be read. Raises UnsupportedModel, BadConfig."""
    from router.serve import tokenizer_of
    from router.text.chat import ChatTemplate
    from router.text.model_files import load_facts

    load_facts(folder, sampling_defaults=config.generation_config == "auto")
    tokenizer = tokenizer_of(config, folder)
    facts = None if tokenizer is None else tokenizer.facts
    if facts is not None and facts.chat_template is not None:
        ChatTemplate(facts.chat_template, facts.special_tokens, facts.tool_template)


def hardware(kernels: str, transfer: TransferConfig) -> None:
    """Whether kernels and transports that were asked for have the GPU they need. Raises BadConfig."""
    if has_gpu():
        return  # Each worker looks at its own.
    if kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        message = "--kernels triton needs an NVIDIA GPU, and nvidia-smi lists none here; give --kernels auto or cpu"
        raise BadConfig(message, param="kernels")
    transfer.over(on_device=False)


def one_kv_size(given: Mapping[str, Given], prefix: str = "engine.") -> None:
    """Raises BadConfig if the size of the KV cache was given twice."""
    size, count = given.get(f"{prefix}kv_bytes"), given.get(f"{prefix}num_blocks")
    if size is not None and count is not None and size.value is not None and count.value is not None:
        raise BadConfig(
            f"{size.source} ({int(str(size.value)) >> 20} MiB) and {count.source} ({count.value}) both say how large "
            "the KV cache is; expected one of them",
            param="num_blocks",
        )


def has_gpu() -> bool:
    return has_card() or bool(gpus())


def host_cache(folder: Path, engine: EngineConfig, num_workers: int) -> KvLayout:
    """The KV cache of each of ``num_workers`` on this machine's processors, which together have the memory for it.
    Raises BadConfig with both numbers."""
    from engine.memory import layout_before_loading, of_machine
    from engine.model_config import ModelConfig

    model = ModelConfig.from_folder(folder).within(engine.max_model_tokens)
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    layout = layout_before_loading(model, engine, dtype, of_machine(), num_workers=num_workers)
    assert layout is not None, "a processor's is reckoned"
    return layout
