"""`PretrainedMixin`: loads a model's weights from a checkpoint, and saves them."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.support.keywords import checks_keywords
from clean_transformer.text.language_model import LanguageModel
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.load import read_pretrained, read_state_dict
from clean_transformer.weights.processing import process_weights
from clean_transformer.weights.refusals import WeightsError

Model = TypeVar("Model", bound="PretrainedMixin")
SWAPPED_OUT = (
    "the unembedding is tied to an embedding that was swapped out, and whose weights are in no "
    "module; swap the unembedding too, or restore the embedding"
)


class PretrainedMixin(LanguageModel):
    """Adds `from_pretrained`, `from_state_dict` and `save_pretrained` to `DemoTransformer`.

    `saved_class` is the class of the model that a saved config.json describes. `save_pretrained`
    refuses a model if its modules have other classes than the modules of `saved_class(cfg)`.
    """

    saved_class: ClassVar[type[LanguageModel]]

    @classmethod
    @checks_keywords
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = torch.float32,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
    ) -> Model:
        """Return a GPT-2 with the weights that `source` names.

        The weights are converted to `dtype`, such as torch.float16 or "float16", and moved to
        `device`. The device "auto" is cuda if this machine has it, otherwise mps, otherwise cpu.

        By default, the weights stay as published. The last four arguments change the weights, but
        not the log-probabilities that the model computes; see `process_weights` in
        `weights/processing.py`. `source` is one of

        - a hub id ("openai-community/gpt2"), or an alias of a hub id ("gpt2");
        - "demo", the tiny model that comes with the package;
        - a folder with config.json, and with model.safetensors (one file or several shards) or
          pytorch_model.bin;
        - a folder that OpenAI published ("124M"), with hparams.json and a TensorFlow checkpoint;
        - a .gguf file of llama.cpp that is not quantized;
        - a .pt, .pth or .ckpt file that `torch.save` wrote. The file holds a nanoGPT checkpoint, or
          a state dict that `from_state_dict` accepts.

        Raises `WeightsError` for a damaged file, and for weights that do not fit the architecture
        exactly. The message names every weight that is missing, unused, or has the wrong shape.
        """
        cfg, state = read_pretrained(source, resolve_device(device), choose_dtype(dtype))
        processing = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
        }
        if any(processing.values()):
            cfg, processed = process_weights(cfg, state, **processing)
            state = dict(processed)
        with torch.device("meta"):  # allocates no memory for weights that are replaced below
            model = cls(cfg)
        model.load_state_dict(state, assign=True)
        model.source = source
        return model

    @classmethod
    @checks_keywords
    def from_state_dict(
        cls: type[Model], state: Mapping[str, Tensor], cfg: Config | None = None
    ) -> Model:
        """Return a GPT-2 with a copy of the weights in `state`.

        The copy has the same dtype and device. `state` is the state dict of a `HookedTransformer`,
        `TransformerBridge`, `GPT2LMHeadModel`, nanoGPT, minGPT or `DemoTransformer`. `cfg` is the
        architecture; None derives it from the shapes of the weights. Raises `WeightsError` if the
        weights do not fit the architecture exactly, and if the number of heads cannot be derived.
        """
        cfg, state = read_state_dict(state, cfg)
        weight = state["embed.W_E"]
        with torch.device("meta"):
            model = cls(cfg)
        model = model.to(weight.dtype).to_empty(device=weight.device)
        model.load_state_dict(state)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, in Hugging Face's format.

        If the model has a tokenizer, its files are written, too (see `Tokenizer.files`). If an
        error occurs, no file is written. Raises `WeightsError`, before anything is written, if the
        format cannot represent the model. For example, a model with swapped modules cannot be
        saved, because config.json does not name the classes of modules.
        """
        if self.swapped_out_embedding is not None:
            raise WeightsError(f"the files would be incomplete: {SWAPPED_OUT}")
        with torch.device("meta"):
            written = dict(self.saved_class(self.cfg).named_modules())
        other = [
            f"{name} is {type(module).__name__}"
            for name, module in self.named_modules()
            if name and type(module) is not type(written.get(name))
        ]
        if other:
            raise WeightsError(
                f"{', '.join(other[:3])}{', …' * bool(other[3:])}, which config.json cannot say; "
                "save the weights with torch.save(model.state_dict(), file), load them with "
                "load_state_dict, and swap again"
            )
        write_folder(Path(folder), self.cfg, self.state_dict(), self._tokenizer_files())

    def _tokenizer_files(self) -> dict[str, str]:
        """Return `Tokenizer.files`, or an empty dictionary for a model without a tokenizer."""
        if self.source is None and "tokenizer" not in vars(self):
            return {}
        try:
            return self.tokenizer.files()
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            warnings.warn(f"the model is saved without its tokenizer: {error}", stacklevel=3)
            return {}

    @property
    def swapped_out_embedding(self) -> nn.Module | None:
        """The embedding that a tied unembedding reads, if it is no longer a part of the model.

        This happens if only the embedding is swapped. The state dict then lacks weights that the
        logits depend on.
        """
        embed = getattr(self.unembed, "embed", None)  # `TiedUnembed` has this attribute
        if not isinstance(embed, nn.Module) or any(embed is each for each in self.modules()):
            return None
        return embed

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parameters by name. Warns if it lacks an embedding that the logits need."""
        if self.swapped_out_embedding is not None:
            warnings.warn(f"this state dict is incomplete: {SWAPPED_OUT}", stacklevel=2)
        return super().state_dict(*args, **kwargs)

    def _apply(self: Model, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """Apply `fn` to all weights, as in `model.double()` and `model.to(device)`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and (embed := self.swapped_out_embedding) is not None:
            embed._apply(fn)  # type: ignore[no-untyped-call]
        return self
