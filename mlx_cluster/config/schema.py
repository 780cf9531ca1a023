"""Every setting of the project: its type, default, bounds and meaning.

Owns: the pydantic models of the sections. Does not own: files and layers (``config.load``).
Invariant: frozen; unknown keys are errors; a value that got here is in bounds.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlx_cluster.config.quantity import parse_bytes

Port = Annotated[int, Field(ge=1, le=65535)]
Compression = Literal["off", "int8"]
Transport = Literal["auto", "ring", "grpc", "mpi", "jaccl", "nccl"]


def _check_amount(text: str) -> str:
    parse_bytes(text)
    return text


def _check_split(text: str) -> str:
    if not re.fullmatch(r"\d{1,4}(/\d{1,4})*", text):
        raise ValueError(f"{text!r} is not a split; write the layers of each node like 10/9/9")
    return text


def _check_host_name(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*", text):
        raise ValueError(f"{text!r} is not a host name; write it without scheme and port like chat.lan, or * for any")
    return text


def _check_address(text: str) -> str:
    if text == "*":
        raise ValueError("an address to dial cannot be *: write a host name or an IP address")
    return _check_host_name(text)


def _check_origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+", text):
        raise ValueError(
            f"{text!r} is not an origin; write it like http://localhost:3000, without a path, or * for any"
        )
    return text


def _check_kv_budget(text: str) -> str:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if text == "auto" or (found and 0 < float(found[1]) <= 100) or re.fullmatch(r"\s*(0?\.\d*[1-9]\d*|1\.0+)\s*", text):
        return text
    try:
        parse_bytes(text)
    except ValueError:
        raise ValueError(f'{text!r} is neither an amount like 4GB, nor a share like 50% or 0.5, nor "auto"') from None
    return text


def _check_node_pair(text: str) -> str:
    if not re.fullmatch(r"\d{1,2}-\d{1,2}", text):
        raise ValueError(f"{text!r} is not a pair of nodes; write their ids like 0-1")
    low, high = sorted(map(int, text.split("-")))
    return f"{low}-{high}"


def _bare_number_as_text(value: Any) -> Any:
    """``memory_budget: 12000000000``, ``split: 28`` and ``kv_budget: 0.5`` are numbers to YAML, and text here."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


MemoryAmount = Annotated[str, BeforeValidator(_bare_number_as_text), AfterValidator(_check_amount)]
KvBudget = Annotated[str, BeforeValidator(_bare_number_as_text), AfterValidator(_check_kv_budget)]
Split = Annotated[str, BeforeValidator(_bare_number_as_text), AfterValidator(_check_split)]
NodePair = Annotated[str, AfterValidator(_check_node_pair)]
HostName = Annotated[str, AfterValidator(_check_host_name)]
Address = Annotated[str, AfterValidator(_check_address)]
Origin = Annotated[str, AfterValidator(_check_origin)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeEntry(Section):
    """A node of the cluster: where to dial it. ``ports`` are node API, comms and health, in this order."""

    host: str
    node_id: Annotated[int, Field(ge=0, le=63)]
    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=5)] = ()
    name: str | None = None


class WitnessEntry(Section):
    """A voter that runs no stage: the third voice of a cluster of two nodes."""

    host: str
    port: Port
    state_dir: str | None = None


class ClusterSection(Section):
    """``discovery: mdns`` finds further addresses of the nodes in ``nodes``, never further nodes."""

    name: str = "mlx-cluster"
    nodes: tuple[NodeEntry, ...] = ()
    witness: WitnessEntry | None = None
    discovery: Literal["static", "mdns"] = "static"


class CoordinatorSection(Section):
    port: Port = 8400
    election_strategy: Literal["health_based", "load_based", "round_robin", "manual"] = "health_based"
    heartbeat_interval: Annotated[float, Field(gt=0)] = 1.0
    health_check_interval: Annotated[float, Field(gt=0)] = 5.0
    failure_threshold: Annotated[int, Field(ge=1)] = 3
    # Seconds that a pipeline must have had no work before it moves to a better plan, or back to its manual split.
    quiet_period: Annotated[float, Field(ge=0)] = 5.0
    # Seconds without a word from the coordinator until a voter stands: the shortest, and the longest (for those who
    # should stand last). A node that is often late needs more; the loss of a coordinator is settled about halfway.
    election_timeout_min: Annotated[float, Field(ge=0.1)] = 1.5
    election_timeout_max: Annotated[float, Field(ge=0.2)] = 3.0
    # The one node that may coordinate (its name or id), where disks do not outlive processes; there are no elections.
    fixed: str | None = None

    @model_validator(mode="after")
    def _check_timeouts(self) -> CoordinatorSection:
        if self.election_timeout_max <= self.election_timeout_min:
            raise ValueError(
                f"election_timeout_max {self.election_timeout_max:g} must be above election_timeout_min "
                f"{self.election_timeout_min:g}: voters that stand at the same moment split the votes"
            )
        return self


# Who may ask to be served how early: an engine takes the highest waiting priority first.
MIN_PRIORITY, MAX_PRIORITY = -10, 10
Priority = Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)]
# So much of a key's hash names its tenant: enough to tell keys apart, too little to look one up.
TENANT_HEX_DIGITS = 16


class KeySettings(Section):
    """What one API key may do against others. The key itself stands nowhere: ``sha256`` is its hash, in hexadecimal.

    This is no authentication: a key that is not listed is served too, as a tenant of its own with these defaults.
    ``priority`` is the highest its requests may have, and what they have when they ask for none. Among equal priorities
    ``weight`` is its part of the tokens. ``max_waiting`` bounds its sequences that wait for a row, in each pipeline.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    priority: Priority = 0
    weight: Annotated[float, Field(ge=0.01, le=1000)] = 1.0
    max_waiting: Annotated[int, Field(ge=0)] | None = None

    @property
    def tenant(self) -> str:
        return self.sha256[:TENANT_HEX_DIGITS]


class ApiGatewaySection(Section):
    host: str = "127.0.0.1"
    port: Port = 8000
    timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds to the first token
    max_concurrent_requests: Annotated[int, Field(ge=1)] = 100  # per gateway
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    keepalive_seconds: Annotated[float, Field(gt=0)] = 10.0
    idle_timeout: Annotated[float, Field(gt=0)] = 120.0  # seconds without a token before a stream is given up
    recovery_timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds a running stream waits for its engine to come back
    # Of a request with an Idempotency-Key: seconds that its generation is held for a client that comes back, 0: not at
    # all; and the bytes that all of them may take in each pipeline's engine.
    reattach_window: Annotated[float, Field(ge=0)] = 30.0
    reattach_max_bytes: MemoryAmount = "64MB"
    total_timeout: Annotated[float, Field(gt=0)] = 3600.0  # seconds a whole answer may take
    slow_reader_timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds a client may leave its stream unread
    # Names in a Host header that loopback answers to, beside its own: a page elsewhere may let its name point here.
    allowed_hosts: tuple[HostName, ...] = ()
    allowed_origins: tuple[Origin, ...] = ()  # of web pages elsewhere that may use this API (CORS)
    queue_timeout: Annotated[float, Field(gt=0)] | None = (
        None  # seconds a sequence may wait for a row; default: timeout
    )
    keys: tuple[KeySettings, ...] = ()


class LinkSettings(Section):
    """Of the links between two nodes, in either direction; what is left out is as for all links."""

    compression: Compression | None = None


class NetworkSection(Section):
    transport: Transport = "auto"
    tls_required: bool = False
    trusted_links: tuple[str, ...] = ()
    mlx_port_range: tuple[Port, Port] = (18100, 18999)
    link_timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds a stage waits for a promised hidden state
    connect_timeout: Annotated[float, Field(gt=0)] = 25.0  # seconds to bring up the links of a plan
    compression: Compression = "off"  # of hidden states on all links: int8 halves or quarters them, at some quality
    links: dict[NodePair, LinkSettings] = {}
    insecure: bool = False  # allow non-loopback addresses without authentication and TLS


class PrefixDiskSection(Section):
    """Entries that survive a restart. ``path`` may begin with ~; a relative one lies in the node's state directory."""

    path: Annotated[str, Field(min_length=1)] = "prefixes"
    max_bytes: MemoryAmount = "10GB"  # of all files below the path; the least recently used ones go


class PrefixCacheSection(Section):
    """Keys and values of earlier prompts and answers, kept on every stage for prompts that begin alike."""

    enabled: bool = True
    max_bytes: MemoryAmount = "1GB"  # on each stage
    ttl_seconds: Annotated[float, Field(gt=0)] = 3600.0
    min_tokens: Annotated[int, Field(ge=1)] = 32  # shorter common beginnings are computed again
    disk: PrefixDiskSection | None = None


class ResponseCacheSection(Section):
    """Answers of deterministic requests (greedy, or with the client's own seed), given again without computing."""

    enabled: bool = False
    max_bytes: MemoryAmount = "64MB"  # in memory, and the same again in the file
    ttl_seconds: Annotated[float, Field(gt=0)] = 3600.0
    path: str | None = None  # an SQLite file that outlives the node; default: memory only


class RuntimeSection(Section):
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dequantize: Literal["auto", "always", "never"] = "auto"
    blas: Literal["auto", "off"] = "auto"  # preload OpenBLAS for stage processes (Linux CPU)
    threads: Annotated[int, Field(ge=1)] = 1  # BLAS threads per stage process
    # Half a second at the start of a node, for placement; auto: not while all nodes share this machine.
    measure_speed: Literal["auto", "always", "never"] = "auto"
    # A configured model that this node lacks: copied from a peer, else downloaded (fetch); from peers only; or neither.
    missing_models: Literal["fetch", "peers", "off"] = "fetch"
    load_timeout: Annotated[float, Field(gt=0)] = 600.0
    # Seconds without any stage's report until the one that is due counts as hung; longer for a chunk that is predicted
    # to take more than a tenth of it. Kernels that are compiled at their first use must fit.
    hang_timeout: Annotated[float, Field(gt=0)] = 60.0
    # Memory of each stage for the rows' keys and values: an amount, a share of what is free ("50%"), or all of it.
    kv_budget: KvBudget = "auto"
    # Seconds that SIGTERM gives a node for its stages to move and its streams to end; SIGINT gives it none.
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0
    prefix_cache: PrefixCacheSection = PrefixCacheSection()
    kv_bits: Literal[4, 8] | None = None  # keys and values in so many bits; null keeps the model's precision
    kv_group_size: Literal[32, 64] = 64  # values that share a scale; it must divide the model's head size
    response_cache: ResponseCacheSection = ResponseCacheSection()


class SchedulerSection(Section):
    max_rows: Annotated[int, Field(ge=1, le=1024)] = 64  # sequences decoding at once in a pipeline
    max_queue: Annotated[int, Field(ge=0)] = 256
    prefill_chunk: Annotated[int, Field(ge=1, le=8192)] = 256  # tokens of a chunk at most
    # What the time between two tokens of a stream may come to while another request's prompt is computed beside it.
    itl_budget_ms: Annotated[float, Field(gt=0)] = 200.0
    min_chunk: Annotated[int, Field(ge=1, le=8192)] = 32  # tokens; none is cut shorter: it reads all weights
    max_prompts: Annotated[int, Field(ge=1, le=256)] = 16  # short prompts that may share a chunk
    max_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0  # how long a lone short prompt waits for such company
    max_groups: Annotated[int, Field(ge=1, le=64)] | None = None  # default: two per stage
    ageing_seconds: Annotated[float, Field(gt=0)] = 15.0  # a priority that is not served counts one higher each time
    share_identical: bool = False  # identical greedy requests of one key that run at once are computed once


class SpeculationSection(Section):
    """Drafts of what comes next, verified as one block. Which tokens come out never depends on them, only how soon.

    ``auto`` tries them where blocks are measured to be cheap and drafts to come true; ``on`` always; ``off`` never,
    whatever a request asks for. Only rows that decode alone try them, on models whose caches can all be cut.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    max_draft: Annotated[int, Field(ge=1, le=64)] = 8  # tokens
    min_match: Annotated[int, Field(ge=1, le=16)] = 3  # a draft is what followed so many of the last tokens before
    # A small model with the same vocabulary, as directory or repository id: it drafts in a process of its own on the
    # node of a pipeline's first stage. Without it, and when it is gone, drafts are looked up in the text.
    draft_model: str | None = None
    draft_wait: Annotated[float, Field(ge=0, le=10)] = 0.02  # seconds that a step waits for its draft at most


class LogSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class NodeSettings(Section):
    """What holds on one node only (nodes.yaml): nothing assumes equal paths or users."""

    model_dirs: tuple[str, ...] = ()
    memory_budget: MemoryAmount | None = None  # "12GB"; default: what the machine has
    standby: bool = False  # holds layers only while another node is away, or when the model fits no other way
    # Where cluster.discovery speaks and listens: names like en5, or own addresses. Default: all but loopback.
    interfaces: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    # Where else it can be dialled, beside cluster.nodes[].host: of equally quick ones the first is preferred.
    addresses: Annotated[tuple[Address, ...], Field(max_length=8)] = ()
    bind: str | None = None
    state_dir: str | None = None


class StageSharding(Section):
    """``layers`` are inclusive bounds, as people write them."""

    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    estimated_memory: MemoryAmount | None = None  # compared with the computed bytes; a difference is a warning
    includes_output_head: bool = False


class BatchingSection(Section):
    """How one model's pipeline batches, where it should differ from ``scheduler``."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] | None = None  # sequences decoding at once: scheduler.max_rows
    max_wait_ms: Annotated[float, Field(ge=0, le=10_000)] | None = None  # a lone short prompt's wait for company
    prefill_chunk: Annotated[int, Field(ge=1, le=8192)] | None = None  # the longest chunk of a prompt, in tokens
    min_chunk: Annotated[int, Field(ge=1, le=8192)] | None = None  # the shortest that a prompt is cut into
    max_prompts: Annotated[int, Field(ge=1, le=256)] | None = None  # short prompts that may share a chunk

    def over(self, scheduler: SchedulerSection) -> SchedulerSection:
        """The scheduler's settings of this model's pipelines."""
        own = self.model_dump(exclude_none=True)
        if "max_batch" in own:
            own["max_rows"] = own.pop("max_batch")
        return scheduler.model_copy(update=own)


class ModelEntry(Section):
    """One model of models.yaml. ``path`` is a directory or a Hugging Face repository id."""

    path: str | None = None
    total_layers: Annotated[int, Field(ge=1)] | None = None
    sharding: dict[str, StageSharding] = {}
    split: Split | None = None  # "10/9/9", in order of node ids; 0 leaves a node out
    aliases: tuple[str, ...] = ()
    max_context: Annotated[int, Field(ge=1)] | None = None
    objective: Literal["throughput", "latency"] = "throughput"  # of automatic placement
    replicas: Annotated[int, Field(ge=1, le=16)] = 1  # pipelines of this model, as many of them as fit
    # Another model of this file that answers, under its own name, while this one cannot be placed.
    fallback_model: str | None = None
    serve: Literal["always", "fallback"] = "always"  # fallback: loaded only while a model needs it as its fallback
    # Which replica serves a request.
    routing: Literal["round_robin", "least_connections", "least_latency", "random", "weighted", "prefix_affinity"] = (
        "prefix_affinity"
    )
    batching: BatchingSection = BatchingSection()
    # How a text becomes a vector for /v1/embeddings: the state at its last token, or the mean of all. Left out: what
    # the checkpoint says of itself (1_Pooling/config.json); without either the model gives none.
    embeddings: Literal["last", "mean"] | None = None


class Settings(Section):
    """All sections; ``config.load`` makes one from the layers."""

    cluster: ClusterSection = ClusterSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    api_gateway: ApiGatewaySection = ApiGatewaySection()
    network: NetworkSection = NetworkSection()
    runtime: RuntimeSection = RuntimeSection()
    scheduler: SchedulerSection = SchedulerSection()
    speculation: SpeculationSection = SpeculationSection()
    log: LogSection = LogSection()
    nodes: dict[str, NodeSettings] = {}
    models: dict[str, ModelEntry] = {}
