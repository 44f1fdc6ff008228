"""Which contestants do what: the measurements of a run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from clean_transformer.benchmark.work import Entrant, Measurement, Part, Work

FEW = ("limit", "ours", "optimized", "transformers sdpa")


PEERS = ("transformers sdpa", "HookedTransformer", "TransformerBridge")


COMPILED = ("transformers eager", "compiled", "transformers compiled")


ENGINES = ("CTranslate2", "onnxruntime", "llama.cpp")


# The measurements that take longest.
LONGEST = ("generate", "generate a batch", "growth", "decoding", "training")


@dataclass(frozen=True, kw_only=True)
class Works:
    """The sizes of a run, and what it leaves out to be quick.

    `narrow` are the other dtypes, `in_narrow` those who are measured in them, `quantized` the
    dtypes that only our weights are made for, `graphs` those in which our compiled step generates,
    too, and `in_memory` those whose memory is measured. `grid` are forward passes, `contexts` the
    lengths after which a decoding step is timed, `sizes` the models whose growth is measured.
    What is in `LONGEST` has `fewer_rounds`.
    """

    forward: Work
    generate: Work
    capture: Work
    rounds: int
    fewer_rounds: int
    peers: tuple[str, ...] = PEERS
    compiled: tuple[str, ...] = COMPILED
    engines: tuple[str, ...] = ENGINES
    narrow: tuple[str, ...] = ("bfloat16",)
    in_narrow: tuple[str, ...] = ("limit", "optimized")
    quantized: tuple[str, ...] = ("int8",)
    graphs: tuple[str, ...] = ("float32", "int8")
    in_memory: tuple[str, ...] = ("limit", "ours", "transformers sdpa")
    first: Work | None = None
    train: Work | None = None
    batched: Work | None = None
    grid: tuple[Work, ...] = ()
    contexts: tuple[int, ...] = ()
    sizes: tuple[str, ...] = ()

    @property
    def batches(self) -> tuple[Work, ...]:
        """Of the grid, what differs in the batch only, the smallest first."""
        longest = [one for one in self.grid if not one.last_only and one.length == 256]
        return tuple(sorted(longest, key=lambda one: one.batch))

    def fastest(self, dtype: str) -> str:
        """Which of ours generates as fast as we can in that dtype."""
        return "optimized compiled" if dtype in self.graphs else "optimized"

    def step(self, context: int) -> Work:
        """A decoding step after as many tokens."""
        return Work(kind="step", length=context, new=48)


def forward(batch: int, length: int, last_only: bool = False) -> Work:
    """A forward pass."""
    return Work(kind="forward", batch=batch, length=length, last_only=last_only)


def generate(batch: int, length: int, new: int) -> Work:
    """A prompt and its continuation."""
    return Work(kind="generate", batch=batch, length=length, new=new)


FULL = Works(
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


QUICK = Works(
    forward=forward(1, 128),
    generate=generate(1, 16, 8),
    capture=Work(kind="capture", length=128),
    peers=("transformers sdpa", "HookedTransformer"),
    compiled=(),
    engines=(),
    graphs=(),
    in_memory=("limit", "ours"),
    rounds=2,
    fewer_rounds=2,
)


# A GPU is only busy with more.
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
    quantized=(),
    narrow=("tf32", "bfloat16", "float16"),
    graphs=("float32", "tf32", "bfloat16", "float16"),
    in_narrow=FEW,
)


GPU_QUICK = replace(
    GPU, peers=QUICK.peers, compiled=(), train=None, batched=None, grid=(), contexts=(), sizes=()
)


def works(device: str, quick: bool) -> Works:
    """What is done on that device."""
    if device == "cpu":
        return QUICK if quick else FULL
    chosen = GPU_QUICK if quick else GPU
    if device == "cuda":
        return chosen
    return replace(
        chosen, narrow=("bfloat16", "float16"), graphs=("float32", "bfloat16", "float16")
    )


def measurements(device: str, works: Works) -> list[Measurement]:
    """What is measured on that device, in this order."""
    return [replace(one, title=f"{one.title}, {device}") for one in _measurements(device, works)]


def parts(
    device: str, work: Work, *contestants: str, dtype: str = "float32", model: str = "small"
) -> tuple[Part, ...]:
    """The same work for each of them."""
    return tuple(
        Part(Entrant(contestant=contestant, device=device, dtype=dtype, model=model), work)
        for contestant in contestants
    )


def _measurements(device: str, works: Works) -> Iterator[Measurement]:

    def measured(title: str, *groups: tuple[Part, ...]) -> Measurement:
        rounds = works.fewer_rounds if title in LONGEST else works.rounds
        return Measurement(title, sum(groups, ()), rounds)

    # Whoever has no logits of the last position only gives all of them, if it can.
    yield measured(
        "forward",
        parts(device, works.forward, *FEW, *works.compiled, *works.peers[1:], *works.engines),
        *(parts(device, works.forward, *works.in_narrow, dtype=dtype) for dtype in works.narrow),
    )
    yield measured(
        "generate",
        parts(device, works.generate, *FEW, *works.peers[1:], *works.engines),
        *(parts(device, works.generate, *works.in_narrow, dtype=dtype) for dtype in works.narrow),
        *(
            parts(device, works.generate, "limit", "optimized", dtype=dtype)
            for dtype in works.quantized
        ),
        *(
            parts(device, works.generate, "optimized compiled", dtype=dtype)
            for dtype in works.graphs
        ),
    )
    yield measured(
        "capture",
        parts(device, works.capture, "limit", "ours", *works.peers[1:]),
        parts(device, replace(works.capture, kind="forward"), "watched"),
    )
    yield measured("import", parts(device, Work(kind="import"), "limit", "ours"))
    memory = parts(device, Work(kind="memory"), *works.in_memory)
    yield replace(measured("memory", memory), rounds=1)  # it does not vary
    for kind in ("load", "first_use"):
        yield measured(kind, parts(device, Work(kind=kind), "ours", "transformers sdpa"))
    for work, title in ((works.first, "first token"), (works.batched, "generate a batch")):
        if work is not None:
            yield measured(title, parts(device, work, *FEW))
    fewest = ("limit", "optimized", "transformers sdpa")
    if works.grid:
        yield measured("growth", *(parts(device, work, *fewest) for work in works.grid))
    if works.contexts:
        steps = [works.step(context) for context in works.contexts]
        yield measured("decoding", *(parts(device, step, *fewest) for step in steps))
    if works.train is not None:
        trained = ("limit", "ours", "nanoGPT-style", "transformers sdpa")
        dtypes = ("float32", "tf32") if "tf32" in works.narrow else ("float32",)
        groups = (parts(device, works.train, *trained, dtype=dtype) for dtype in dtypes)
        yield measured("training", *groups)
    if works.sizes:
        work = forward(1, 128)
        yield measured(
            "size",
            *(parts(device, work, "limit", "optimized", model=size) for size in works.sizes),
        )
