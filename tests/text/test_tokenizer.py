"""Token ids against `transformers`, the two file formats against each other, and bad folders."""

import json
import random
import warnings

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from omniforcing_jax.text.tokenizer import load_tokenizer

WORDS = (
    *("a", "the", "red", "old", "quiet", "street", "musician", "plays", "violin", "rain", "sea"),
    *("storm", "calm", "waves", "light", "under", "over", "with", "bright", "city", "night"),
    *("morning", "fog", "slowly", "camera", "pans", "across", "mountains", "singing", "birds"),
)
PROMPTS = [
    "a street musician in the rain",
    "  spaces around,  and  between  ",
    "",
    "emoji 😀🎻 and ünïcödé 東京",
    "line\nbreak\tand tab",
    "UPPER lower 1234 !?",
    "\u2028 odd \u00a0 spaces",
]


def train_sentencepiece(folder, **changes):
    """Trains a model like Gemma's: BPE, byte fallback, digits split, text left as it is."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]
    settings = dict(
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        **(settings | changes),
    )
    (folder / "tokenizer.vocab").unlink()


def write_json(model_path, path):
    """The same vocabulary for `tokenizers`, with the decorations a released file has."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    ranked = sorted(
        (-model.get_score(vocab[left + right]), left, right)
        for piece in vocab
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in vocab and right in vocab
    )
    merges = [(left, right) for _, left, right in ranked]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    # what a released file asks for, and `Tokenizer` does itself
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=5)
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"json", "model"}: folders with the one or the other file."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("json", "model")}
    train_sentencepiece(folders["model"])
    write_json(folders["model"] / "tokenizer.model", folders["json"] / "tokenizer.json")
    return folders


@pytest.fixture(scope="module", params=["json", "model"])
def tokenizer(request, folders):
    return load_tokenizer(folders[request.param])


@pytest.mark.parametrize("length", [128, 7])
def test_equals_transformers(folders, tmp_path, length):
    """As the reference makes its input: stripped, <bos>, cut on the right, padded on the left."""
    content = json.loads((folders["json"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(content | {"truncation": None, "padding": None})
    )
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<bos>",
        pad_token="<pad>",
        padding_side="left",
        truncation_side="right",
    )
    expected = reference(
        [prompt.strip() for prompt in PROMPTS],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="np",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if length == 7 else "error")
        ids, mask = load_tokenizer(folders["json"]).encode_batch(PROMPTS, length)
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))


def test_both_formats_give_the_same_ids(folders):
    rng = random.Random(1)
    prompts = PROMPTS + [" ".join(rng.choices(WORDS, k=30)) for _ in range(20)]
    first, second = (load_tokenizer(folders[name]) for name in ("json", "model"))
    assert first.encode(prompts) == second.encode(prompts)
    assert first.vocab_size == second.vocab_size == 480
    assert first.bos_id == second.bos_id == 2
    assert first.fingerprint != second.fingerprint
    long = first.encode(prompts)
    texts = [[c.text for c in t.cuts(long[len(PROMPTS) :], 9)] for t in (first, second)]
    assert len(texts[0]) == 20 and texts[0] == texts[1]


def test_json_comes_first(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["json"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"never looked at")
    fingerprint = load_tokenizer(folders["json"]).fingerprint
    assert load_tokenizer(tmp_path).fingerprint == fingerprint


def test_layout(tokenizer):
    ids, mask = tokenizer.encode_batch(["", "a calm sea"], 16)
    empty, prompt = ids
    assert empty.tolist() == [0] * 15 + [2] and mask[0].tolist() == [False] * 15 + [True]
    count = mask[1].sum()
    assert count > 1 and prompt[-count] == 2 and (prompt[:-count] == 0).all()
    assert (prompt == 2).sum() == 1 and not mask[1, :-count].any() and mask[1, -count:].all()
    assert tokenizer.encode(["  a calm sea\n"]) == tokenizer.encode(["a calm sea"])


def test_truncation_says_what_was_cut(tokenizer):
    words = [f"{WORDS[i % len(WORDS)]}" for i in range(10_000)]
    with pytest.warns(UserWarning) as record:
        ids, mask = tokenizer.encode_batch(["short", " ".join(words)], 1024)
    assert mask[1].all() and ids[1, 0] == 2
    (cut,) = tokenizer.cuts(tokenizer.encode(["short", " ".join(words)]), 1024)
    assert cut.index == 1 and cut.num_cut == cut.num_tokens - 1024 > 5000
    assert cut.text and cut.text.split()[-2] in WORDS and cut.text in " ".join(words)
    (message,) = (str(w.message) for w in record)
    assert message.startswith("1 of 2 prompts exceed 1024 tokens. prompt 1: ")
    assert f"{cut.num_cut} of {cut.num_tokens}" in message and cut.text in message
    # the kept part is the beginning
    np.testing.assert_array_equal(ids[1], tokenizer.encode([" ".join(words)])[0][:1024])


def test_many_truncations_are_one_warning(tokenizer):
    with pytest.warns(UserWarning, match="5 of 6 .*and 2 more") as record:
        tokenizer.encode_batch([" ".join(WORDS)] * 5 + ["a"], 8)
    assert len(record) == 1


@pytest.mark.parametrize(
    "prompts, length, message",
    [
        ("a calm sea", 16, r"write \[prompt\]"),
        (["a", None], 16, "prompt 1 is NoneType"),
        (["a", "half \ud83d"], 16, "prompt 1 is not valid Unicode"),
        (["a"], 0, "at least 1"),
    ],
)
def test_bad_prompts_are_refused(tokenizer, prompts, length, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_batch(prompts, length)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff broken"])
def test_broken_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*copy {name}"):
        load_tokenizer(tmp_path)


def test_other_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "<pad>": 1}, unk_token="[UNK]"))
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match=r"no <bos> and <pad> is id 1, not 0.*tokenizer of"):
        load_tokenizer(tmp_path)
    path.unlink()
    train_sentencepiece(tmp_path, pad_id=-1, eos_id=0, bos_id=-1, unk_id=1)
    with pytest.raises(ValueError, match=r"tokenizer\.model: there is no <bos> and .* no <pad>"):
        load_tokenizer(tmp_path)
