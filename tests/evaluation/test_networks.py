"""CLIP and CLAP scores, with tiny models of random weights."""

import json

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from tokenizers.pre_tokenizers import ByteLevel

from omniforcing_jax import ClipWriter, read_clip
from omniforcing_jax.evaluation import networks

LETTERS = sorted(ByteLevel.alphabet())
RATE = 16_000
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """1 s of noise."""
    path, random = tmp_path_factory.mktemp("clip") / "a.mp4", np.random.default_rng(0)
    with ClipWriter(path, width=64, height=48, frame_rate=24, sample_rate=RATE) as writer:
        frames = random.integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
        writer.write(frames, random.uniform(-0.5, 0.5, (RATE, 2)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A folder as `save_pretrained` writes it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip_model")
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = SIZES | ends | {"vocab_size": len(words), "max_position_embeddings": 20}
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clap_model(tmp_path_factory):
    """A folder as `save_pretrained` writes it, of one that hears 8 kHz."""
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        RobertaTokenizer,
    )

    folder = tmp_path_factory.mktemp("clap_model")
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS]
    text = SIZES | {"vocab_size": len(words), "max_position_embeddings": 40, "projection_dim": 8}
    audio = {"spec_size": 64, "num_mel_bins": 16, "hidden_size": 16, "depths": [1, 1]}
    audio |= {"patch_embeds_hidden_size": 8, "num_attention_heads": [1, 2], "window_size": 2}
    audio |= {"patch_size": 4, "patch_stride": [4, 4], "num_hidden_layers": 2, "num_classes": 4}
    audio |= {"projection_dim": 8, "enable_fusion": False}
    torch.manual_seed(0)
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    ClapModel(config).save_pretrained(folder)
    listener = ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, max_length_s=10, fft_window_size=512,
        hop_length=480, truncation="rand_trunc", frequency_max=4000,
    )  # fmt: skip
    tokenizer = RobertaTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[]
    )
    ClapProcessor(listener, tokenizer).save_pretrained(folder)
    return folder


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b).mean())


def test_clip_score(clip, clip_model):
    """The mean over frames, each on its own; a long prompt is cut."""
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(clip_model)
    processor = AutoProcessor.from_pretrained(clip_model)
    score = networks.clip_score(clip_model)
    frames = read_clip(clip)[0][np.linspace(0, 23, 16).round().astype(int)]
    one = [
        cosine(found.image_embeds, found.text_embeds)
        for found in (
            model(**processor(text=["a bell"], images=[frame], return_tensors="pt"))
            for frame in frames
        )
    ]
    assert score(clip, "a bell") == pytest.approx(np.mean(one), abs=1e-5)
    assert score(clip, "a bell") != score(clip, "rain")
    assert score(clip, "a bell " * 30) == pytest.approx(score(clip, "a bell " * 40))


def test_clap_score(clip, clap_model):
    from transformers import AutoProcessor, ClapModel

    model = ClapModel.from_pretrained(clap_model)
    processor = AutoProcessor.from_pretrained(clap_model)
    sound = resample_poly(read_clip(clip)[2].mean(1), 1, 2)
    inputs = processor(text=["a bell"], audio=[sound], sampling_rate=8000, return_tensors="pt")
    found = model(**inputs)
    score = networks.clap_score(clap_model)
    expected = cosine(found.audio_embeds, found.text_embeds)
    assert score(clip, "a bell") == pytest.approx(expected, abs=1e-3)  # decoded once more
    assert score(clip, "a bell") != score(clip, "rain")


def test_what_is_missing_is_said(clip_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no CLAP model .* laion/clap-htsat-unfused"):
        networks.check_model(tmp_path, "CLAP")
    with pytest.raises(ValueError, match="a clip model, not CLAP"):
        networks.check_model(clip_model, "CLAP")
    assert json.loads((clip_model / "config.json").read_text())["model_type"] == "clip"
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need torch: pip install -e '.\[eval\]'"):
        networks.check_model(clip_model, "CLIP")
