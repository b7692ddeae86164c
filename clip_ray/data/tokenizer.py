"""Captions to token ids, by a tokenizer trained on the train captions or named from a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from clip_ray.config import TextTowerConfig
from clip_ray.errors import RunError

PAD, UNKNOWN, BEGIN, END = SPECIAL_TOKENS = ("<pad>", "<unk>", "<begin>", "<end>")


class CaptionTokenizer:
    """A `tokenizers.Tokenizer` with the shape that the text tower wants.

    Padding is on the right and told by the lengths alone: CLIP's own pad token is its end token.
    """

    def __init__(self, json_text: str, context_length: int) -> None:
        self.json_text = json_text
        self.context_length = context_length
        self._tokenizer = Tokenizer.from_str(json_text)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(context_length)

    @property
    def vocab_size(self) -> int:
        """Rows that the embedding table needs."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def sha256(self) -> str:
        """Of the tokenizer's JSON: what a checkpoint was trained with."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids [B, context_length] int32, zero-padded, and their counts [B] int32."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        token_ids = np.zeros((len(texts), self.context_length), dtype=np.int32)
        for row, encoding in zip(token_ids, encodings, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return token_ids, np.array([len(e.ids) for e in encodings], dtype=np.int32)


def make_tokenizer(config: TextTowerConfig, captions: Iterable[str]) -> CaptionTokenizer:
    """The tokenizer that `config` names, or one trained on `captions`. Raises RunError."""
    if config.tokenizer is None:
        tokenizer = _train(captions, config.vocab_size)
    else:
        tokenizer = _named(config.tokenizer)
    return CaptionTokenizer(tokenizer.to_str(), config.context_length)


def _train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Lower-cased byte-level BPE: every text has tokens, none is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=ends
    )
    return tokenizer


def _named(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        named = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise RunError(
            f"model.text.tokenizer is {name!r}: cannot be loaded: {first_line}"
        ) from None
    return named.backend_tokenizer
