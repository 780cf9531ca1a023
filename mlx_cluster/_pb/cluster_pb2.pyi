from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class HeartbeatRequest(_message.Message):
    __slots__ = ("cluster", "version", "node_id", "status_json")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_JSON_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    version: str
    node_id: int
    status_json: str
    def __init__(self, cluster: _Optional[str] = ..., version: _Optional[str] = ..., node_id: _Optional[int] = ..., status_json: _Optional[str] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("node_id", "status_json")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_JSON_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    status_json: str
    def __init__(self, node_id: _Optional[int] = ..., status_json: _Optional[str] = ...) -> None: ...

class DocumentMessage(_message.Message):
    __slots__ = ("cluster", "document_json")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    document_json: str
    def __init__(self, cluster: _Optional[str] = ..., document_json: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("ok", "code", "message")
    OK_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    code: str
    message: str
    def __init__(self, ok: _Optional[bool] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class StartStageRequest(_message.Message):
    __slots__ = ("cluster", "plan_json", "stage", "epoch", "fresh")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    plan_json: str
    stage: int
    epoch: str
    fresh: bool
    def __init__(self, cluster: _Optional[str] = ..., plan_json: _Optional[str] = ..., stage: _Optional[int] = ..., epoch: _Optional[str] = ..., fresh: _Optional[bool] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("state", "done_bytes", "total_bytes", "address", "mlx_address", "code", "message", "can_trim", "kv_bytes_per_position", "kv_fixed_bytes", "kv_budget_bytes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MLX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CAN_TRIM_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_POSITION_FIELD_NUMBER: _ClassVar[int]
    KV_FIXED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    state: str
    done_bytes: int
    total_bytes: int
    address: str
    mlx_address: str
    code: str
    message: str
    can_trim: bool
    kv_bytes_per_position: int
    kv_fixed_bytes: int
    kv_budget_bytes: int
    def __init__(self, state: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., address: _Optional[str] = ..., mlx_address: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., can_trim: _Optional[bool] = ..., kv_bytes_per_position: _Optional[int] = ..., kv_fixed_bytes: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ...) -> None: ...

class LinkStageRequest(_message.Message):
    __slots__ = ("pipeline", "stage", "epoch", "transport", "stage_addresses", "mlx_addresses")
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    STAGE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    MLX_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    pipeline: str
    stage: int
    epoch: str
    transport: str
    stage_addresses: _containers.RepeatedScalarFieldContainer[str]
    mlx_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pipeline: _Optional[str] = ..., stage: _Optional[int] = ..., epoch: _Optional[str] = ..., transport: _Optional[str] = ..., stage_addresses: _Optional[_Iterable[str]] = ..., mlx_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class StopStageRequest(_message.Message):
    __slots__ = ("pipeline", "stage", "epoch", "reason")
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    pipeline: str
    stage: int
    epoch: str
    reason: str
    def __init__(self, pipeline: _Optional[str] = ..., stage: _Optional[int] = ..., epoch: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class VoteMessage(_message.Message):
    __slots__ = ("cluster", "message_json")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_JSON_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    message_json: str
    def __init__(self, cluster: _Optional[str] = ..., message_json: _Optional[str] = ...) -> None: ...
