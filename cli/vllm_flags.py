"""vLLM's options that are none here: what they are called here, or what would have to be there for them.

Options that mean the same under another name are aliases of a setting (`Setting.aliases`). A name is never guessed by
its spelling when it is known to mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

_SERVED, _ORIGINS = "--served-model-name", "--allowed-origins"
# Without a value: the words that say the same here; none where it is so anyway.
_SAME: Mapping[str, tuple[str, ...]] = {
    "--enforce-eager": ("--max-graph-seqs", "0"),
    "--enable-prefix-caching": ("--prefix-cache", "on"),
    "--no-enable-prefix-caching": ("--prefix-cache", "off"),
    **dict.fromkeys(
        (
            "--async-scheduling", "--disable-fastapi-docs", "--disable-frontend-multiprocessing",
            "--disable-log-requests", "--disable-log-stats", "--disable-uvicorn-access-log",
            "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prompt-tokens-details",
            "--enable-request-id-headers", "--enable-ssl-refresh", "--no-enable-log-requests", "--no-trust-remote-code",
            # Nothing of a model's folder is run, with and without it.
            "--trust-remote-code", "--use-v2-block-manager",
        ),
        (),
    ),
}  # fmt: skip

# Why others are refused, and their names; behind "=" the values that ask for nothing.
_ABSENT: Mapping[str, str] = {
    "no tensor parallelism yet: a worker computes on one device": (
        "--tensor-parallel-size=1 -tp=1 --disable-custom-all-reduce --max-parallel-loading-workers"
    ),
    "no pipeline parallelism yet: a worker computes on one device": "--pipeline-parallel-size=1 -pp=1",
    "no context parallelism yet: a worker computes on one device": (
        "--prefill-context-parallel-size=1 -pcp=1 --decode-context-parallel-size=1 -dcp=1"
    ),
    "no ranks of data parallelism: --prefill, --decode and --mixed say how many workers there are": (
        "--data-parallel-size=1 -dp=1 --data-parallel-size-local=1 -dpl=1 --data-parallel-rank "
        "--data-parallel-address --data-parallel-rpc-port --data-parallel-backend=mp --data-parallel-hybrid-lb "
        "--data-parallel-external-lb --data-parallel-start-rank"
    ),
    "no engine over several machines: start `baton worker` on each, and name them to `baton router --node`": (
        "--distributed-executor-backend=mp,uni --headless --nnodes=1 --node-rank=0 --master-addr --master-port "
        "--ray-workers-use-nsight --worker-use-ray"
    ),
    "one router process; several routers share workers by --registry": "--api-server-count=1 -asc=1",
    "no mixture-of-experts models yet": (
        "--enable-expert-parallel -ep --enable-eplb --eplb-config --num-redundant-experts --expert-placement-strategy "
        "--all2all-backend --moe-backend=auto"
    ),
    "no speculative decoding yet": (
        "--speculative-config -sc --speculative-model --num-speculative-tokens --ngram-prompt-lookup-max "
        "--ngram-prompt-lookup-min"
    ),
    "no LoRA adapters yet": (
        "--enable-lora --lora-modules --max-loras --max-lora-rank --max-cpu-loras --lora-dtype=auto "
        "--fully-sharded-loras --lora-extra-vocab-size --enable-lora-bias --default-mm-loras --enable-prompt-adapter "
        "--prompt-adapters"
    ),
    "the served models read and write text only": (
        "--limit-mm-per-prompt --mm-processor-kwargs --media-io-kwargs --allowed-local-media-path "
        "--allowed-media-domains --mm-processor-cache-gb --mm-encoder-tp-mode --disable-mm-preprocessor-cache "
        "--skip-mm-profiling --video-pruning-rate --interleave-mm-strings --enable-mm-embeds"
    ),
    "generation is the one task": "--task=auto,generate --runner=auto,generate --convert=auto,none",
    "pooling is what a request of /v1/embeddings says": "--pooler-config --override-pooler-config",
    "KV is kept in --dtype": "--kv-cache-dtype=auto --calculate-kv-scales --quantization-param-path",
    "no KV outside the workers' own memory yet: what is preempted is computed again": (
        "--swap-space=0,4 --cpu-offload-gb=0 --kv-offloading-size=0 --kv-offloading-backend --preemption-mode=recompute"
    ),
    "nodes move KV by themselves: --prefill, --decode and --transport say how": (
        "--kv-transfer-config --kv-events-config"
    ),
    "the size of the KV cache is --kv-mib, in MiB": "--kv-cache-memory-bytes --kv-cache-memory",
    "blocks have one hash": "--prefix-caching-hash-algo=builtin,sha256",
    "chunks of prompts follow --max-batch-tokens and --tbt-target-ms": (
        "--max-num-partial-prefills=1 --max-long-partial-prefills=1 --long-prefill-token-threshold=0 "
        "--no-enable-chunked-prefill --scheduler-delay-factor=0,0.0 --num-scheduler-steps=1 --num-lookahead-slots=0 "
        "--disable-chunked-mm-input --disable-hybrid-kv-cache-manager --stream-interval=1"
    ),
    "a request's priority counts where it has one": "--scheduling-policy=fcfs,priority",
    "GPUs record steps of up to --max-graph-seqs sequences, and torch compiles nothing": (
        "--compilation-config -cc -O --optimization-level --max-seq-len-to-capture --cuda-graph-sizes "
        "--cudagraph-capture-sizes --max-cudagraph-capture-size --enable-dbo"
    ),
    "the kernels are those of --kernels": "--attention-backend --attention-config -ac --model-impl=auto,vllm",
    "config.json of the model's folder is used as it is": (
        "--hf-overrides --hf-config-path --config-format=auto,hf --rope-scaling --rope-theta --disable-sliding-window "
        "--disable-cascade-attn"
    ),
    "no code of a model's folder is run": "--code-revision",
    "weights are safetensors": (
        "--load-format=auto,safetensors --model-loader-extra-config --ignore-patterns --safetensors-load-strategy "
        "--use-tqdm-on-load --pt-load-map-location --qlora-adapter-name-or-path"
    ),
    "models are fetched into the Hugging Face cache: HF_HOME says where": "--download-dir",
    "HF_TOKEN has the token": "--hf-token",
    "the tokenizer is tokenizer.json of the model's folder, or of --tokenizer": (
        "--tokenizer-mode=auto,hf --tokenizer-revision --skip-tokenizer-init --tokenizer-pool-size=0 "
        "--tokenizer-pool-type"
    ),
    "defaults of sampling are those of generation_config.json, or none (--generation-config)": (
        "--override-generation-config"
    ),
    "a request has at most 20 log-probabilities for a token": "--max-logprobs=20 --logprobs-mode=raw_logprobs",
    "a request says it itself (return_tokens_as_token_ids)": "--return-tokens-as-token-ids",
    "a request says it itself (stream_options.include_usage)": "--enable-force-include-usage",
    "a request says it itself (chat_template_kwargs)": "--default-chat-template-kwargs",
    "the chat template decides": "--chat-template-content-format=auto --response-role=assistant",
    "a request cannot bring a chat template": "--trust-request-chat-template",
    "grammars have one backend": (
        "--guided-decoding-backend=auto,guidance,xgrammar --guided-decoding-disable-fallback "
        "--guided-decoding-disable-any-whitespace --structured-outputs-config"
    ),
    "no code is loaded into Baton": (
        "--middleware --tool-parser-plugin --reasoning-parser-plugin --logits-processors --logits-processor-pattern "
        "--worker-cls=auto --worker-extension-cls --scheduler-cls --io-processor-plugin --tool-server --model-class"
    ),
    "clients show no certificate, and OpenSSL's configuration chooses the ciphers": (
        "--ssl-ca-certs --ssl-cert-reqs --ssl-ciphers"
    ),
    "paths begin at /: a proxy can take a prefix off": "--root-path",
    "no unix socket for clients: --host and --port say where it listens": "--uds",
    "keys are sent as headers, not as credentials of a browser": "--allow-credentials",
    "every method and header is allowed to --allowed-origins": '--allowed-methods=["*"] --allowed-headers=["*"]',
    "limits.max_head_bytes and limits.max_headers of the router's --config say it": (
        "--h11-max-incomplete-event-size --h11-max-header-count"
    ),
    "a request has one line of log, without its text": (
        "--enable-log-requests --enable-log-outputs --max-log-len --log-config-file --log-error-stack "
        "--uvicorn-log-level=info --disable-access-log-for-endpoints"
    ),
    "give --otel, and OTEL_EXPORTER_OTLP_ENDPOINT": "--otlp-traces-endpoint --collect-detailed-traces",
    "GET /metrics has it": (
        "--enable-server-load-tracking --show-hidden-metrics-for-version --kv-cache-metrics --cudagraph-metrics "
        "--enable-mfu-metrics --enable-layerwise-nvtx-tracing"
    ),
    "no sleep mode": "--enable-sleep-mode",
    "the tokenizer's files are not served": "--enable-tokenizer-info-endpoint",
    "text and token ids are both served": "--tokens-only",
    "no such settings": "--additional-config --profiler-config --ir-op-priority --kernel-config",
}


def _listed() -> Iterator[tuple[str, tuple[tuple[str, ...], str]]]:
    for why, names in _ABSENT.items():
        for word in names.split():
            name, _, values = word.partition("=")
            yield name, (tuple(values.split(",")) if values else (), why)


_REFUSED: Mapping[str, tuple[tuple[str, ...], str]] = dict(_listed())
KNOWN = frozenset((*_SAME, *_REFUSED))


class Refused(Exception):
    """The message names the option."""


def translated(words: Sequence[str], flags: Collection[str], valued: Collection[str]) -> list[str]:
    """A command line with vLLM's options in the command's own: ``flags``, and ``valued``, which have a value. Raises
    Refused for an option that is none here.

    As in vLLM, a name may have underscores, served names may follow one option, and origins may be a list in JSON.
    """
    found: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*found, word, *left]
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            found.append(word)
            continue
        if name.startswith("--"):
            name = name.replace("_", "-")
        values = [value] if equals else left[:1]
        if name in valued:
            del left[: 0 if equals else 1]
            values = _all(name, values, left)
            found += [part for one in values for part in (name, one)] or [name]
        elif name in flags or (name not in _SAME and name not in _REFUSED):
            found.append(name + equals + value)
        elif name in _SAME:
            found += _SAME[name]
        else:
            neutral, why = _REFUSED[name]
            if not values or values[0] not in neutral:
                raise Refused(f"{name}: {why}")
            del left[: 0 if equals else 1]
    return found


def _all(name: str, values: list[str], left: list[str]) -> list[str]:
    """With those that follow the first, taken off ``left``."""
    if name == _ORIGINS and values:
        return _listed_in(values[0])
    while name == _SERVED and left and not left[0].startswith("-"):
        values.append(left.pop(0))
    return values


def _listed_in(text: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError:
        return [text]
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else [text]
