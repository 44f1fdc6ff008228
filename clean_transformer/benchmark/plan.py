"""Defines the plan of a run, which says which contestants do which work, for each device."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from clean_transformer.benchmark.work import Measurement, Part, Setup, Work

# The four contestants that take part in most measurements.
MAIN = ("limit", "ours", "optimized", "transformers sdpa")

PEERS = ("transformers sdpa", "HookedTransformer", "TransformerBridge")

COMPILED = ("transformers eager", "compiled", "transformers compiled")

ENGINES = ("CTranslate2", "onnxruntime", "llama.cpp")

# The slowest measurements, by title. They have `Plan.fewer_rounds` rounds instead of `Plan.rounds`.
LONGEST = ("generate", "generate a batch", "growth", "decoding", "training")

# The measurements with one round: more rounds would give the same values, or take minutes.
ONCE = ("memory", "divergence", "doctor")


def forward(batch: int, length: int, last_only: bool = False) -> Work:
    """Return the work of one forward pass over `batch` inputs of `length` tokens."""
    return Work(kind="forward", batch=batch, length=length, last_only=last_only)


def generate(batch: int, length: int, new: int) -> Work:
    """Return the work of generating `new` tokens after each of `batch` prompts.

    Each prompt has `length` tokens.
    """
    return Work(kind="generate", batch=batch, length=length, new=new)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The contestants of a run, and the work that they do, such as forward passes.

    If a field is None or empty, the run leaves out the measurements or contestants of this field.
    """

    # In these comments, words in quotes are names of contestants, or titles of measurements (see
    # `_measurements`).
    forward: Work
    generate: Work
    capture: Work
    rounds: int
    fewer_rounds: int
    peers: tuple[str, ...] = PEERS
    compiled: tuple[str, ...] = COMPILED
    engines: tuple[str, ...] = ENGINES
    # Contestants that are only measured at "capture".
    watchers: tuple[str, ...] = ("nnsight",)
    # Contestants with a compiled step and a static KV cache, for "generate".
    static: tuple[str, ...] = ("transformers static",)
    # "forward" and "generate" are measured in float32 and in these dtypes. If these dtypes include
    # "tf32", "training" is also measured in tf32.
    narrow: tuple[str, ...] = ("bfloat16",)
    # The contestants that are measured in the dtypes of `narrow`.
    in_narrow: tuple[str, ...] = ("limit", "optimized", "llama.cpp")
    # More dtypes for "generate". Only "limit", "optimized" and `in_8_bits` are measured in them.
    quantized: tuple[str, ...] = ("int8",)
    # The engines that are measured in the dtypes of `quantized`. For "int8", llama.cpp uses Q8_0.
    in_8_bits: tuple[str, ...] = ("llama.cpp",)
    # The dtypes in which "optimized compiled" is measured. This contestant only does "generate".
    graphs: tuple[str, ...] = ("float32", "int8")
    # The contestants whose peak memory is measured.
    in_memory: tuple[str, ...] = (
        "limit",
        "ours",
        "optimized",
        "transformers sdpa",
        "HookedTransformer",
        "TransformerBridge",
        "CTranslate2",
        "onnxruntime",
        "llama.cpp",
        "nnsight",
    )
    # Whether the commands `clean-transformer --help` and `clean-transformer doctor` are measured.
    commands: bool = True
    # The work of the measurement "first token".
    first: Work | None = None
    # The work of the measurement "training".
    train: Work | None = None
    # The work of the measurement "generate a batch".
    batched: Work | None = None
    # The forward passes of the measurement "growth", with different batches and lengths.
    grid: tuple[Work, ...] = ()
    # The measurement "decoding" measures one decoding step after each of these numbers of tokens.
    contexts: tuple[int, ...] = ()
    # The model sizes that the measurement "size" compares, smallest first.
    sizes: tuple[str, ...] = ()

    @property
    def batches(self) -> tuple[Work, ...]:
        """Those forward passes of `grid` whose inputs have 256 tokens, smallest batch first.

        All of these forward passes compute the logits for all positions.
        """
        same_length = [one for one in self.grid if not one.last_only and one.length == 256]
        return tuple(sorted(same_length, key=lambda one: one.batch))

    def fastest(self, dtype: str) -> str:
        """Return the name of our contestant that generates fastest in `dtype`."""
        return "optimized compiled" if dtype in self.graphs else "optimized"

    def step(self, context: int) -> Work:
        """Return the work of one decoding step after `context` earlier tokens."""
        return Work(kind="step", length=context, new=48)


FULL = Plan(
    forward=forward(4, 256),
    generate=generate(1, 16, 64),
    capture=Work(kind="capture", batch=4, length=256),
    train=Work(kind="train", batch=4, length=256),
    first=generate(1, 256, 1),
    batched=generate(8, 16, 16),
    grid=(
        *(forward(batch, 256) for batch in (1, 4)),
        *(forward(1, length) for length in (64, 1024)),
        forward(1, 1024, last_only=True),
    ),
    contexts=(16, 960),
    sizes=("small", "xl"),
    rounds=5,
    fewer_rounds=3,
)

QUICK = Plan(
    forward=forward(1, 128),
    generate=generate(1, 16, 8),
    capture=Work(kind="capture", length=128),
    peers=("transformers sdpa", "HookedTransformer"),
    watchers=(),
    static=(),
    compiled=(),
    engines=(),
    in_8_bits=(),
    in_narrow=("limit", "optimized"),
    commands=False,
    graphs=(),
    in_memory=("limit", "ours"),
    rounds=2,
    fewer_rounds=2,
)

# On a GPU, the forward pass and the batches are larger than in `FULL`, to keep the GPU busy.
GPU = replace(
    FULL,
    forward=forward(32, 1024, last_only=True),
    generate=generate(1, 16, 128),
    capture=Work(kind="capture", batch=8, length=1024),
    train=Work(kind="train", batch=16, length=1023),
    first=generate(1, 512, 1),
    batched=generate(32, 16, 64),
    grid=(
        *(forward(batch, 256) for batch in (1, 4, 16, 64)),
        *(forward(1, length) for length in (16, 64, 1024)),
        *(forward(batch, length, last_only=True) for batch, length in ((64, 256), (1, 1024))),
    ),
    engines=(),
    in_memory=("limit", "ours", "optimized", "transformers sdpa"),
    commands=False,
    quantized=(),
    narrow=("tf32", "bfloat16", "float16"),
    graphs=("float32", "tf32", "bfloat16", "float16"),
    in_narrow=MAIN,
)

GPU_QUICK = replace(
    GPU, peers=QUICK.peers, compiled=(), train=None, batched=None, grid=(), contexts=(), sizes=()
)


def plan_for(device: str, quick: bool) -> Plan:
    """Return the plan for a device, such as "cpu", "cuda", "cuda:0" or "mps"."""
    kind, _, _ = device.partition(":")
    if kind == "cpu":
        return QUICK if quick else FULL
    plan = GPU_QUICK if quick else GPU
    if kind == "cuda":
        return plan
    return replace(plan, narrow=("bfloat16", "float16"), graphs=("float32", "bfloat16", "float16"))


def measurements(device: str, plan: Plan, only: Collection[str] | None = None) -> list[Measurement]:
    """Return the measurements on a device, in the order in which they run.

    `only` names the contestants to measure. If `only` is None, all contestants of the plan are
    measured.
    """
    planned = [replace(one, title=f"{one.title}, {device}") for one in _measurements(device, plan)]
    if only is None:
        return planned
    chosen = [
        replace(one, parts=tuple(part for part in one.parts if part.setup.contestant in only))
        for one in planned
    ]
    return [one for one in chosen if one.parts]


def parts(
    device: str, work: Work, *contestants: str, dtype: str = "float32", model: str = "small"
) -> tuple[Part, ...]:
    """Return one `Part` for each contestant. All have the same work, device, dtype and model."""
    return tuple(
        Part(Setup(contestant=contestant, device=device, dtype=dtype, model=model), work)
        for contestant in contestants
    )


def _measurements(device: str, plan: Plan) -> Iterator[Measurement]:
    def measured(title: str, *groups: tuple[Part, ...]) -> Measurement:
        rounds = plan.fewer_rounds if title in LONGEST else plan.rounds
        return Measurement(title, sum(groups, ()), 1 if title in ONCE else rounds)

    # Some contestants cannot compute the logits of the last position alone. If
    # `plan.forward.last_only` is True, these contestants raise `NotImplementedError`, and the
    # report says NOT MEASURED.
    yield measured(
        "forward",
        parts(device, plan.forward, *MAIN, *plan.compiled, *plan.peers[1:], *plan.engines),
        *(parts(device, plan.forward, *plan.in_narrow, dtype=dtype) for dtype in plan.narrow),
    )
    yield measured(
        "generate",
        parts(device, plan.generate, *MAIN, *plan.static, *plan.peers[1:], *plan.engines),
        *(parts(device, plan.generate, *plan.in_narrow, dtype=dtype) for dtype in plan.narrow),
        *(
            parts(device, plan.generate, "limit", "optimized", *plan.in_8_bits, dtype=dtype)
            for dtype in plan.quantized
        ),
        *(parts(device, plan.generate, "optimized compiled", dtype=dtype) for dtype in plan.graphs),
    )
    yield measured(
        "capture",
        parts(device, plan.capture, "limit", "ours", *plan.peers[1:], *plan.watchers),
        parts(device, replace(plan.capture, kind="forward"), "watched"),
    )
    yield measured("import", parts(device, Work(kind="import"), "limit", "ours"))
    others = [
        *(
            parts(device, Work(kind="memory"), *plan.in_narrow, dtype=dtype)
            for dtype in plan.narrow
        ),
        *(
            parts(device, Work(kind="memory"), "optimized", *plan.in_8_bits, dtype=dtype)
            for dtype in plan.quantized
        ),
    ]
    yield measured("memory", parts(device, Work(kind="memory"), *plan.in_memory), *others)
    apart = [
        replace(part, work=Work(kind="divergence"))
        for part in sum(others, ())
        if part.setup.contestant != "limit"
    ]
    yield measured("divergence", tuple(apart))
    if plan.commands:
        yield measured("help", parts(device, Work(kind="help"), "ours"))
        works = (Work(kind="doctor"), Work(kind="doctor_memory"))
        yield measured("doctor", *(parts(device, work, "ours") for work in works))
    for kind in ("load", "first_use"):
        yield measured(kind, parts(device, Work(kind=kind), "ours", "transformers sdpa"))
    for work, title in ((plan.first, "first token"), (plan.batched, "generate a batch")):
        if work is not None:
            yield measured(title, parts(device, work, *MAIN))
    fewest = ("limit", "optimized", "transformers sdpa")
    if plan.grid:
        yield measured("growth", *(parts(device, work, *fewest) for work in plan.grid))
    if plan.contexts:
        steps = [plan.step(context) for context in plan.contexts]
        yield measured("decoding", *(parts(device, step, *fewest) for step in steps))
    if plan.train is not None:
        trained = ("limit", "ours", "nanoGPT-style", "transformers sdpa")
        dtypes = ("float32", "tf32") if "tf32" in plan.narrow else ("float32",)
        groups = (parts(device, plan.train, *trained, dtype=dtype) for dtype in dtypes)
        yield measured("training", *groups)
    if plan.sizes:
        work = forward(1, 128)
        yield measured(
            "size",
            *(parts(device, work, "limit", "optimized", model=size) for size in plan.sizes),
        )
