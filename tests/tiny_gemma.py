"""Tiny Gemma folders for tests: the reference weights, and models made by `transformers`."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import Gemma3TextConfig, Gemma3TextModel

from checkpoint_converters import gemma3
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import load_gemma_config
from omniforcing_jax.text.text_encoder import load_text_tower


def write_word_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of five ids, for models with a vocabulary smaller than all bytes."""
    vocab = {token: i for i, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "word"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))


def convert_golden(golden_dir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Converts tests/golden/gemma3_tiny."""
    source = folder / "hf"
    shutil.copytree(golden_dir / "gemma3_tiny", source)
    write_word_tokenizer(source)
    gemma3.convert(source, folder / "gemma")
    return folder / "gemma"


def torch_gemma(folder: pathlib.Path, **changes) -> Gemma3TextModel:
    """A random model of `transformers`, saved to `folder` in its own layout."""
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Gemma3TextModel(Gemma3TextConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms act as 1 + w and start at 0, where a missing one would not show
            scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_word_tokenizer(folder)
    return model


def torch_states(model: Gemma3TextModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hidden states [B, S, D, L + 1] of `transformers`."""
    with torch.no_grad():
        states = model(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states
    return torch.stack(states, dim=-1).float().numpy()


def load(folder: pathlib.Path, dtype=np.float32, quantize: str = "none"):
    """(configuration, parameters) of a converted folder."""
    config = load_gemma_config(folder)
    return config, load_text_tower(folder, config, dtype=dtype, quantize=quantize)


@functools.cache
def apply(config: GemmaConfig, dtype=np.float32):
    """Jitted (params, ids, mask) -> hidden states [B, S, D, L + 1]."""
    model = TextTower(config, dtype)
    return jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, mask))
