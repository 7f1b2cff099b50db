"""The C core. Tensors are whatever speaks DLPack; csrc/opdc.h says what they must be."""

from typing import Final

DLPACK_VERSION: Final[tuple[int, int]]
ROW: Final[int]
SETTINGS: Final[int]
SAMPLE_COLUMNS: Final[int]
PART: Final[int]
__version__: Final[str]

def loss(
    method: str,
    student: object,
    teacher: object | None,
    tokens: object | None,
    mask: object | None,
    weights: object | None,
    teacher_logprobs: object | None,
    old_logprobs: object | None,
    reference_logprobs: object | None,
    slot_ids: object | None,
    slot_logprobs: object | None,
    teacher_entropy: object | None,
    tail_logprobs: object | None,
    prefix_mask: object | None,
    uniforms: object | None,
    settings: object,
    reduction: int,
    advantage: int,
    support: int,
    normalize: int,
    region: int,
    outlier: int,
    k: int,
    valid_vocab: int,
    value: object,
    gradient: object | None,
    rows: object,
    metrics: object | None,
    threads: int,
    /,
) -> None: ...
def gradient(
    method: str,
    student: object,
    teacher: object | None,
    tokens: object | None,
    mask: object | None,
    weights: object | None,
    teacher_logprobs: object | None,
    old_logprobs: object | None,
    reference_logprobs: object | None,
    slot_ids: object | None,
    slot_logprobs: object | None,
    teacher_entropy: object | None,
    tail_logprobs: object | None,
    prefix_mask: object | None,
    uniforms: object | None,
    settings: object,
    reduction: int,
    advantage: int,
    support: int,
    normalize: int,
    region: int,
    outlier: int,
    k: int,
    valid_vocab: int,
    rows: object,
    upstream: object,
    gradient: object,
    threads: int,
    /,
) -> None: ...
def scale(gradient: object, upstream: object, output: object, threads: int, /) -> None: ...
def topk(
    logits: object,
    temperature: float,
    valid_vocab: int,
    ids: object,
    logprobs: object,
    threads: int,
    /,
) -> None: ...
def sample(
    student: object,
    teacher: object | None,
    epsilon: object | None,
    drafts: object | None,
    uniforms: object | None,
    temperature: float,
    top_p: float,
    top_k: int,
    valid_vocab: int,
    student_eos: int,
    teacher_eos: int,
    tokens: object,
    columns: object,
    threads: int,
    /,
) -> None: ...
def blend(
    student: object,
    teacher: object | None,
    epsilon: object | None,
    drafts: object | None,
    uniforms: object | None,
    temperature: float,
    top_p: float,
    top_k: int,
    valid_vocab: int,
    student_eos: int,
    teacher_eos: int,
    logprobs: object,
    columns: object,
    threads: int,
    /,
) -> None: ...
def drift_gate(
    logprobs: object,
    old_logprobs: object,
    mask: object | None,
    weights: object,
    block: int,
    kappa: float,
    /,
) -> None: ...

# The phases: the call, as loss takes it, and what opdc_slice lists.
def check_slice(*arguments: object) -> None: ...
def measure(*arguments: object) -> None: ...
def combine(*arguments: object) -> None: ...
def measure_again(*arguments: object) -> None: ...
def combine_again(*arguments: object) -> None: ...
def settle(*arguments: object) -> None: ...
def slice_gradient(*arguments: object) -> None: ...
def finish_gradient(*arguments: object) -> None: ...
def slice_needs(*arguments: object) -> tuple[int, int, int]: ...
def gathered_logits(
    hidden: object,
    weight: object,
    bias: object | None,
    ids: object,
    logits: object,
    threads: int,
    /,
) -> None: ...
def gathered_gradient(
    hidden: object,
    weight: object,
    ids: object,
    upstream: object,
    hidden_gradient: object | None,
    rows: object | None,
    weight_gradient: object | None,
    bias_gradient: object | None,
    threads: int,
    /,
) -> None: ...
def methods() -> tuple[str, ...]: ...
def metric_names() -> tuple[str, ...]: ...
def metrics_of(method: str, teacher_logits: bool, support: int, /) -> tuple[str, ...]: ...
def instruction_set() -> str: ...
def instruction_sets() -> tuple[str, ...]: ...
def cuda_compile(program: str, is_double: bool, variant: str, capability: int, /) -> bytes: ...
def cuda_compiler() -> tuple[int, int, int]: ...
def cuda_programs() -> tuple[str, ...]: ...
