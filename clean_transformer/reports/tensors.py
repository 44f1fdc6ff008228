"""Shows named tensors in a notebook: a table of shapes and sizes, and pictures of attention."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from clean_transformer.reports.heat_map import block_of
from clean_transformer.reports.page import render_page

# The width and height of a picture, in CSS pixels.
SIDE = 48

# The largest number of pictures in one notebook cell. A picture takes about 500 bytes.
MOST_PICTURES = 400


@dataclass(frozen=True)
class Row:
    """One row of the table: the tensors of several blocks that have the same name and shape.

    `name` is the name of the tensors without the block, such as "attn.hook_q". `blocks` has the
    indices of the blocks as text, such as "0–11". `size` is the size in memory of all these tensors
    together.
    """

    name: str
    blocks: str
    shape: str
    dtype: str
    size: str


def tensors_html(title: str, tensors: Mapping[str, Tensor]) -> str:
    """Return HTML with a table of the tensors, and with one picture for each attention head.

    A tensor whose name ends with "hook_pattern" is an attention pattern: [head query key] or [batch
    head query key]. Of a batch, only the first input is shown. There are at most `MOST_PICTURES`
    pictures, so the last blocks of a large model have no pictures.
    """
    patterns = {
        block_of(name)[0]: tensor
        for name, tensor in tensors.items()
        if name.endswith("hook_pattern") and tensor.ndim in (3, 4) and not tensor.is_meta
    }
    n_inputs = max((len(p) for p in patterns.values() if p.ndim == 4), default=1)
    n_heads = max((p.shape[-3] for p in patterns.values()), default=1)
    return render_page(
        "tensors.html.jinja",
        title=title,
        rows=rows(tensors),
        pictures={
            block: [picture(head) for head in (pattern if pattern.ndim == 3 else pattern[0])]
            for block, pattern in [*patterns.items()][: MOST_PICTURES // n_heads]
        },
        of_first=" of the first input" if n_inputs > 1 else "",
    )


def rows(tensors: Mapping[str, Tensor]) -> list[Row]:
    """Return the rows of the table, in the order of the first tensor of each row."""
    groups: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        shape, dtype = " × ".join(map(str, tensor.shape)), str(tensor.dtype)
        groups.setdefault((block_of(name)[1], shape, dtype), {})[name] = tensor
    return [
        Row(
            name,
            ranges(block for each in same if (block := block_of(each)[0]) is not None),
            shape,
            dtype.removeprefix("torch."),
            size_of(same.values()),
        )
        for (name, shape, dtype), same in groups.items()
    ]


def size_of(tensors: Iterable[Tensor]) -> str:
    """Return the size in memory of all tensors together as text, such as "1.5 MiB"."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def ranges(numbers: Iterable[int]) -> str:
    """Return a list of ascending numbers as short text, such as "0–3, 7"."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{span[0]}–{span[-1]}" if span[1:] else f"{span[0]}" for span in spans)


def picture(pattern: Float[Tensor, "query key"]) -> str:
    """Return a PNG picture of one head's attention pattern, as a `data:` URL for HTML.

    The opacity of a pixel is the square root of the attention weight, so that small weights are
    visible, too. If the pattern has more weights than the picture has pixels, a pixel shows the
    largest of several neighboring weights.
    """
    weights = pattern.detach().float().cpu().nan_to_num(1.0)[None]
    height, width = (min(length, SIDE) for length in pattern.shape)
    small = adaptive_max_pool2d(weights, (height, width))[0]
    opacity = (255 * small.clamp(0, 1).sqrt()).round().byte()
    scale = -(-SIDE // max(height, width))
    large = opacity.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    # A PNG row begins with its filter type, 0. Color type 4 has a gray byte and an opacity byte.
    lines = b"".join(
        b"\0" + bytes(byte for value in line for byte in (0, value)) for line in large.tolist()
    )
    header = struct.pack(">IIBBBBB", large.shape[1], large.shape[0], 8, 4, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return f"data:image/png;base64,{b64encode(png).decode()}"
