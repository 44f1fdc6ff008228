"""Contestants that run inference engines other than PyTorch.

Each engine reads the model in its own file format. The time to convert the model to this format is
not measured. Reports print NOT MEASURED for an engine that is not installed. The extra `bench` of
this package installs CTranslate2 and onnxruntime. Installing llama.cpp needs a C++ compiler.
"""

import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.benchmark.contestants.base import DTYPES, Contestant, Tokens
from clean_transformer.benchmark.contestants.nanogpt import NanoGPT
from clean_transformer.benchmark.contestants.peers import hugging_face_model
from clean_transformer.weights.formats.gguf import write_gguf
from clean_transformer.weights.formats.huggingface import read_folder
from clean_transformer.weights.load import read_pretrained


class Engine(Contestant):
    """The base class of the engines, which are only measured on the CPU.

    `files` is a temporary folder for the converted model.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        if device != "cpu":
            raise NotImplementedError(f"{type(self).__name__} is only measured on the CPU")
        self._files = tempfile.TemporaryDirectory()
        self.files = Path(self._files.name)


class CTranslate2(Engine):
    """CTranslate2, with a model that CTranslate2's converter makes from Hugging Face's model."""

    package = imported = "ctranslate2"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        import ctranslate2
        from ctranslate2.converters.transformers import GPT2Loader

        if dtype not in ctranslate2.get_supported_compute_types(device):
            raise NotImplementedError(f"CTranslate2 has no {dtype} on this processor")
        with torch.no_grad():
            theirs = hugging_face_model(folder, device, torch.float32, "eager")
            loader = GPT2Loader()
            spec = loader.get_model_spec(theirs)
            # CTranslate2 takes tokens as strings, so we use each token's id as its string.
            # CTranslate2 also requires three special tokens, and we use the last token for them.
            words = [str(token) for token in range(theirs.config.vocab_size)]
            loader.set_vocabulary(spec, words)
            spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[-1]
            spec.validate()
            spec.optimize(quantization=None)
            spec.save(str(self.files))
        self.generator = ctranslate2.Generator(
            str(self.files), device, compute_type=dtype, intra_threads=torch.get_num_threads()
        )
        self.storage = ctranslate2.StorageView

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions. Raises `NotImplementedError` with `last_only`."""
        if last_only:
            raise NotImplementedError("it cannot compute the last logits alone")
        batch, length = tokens.shape
        ids = self.storage.from_array(tokens.int().numpy())
        lengths = self.storage.from_array(np.full(batch, length, dtype=np.int32))
        return self.generator.forward_batch(ids, lengths)

    def last_logits(self, tokens: Tokens) -> Tensor:
        """Return the logits at the last position of each input [batch d_vocab]."""
        return torch.from_numpy(np.array(self.forward(tokens))[:, -1])

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        done = self.generator.generate_batch(
            [[str(token) for token in row] for row in tokens.tolist()],
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        return torch.tensor([one.sequences_ids[0] for one in done])


class OnnxRuntime(Engine):
    """onnxruntime, with the compact model `NanoGPT`. PyTorch exports this model to ONNX."""

    package = imported = "onnxruntime"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        import onnxruntime

        if dtype != "float32":
            raise NotImplementedError("the model is only exported in float32")
        self.cfg, state = read_folder(folder)
        self.model = NanoGPT.from_huggingface(self.cfg, state).eval()
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Callable[[Path], Any] = partial(
            onnxruntime.InferenceSession, sess_options=options
        )

    def exported(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Export `module` to the ONNX file `name`. Return onnxruntime's session for this file.

        `inputs` are examples for the export. The session accepts other batch sizes and lengths.
        """
        any_length = [{0: "batch", 1: "pos"}, {2: "batch", 4: "past"}]
        file = self.files / f"{name}.onnx"
        torch.onnx.export(
            module,
            inputs,
            file,
            dynamo=True,
            optimize=False,  # onnxruntime itself optimizes equally well, in less time
            verbose=False,
            input_names=["tokens", "past"][: len(inputs)],
            dynamic_shapes=tuple(
                dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in any_length[: len(inputs)]
            ),
        )
        return self.session(file)

    @cached_property
    def whole(self) -> Any:
        """The onnxruntime session that computes the logits for all positions."""
        return self.exported("whole", self.model, (torch.ones(2, 8, dtype=torch.long),))

    @cached_property
    def first(self) -> Any:
        """The onnxruntime session that reads a prompt.

        It returns the logits at the last position, and the keys and values of all positions.
        """
        return self.exported("first", Reader(self.model), (torch.ones(2, 8, dtype=torch.long),))

    @cached_property
    def next(self) -> Any:
        """The onnxruntime session that reads one new token, with the earlier keys and values.

        It returns the logits of the new token, and the keys and values of all positions.
        """
        past = torch.zeros(self.cfg.n_layers, 2, 2, self.cfg.n_heads, 8, self.cfg.d_head)
        tokens = torch.ones(2, 1, dtype=torch.long)
        return self.exported("next", Reader(self.model), (tokens, past))

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions; with `last_only`, only for the last position."""
        session = self.first if last_only else self.whole
        return session.run_with_ort_values(None, {"tokens": self.value(tokens.numpy())})[0]

    def last_logits(self, tokens: Tokens) -> Tensor:
        """Return the logits at the last position of each input [batch d_vocab]."""
        return torch.from_numpy(self.forward(tokens).numpy())[:, -1]

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        inputs = {"tokens": self.value(tokens.numpy())}
        chosen = []
        for step in range(new):
            session = self.next if step else self.first
            logits, past = session.run_with_ort_values(None, inputs)
            chosen.append(logits.numpy().argmax(-1))
            inputs = {"tokens": self.value(chosen[-1][:, None]), "past": past}
        return torch.from_numpy(np.stack(chosen, axis=1))


class Reader(nn.Module):
    """Wraps `NanoGPT` for decoding: `forward` takes and returns keys and values."""

    def __init__(self, model: NanoGPT):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits at the last position [batch d_vocab], and the keys and values.

        `past` has the keys and values of the earlier positions. The returned keys and values also
        include the positions of `tokens`. Both have the shape [layer two batch head pos d_head],
        where the axis `two` has keys first and then values.
        """
        x, presents = self.model.read(tokens, past)
        kept = torch.stack([torch.stack(present) for present in presents])
        return F.linear(x[:, -1], self.model.wte.weight), kept


# For each dtype, llama.cpp's number of the type of keys and values; it uses float16 for the others.
KV_TYPES = {"float32": 0}


class LlamaCpp(Engine):
    """llama.cpp, with a GGUF file that our `write_gguf` writes. For "int8", it uses Q8_0."""

    package = "llama_cpp_python"
    imported = "llama_cpp"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        import llama_cpp

        cfg, state = read_pretrained(folder, torch.device("cpu"), DTYPES[dtype])
        file = self.files / "model.gguf"
        write_gguf(file, cfg, state)
        if dtype == "int8":
            file = quantized(file)
            # With its own memory layouts for AMX instructions, llama.cpp 0.3.36 crashes for Q8_0.
            settings = llama_cpp.llama_model_default_params()
            settings.use_extra_bufts = False
            llama_cpp.llama_cpp.llama_model_default_params = lambda: settings

        def opened(**settings: Any) -> Any:
            return llama_cpp.Llama(
                str(file),
                n_ctx=cfg.n_ctx,
                n_batch=cfg.n_ctx,
                n_ubatch=cfg.n_ctx,
                # By default, llama.cpp rounds keys and values to half precision.
                type_k=KV_TYPES.get(dtype),
                type_v=KV_TYPES.get(dtype),
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                verbose=False,
                **settings,
            )

        self.model = opened()
        self.open_all_logits: Callable[[], Any] = partial(opened, logits_all=True)

    @cached_property
    def with_all_logits(self) -> Any:
        """A second `Llama` object for the same model file. It keeps the logits of all positions."""
        return self.open_all_logits()

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Compute the logits for all positions; with `last_only`, only for the last position.

        `Llama` can hold only one text at a time, so the inputs run one after the other.
        """
        model = self.model if last_only else self.with_all_logits
        rows = []
        for row in tokens.tolist():
            model.reset()
            model.eval(row)
            rows.append(model.scores[: len(row)])  # a view that the next input overwrites
        return rows

    def last_logits(self, tokens: Tokens) -> Tensor:
        """Return the logits at the last position of each input [batch d_vocab]."""
        rows = (self.forward(row[None])[0][-1].copy() for row in tokens)
        return torch.tensor(np.stack([*rows]))

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate `new` tokens after each input, and return the new tokens [batch new]."""
        import llama_cpp

        rows = []
        for row in tokens.tolist():
            self.model.reset()
            self.model.eval(row)
            chosen = []
            while True:
                logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
                chosen.append(int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax()))
                if len(chosen) == new:
                    break
                self.model.eval(chosen[-1:])
            rows.append(chosen)
        return torch.tensor(rows)


def quantized(file: Path) -> Path:
    """Convert a GGUF file with llama.cpp to Q8_0: 8 bits, with a scale for each 32 weights.

    Returns the new file. Raises `RuntimeError` if llama.cpp cannot convert the file.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    made = file.with_name("q8_0.gguf")
    status = llama_cpp.llama_model_quantize(str(file).encode(), str(made).encode(), settings)
    if status:
        raise RuntimeError(f"llama.cpp could not convert the weights to Q8_0 (status {status})")
    return made
