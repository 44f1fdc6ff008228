"""`GenerationMixin`: adds text generation to a `LanguageModel`."""

from collections.abc import Iterator, Sequence
from reprlib import repr as shorten
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Unpack

from clean_transformer.kv_cache import KVCache
from clean_transformer.text.beam_search import search_beams
from clean_transformer.text.decoding import Stop, decode, decode_until
from clean_transformer.text.language_model import LanguageModel
from clean_transformer.text.sampling import Rows
from clean_transformer.text.settings import Sampling, SamplingSettings
from clean_transformer.text.signature import names_settings

# A prompt is one text, a list of texts, a tensor of token ids [batch pos], or a list with one list
# of token ids per prompt. The inner lists may differ in length.
Prompt = TypeVar("Prompt", str, list[str], Tensor, list[list[int]])


class GenerationMixin(LanguageModel):
    """Adds `generate` and `stream` to `DemoTransformer`.

    `cache_class` is the class of the KV cache that `generate` and `stream` create.
    """

    cache_class: type[KVCache] = KVCache

    @names_settings
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 20,
        *,
        beams: int = 1,
        stop_tokens: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        prepend_bos: bool | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Prompt:
        """Return each prompt followed by its continuation, in the same form as `prompt`.

        For example, a list of texts gives a list of texts, and a tensor of token ids [batch pos]
        gives a longer tensor of token ids. By default, each step takes the most likely token. The
        keyword arguments in `sampling` are the fields of `Sampling`, such as `temperature`. With
        `beams` above 1, beam search looks for the continuation with the highest mean
        log-probability per token.

        The continuation of each prompt stops independently of the other prompts: at one of
        `stop_tokens`, at the token that completes one of `stop_strings`, or after `max_new_tokens`
        tokens. By default, the stop token is <|endoftext|> if the prompt is a text, and there is no
        stop token if the prompt consists of token ids. A returned text excludes the stop token or
        the stop string. Returned token ids include the stop token, or the tokens of the stop
        string. In a returned tensor, rows that stopped early are padded on the right with the first
        of `stop_tokens`, or with the vocabulary's last token if there are no stop tokens. Padding
        on the left of token ids is not read, if the tokenizer's `padding_side` is "left" (see
        `padding_mask`).

        If `prepend_bos` is False, the model reads texts without <|endoftext|> before them.

        Raises `TypeError` for an unknown setting, and for `prepend_bos` with token ids. Raises
        `ValueError` for an invalid setting, and if a prompt and `max_new_tokens` together exceed
        n_ctx. These errors are raised before the model runs. Raises `RuntimeError` if the logits
        become NaN; the message names the activation in which the first NaN or infinity occurred.
        """
        settings, prompts = Sampling(**sampling), self._ids(prompt, prepend_bos)
        stop = self._stop(prompt, stop_tokens, stop_strings)
        if beams == 1:
            new = decode_until(self, prompts, max_new_tokens, settings, stop)
        else:
            new = search_beams(self, prompts, max_new_tokens, beams, settings, stop)
        if isinstance(prompt, Tensor):
            fill = next(iter(stop.tokens), self.cfg.d_vocab - 1)
            added = [torch.tensor(row, dtype=prompt.dtype, device=prompt.device) for row in new]
            return torch.cat([prompt, pad_sequence(added, True, fill)], dim=1)
        rest: list[Any] = [stop.text(row) for row in new] if _is_text(prompt) else new
        if isinstance(prompt, str):
            return prompt + rest[0]
        return [each + more for each, more in zip(prompt, rest, strict=True)]

    @names_settings
    def stream(
        self,
        text: str,
        max_new_tokens: int = 20,
        *,
        stop_tokens: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """Yield the continuation of `text` in pieces.

        Joined together, the pieces are the continuation that `generate` adds to `text`. Each piece
        is yielded as soon as later tokens can no longer change it. The arguments and the errors are
        the same as in `generate`, but there is no `beams` and no `prepend_bos`. The call of
        `stream` itself raises `TypeError` for an unknown setting. The other errors are raised when
        the caller requests the first piece.
        """
        stop = self._stop(text, stop_tokens, stop_strings)
        new: list[int] = []
        shown = 0
        for [token] in decode(self, self._ids(text), max_new_tokens, Sampling(**sampling)):
            new.append(token)
            if stop.ends(new):
                break
            if piece := stop.settled_text(new)[shown:]:
                yield piece
                shown += len(piece)
        if rest := stop.text(new)[shown:]:
            yield rest

    def _ids(self, prompt: Prompt, prepend_bos: bool | None = None) -> Rows:
        if prepend_bos is not None and not _is_text(prompt):
            raise TypeError("prepend_bos is for texts, not for token ids")
        each: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        texts = [each] if isinstance(each, (str, int)) else each
        rows: list[Any] = [
            self.to_tokens(one, prepend_bos)[0].tolist() if isinstance(one, str) else one
            for one in texts
        ]
        if not all(isinstance(row, list) for row in rows):
            raise TypeError(
                "a prompt is a text, a list of texts, tokens [batch pos] or a list of lists of "
                f"ids, not {shorten(prompt)}"
            )
        return rows if _is_text(prompt) else [self._without_padding(row) for row in rows]

    def _without_padding(self, row: list[int]) -> list[int]:
        mask = self.padding_mask(torch.tensor([row], device="cpu"))
        return row if mask is None else row[int((mask == 0).sum()) :]

    def _stop(
        self, prompt: Prompt, tokens: int | Sequence[int] | None, strings: str | Sequence[str]
    ) -> Stop:
        strings = [strings] if isinstance(strings, str) else strings
        tokenizer = self.tokenizer if strings or _is_text(prompt) else None
        if tokens is None:
            return Stop(self.tokenizer.stop_tokens if _is_text(prompt) else [], strings, tokenizer)
        ids = [tokens] if isinstance(tokens, int) else [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.cfg.d_vocab:
                last = self.cfg.d_vocab - 1
                raise ValueError(f"stop_tokens has {token}; this vocabulary has ids 0 to {last}")
        return Stop(ids, strings, tokenizer)


def _is_text(prompt: Prompt) -> bool:
    return not isinstance(prompt, Tensor) and all(isinstance(each, str) for each in prompt)
