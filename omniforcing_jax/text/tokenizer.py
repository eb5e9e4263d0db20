"""Prompts to token ids, as LTX-2 feeds them to Gemma.

A prompt is stripped, gets <bos> in front and no <eos> or chat template, is cut behind `length`
tokens and padded on the left with <pad>, which is id 0. The vocabulary comes with the text encoder:
`tokenizer.json` is read with `tokenizers`, `tokenizer.model` with `sentencepiece`. Both give the
same ids, except that `tokenizers` also knows control tokens, such as "<eos>", when a prompt spells
them out.
"""

import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np

BOS, PAD = "<bos>", "<pad>"
PAD_ID = 0
_MAX_LISTED = 3  # truncated prompts that a warning describes
_MAX_EXCERPT = 60  # characters of the text that was cut


@dataclasses.dataclass(frozen=True)
class Cut:
    """What truncation removed from a prompt.

    Attributes:
      index: of the prompt in its batch.
      num_tokens: the prompt's tokens, <bos> included.
      num_cut: how many of them do not fit.
      text: the first words of the part that was cut.
    """

    index: int
    num_tokens: int
    num_cut: int
    text: str

    def __str__(self) -> str:
        return f"{self.num_cut} of {self.num_tokens} tokens were cut, from {self.text!r} on"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and what to do with it; made by `load_tokenizer`.

    Attributes:
      vocab_size: ids are below it.
      bos_id: id of <bos>.
      fingerprint: SHA-256 of the tokenizer's file.
    """

    vocab_size: int
    bos_id: int
    fingerprint: str
    _encode: Callable[[list[str]], list[list[int]]]
    _decode: Callable[[list[int]], str]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt: <bos> and the stripped text, neither cut nor padded.

        Raises:
          ValueError: a prompt is not a string, or is no valid Unicode; names its index.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; expected a sequence: write [prompt]")
        texts = []
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {index} is {type(prompt).__name__}; expected a string")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompt {index} is not valid Unicode: {error}") from error
            texts.append(prompt.strip())
        return [[self.bos_id, *ids] for ids in self._encode(texts)]

    def cuts(self, tokens: Sequence[Sequence[int]], length: int) -> list[Cut]:
        """What `pad` cuts from the output of `encode`: one entry per prompt that is too long."""
        return [
            Cut(index, len(ids), len(ids) - length, self._excerpt(ids[length:]))
            for index, ids in enumerate(tokens)
            if len(ids) > length
        ]

    def pad(self, tokens: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cuts and pads the output of `encode`.

        Returns:
          ids [B, length] int32, padded on the left, and mask [B, length], True at tokens.

        Raises:
          ValueError: length is not positive.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        ids = np.full((len(tokens), length), PAD_ID, np.int32)
        mask = np.zeros((len(tokens), length), bool)
        for row, sequence in enumerate(tokens):
            kept = sequence[:length]
            ids[row, length - len(kept) :] = kept
            mask[row, length - len(kept) :] = True
        return ids, mask

    def encode_batch(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode` and `pad` in one; warns when something was cut, and says what.

        Args:
          prompts: B strings.
          length: tokens per prompt, <bos> included; 1024 for LTX-2.

        Returns:
          ids [B, length] int32, padded on the left, and mask [B, length], True at tokens.

        Raises:
          ValueError: see `encode` and `pad`.
        """
        tokens = self.encode(prompts)
        batch = self.pad(tokens, length)
        if cuts := self.cuts(tokens, length):
            lines = [f"prompt {cut.index}: {cut}" for cut in cuts[:_MAX_LISTED]]
            if len(cuts) > _MAX_LISTED:
                lines.append(f"and {len(cuts) - _MAX_LISTED} more")
            message = f"{len(cuts)} of {len(tokens)} prompts exceed {length} tokens. "
            warnings.warn(message + "; ".join(lines), stacklevel=2)
        return batch

    def _excerpt(self, ids: Sequence[int]) -> str:
        text = " ".join(self._decode(list(ids[:_MAX_EXCERPT])).split())
        text = text.strip("\ufffd")  # a character of several tokens can be cut in two
        if len(text) <= _MAX_EXCERPT:
            return text
        return text[:_MAX_EXCERPT].rpartition(" ")[0] or text[:_MAX_EXCERPT]


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads the tokenizer in the folder of a text encoder.

    Args:
      folder: with `tokenizer.json`, or else `tokenizer.model`, as released with Gemma.

    Raises:
      FileNotFoundError: no such folder, or it has neither file.
      ValueError: the file is broken, or not a tokenizer with <bos> and with <pad> as id 0.
    """
    folder = pathlib.Path(folder)
    for name, load in (("tokenizer.json", _tokenizers), ("tokenizer.model", _sentencepiece)):
        path = folder / name
        if not path.is_file():
            continue
        content = path.read_bytes()
        try:
            size, bos_id, pad_id, encode, decode = load(content)
        except ImportError:
            raise
        except Exception as error:  # the libraries raise nothing more specific
            raise ValueError(
                f"{path} cannot be read ({error}); copy {name} from the Gemma's release again"
            ) from error
        _check_ids(path, bos_id, pad_id)
        return Tokenizer(size, bos_id, hashlib.sha256(content).hexdigest(), encode, decode)
    what = "has no tokenizer.json or tokenizer.model" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{folder} {what}; expected the folder of a Gemma, where the tokenizer lies beside "
        "config.json"
    )


def _tokenizers(content: bytes) -> tuple:
    """(number of ids, of <bos>, of <pad>, encode, decode) of a tokenizer.json."""
    import tokenizers  # here, as samplers that read stored features need no tokenizer

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # padding, truncation and <bos> are ours, whatever the file asks for
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return size, tokenizer.token_to_id(BOS), tokenizer.token_to_id(PAD), encode, decode


def _sentencepiece(content: bytes) -> tuple:
    """The same of a tokenizer.model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)

    def encode(texts: list[str]) -> list[list[int]]:
        # explicit, as a model file can turn these on
        return model.encode(texts, out_type=int, add_bos=False, add_eos=False)

    bos_id, pad_id = (i if i >= 0 else None for i in (model.bos_id(), model.pad_id()))
    return model.get_piece_size(), bos_id, pad_id, encode, model.decode


def _check_ids(path: pathlib.Path, bos_id: int | None, pad_id: int | None) -> None:
    problems = []
    if bos_id is None:
        problems.append(f"there is no {BOS}")
    if pad_id != PAD_ID:
        problems.append(
            f"there is no {PAD}" if pad_id is None else f"{PAD} is id {pad_id}, not {PAD_ID}"
        )
    if problems:
        raise ValueError(
            f"{path}: {' and '.join(problems)}; this is not the tokenizer of a Gemma, which the "
            "text encoder was trained with"
        )
