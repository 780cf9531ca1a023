from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineMessage(_message.Message):
    __slots__ = ("microbatch", "tick")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    microbatch: Microbatch
    tick: Tick
    def __init__(self, microbatch: _Optional[_Union[Microbatch, _Mapping]] = ..., tick: _Optional[_Union[Tick, _Mapping]] = ...) -> None: ...

class StageMessage(_message.Message):
    __slots__ = ("report", "tick", "failure", "saved")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    report: Report
    tick: Tick
    failure: StageFailure
    saved: SavedEntries
    def __init__(self, report: _Optional[_Union[Report, _Mapping]] = ..., tick: _Optional[_Union[Tick, _Mapping]] = ..., failure: _Optional[_Union[StageFailure, _Mapping]] = ..., saved: _Optional[_Union[SavedEntries, _Mapping]] = ...) -> None: ...

class Tick(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: Held
    def __init__(self, held: _Optional[_Union[Held, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("rows", "entries")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    rows: int
    entries: int
    def __init__(self, rows: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...

class StageFailure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Microbatch(_message.Message):
    __slots__ = ("id", "kind", "group", "sample", "rows", "tokens", "admit", "release", "lengths", "store", "load", "evict", "trim")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    EVICT_FIELD_NUMBER: _ClassVar[int]
    TRIM_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: int
    group: int
    sample: bool
    rows: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    admit: _containers.RepeatedCompositeFieldContainer[RowSpec]
    release: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    store: _containers.RepeatedCompositeFieldContainer[Store]
    load: _containers.RepeatedCompositeFieldContainer[Load]
    evict: _containers.RepeatedScalarFieldContainer[int]
    trim: _containers.RepeatedCompositeFieldContainer[Trim]
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[int] = ..., group: _Optional[int] = ..., sample: _Optional[bool] = ..., rows: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., admit: _Optional[_Iterable[_Union[RowSpec, _Mapping]]] = ..., release: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., store: _Optional[_Iterable[_Union[Store, _Mapping]]] = ..., load: _Optional[_Iterable[_Union[Load, _Mapping]]] = ..., evict: _Optional[_Iterable[int]] = ..., trim: _Optional[_Iterable[_Union[Trim, _Mapping]]] = ...) -> None: ...

class Trim(_message.Message):
    __slots__ = ("row", "length")
    ROW_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    row: int
    length: int
    def __init__(self, row: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Store(_message.Message):
    __slots__ = ("row", "entry", "saved")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    row: int
    entry: int
    saved: Saved
    def __init__(self, row: _Optional[int] = ..., entry: _Optional[int] = ..., saved: _Optional[_Union[Saved, _Mapping]] = ...) -> None: ...

class Saved(_message.Message):
    __slots__ = ("digest", "salt", "tokens")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    salt: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, digest: _Optional[bytes] = ..., salt: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SavedEntries(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Saved]
    def __init__(self, entries: _Optional[_Iterable[_Union[Saved, _Mapping]]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("row", "entry", "length", "digest")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    row: int
    entry: int
    length: int
    digest: bytes
    def __init__(self, row: _Optional[int] = ..., entry: _Optional[int] = ..., length: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class RowSpec(_message.Message):
    __slots__ = ("row", "sampling", "choice", "first_index", "prompt_length", "history", "grammar", "stop_token_ids", "prompt_logprobs", "pool")
    ROW_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    row: int
    sampling: Sampling
    choice: int
    first_index: int
    prompt_length: int
    history: _containers.RepeatedScalarFieldContainer[int]
    grammar: Grammar
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: int
    pool: str
    def __init__(self, row: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., choice: _Optional[int] = ..., first_index: _Optional[int] = ..., prompt_length: _Optional[int] = ..., history: _Optional[_Iterable[int]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[int] = ..., pool: _Optional[str] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "top_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    top_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., top_logprobs: _Optional[int] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Sampled(_message.Message):
    __slots__ = ("row", "token_id", "logprob", "top")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    row: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, row: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class FailedRow(_message.Message):
    __slots__ = ("row", "message")
    ROW_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    row: int
    message: str
    def __init__(self, row: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ScoredToken(_message.Message):
    __slots__ = ("row", "position", "token_id", "logprob", "top")
    ROW_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    row: int
    position: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, row: _Optional[int] = ..., position: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class PooledRow(_message.Message):
    __slots__ = ("row", "values")
    ROW_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    row: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, row: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("microbatch_id", "stage", "compute_seconds", "wait_seconds", "sent_bytes", "sampled", "failed", "missing", "scored", "pooled", "saved_bytes")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: int
    stage: int
    compute_seconds: float
    wait_seconds: float
    sent_bytes: int
    sampled: _containers.RepeatedCompositeFieldContainer[Sampled]
    failed: _containers.RepeatedCompositeFieldContainer[FailedRow]
    missing: _containers.RepeatedScalarFieldContainer[int]
    scored: _containers.RepeatedCompositeFieldContainer[ScoredToken]
    pooled: _containers.RepeatedCompositeFieldContainer[PooledRow]
    saved_bytes: int
    def __init__(self, microbatch_id: _Optional[int] = ..., stage: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., wait_seconds: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., sampled: _Optional[_Iterable[_Union[Sampled, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[FailedRow, _Mapping]]] = ..., missing: _Optional[_Iterable[int]] = ..., scored: _Optional[_Iterable[_Union[ScoredToken, _Mapping]]] = ..., pooled: _Optional[_Iterable[_Union[PooledRow, _Mapping]]] = ..., saved_bytes: _Optional[int] = ...) -> None: ...
