"""Random Gemma 3 folders in the Hugging Face layout, of any size, with a working tokenizer.

    python -m checkpoint_converters.synthetic_gemma --size tiny --output tiny_gemma

Each size fits the LTX-2 checkpoint of the same size from `checkpoint_converters.synthetic`, so the
two run from a sentence to a context. The weights are noise of a size that keeps activations sane;
the tokenizer is a byte-fallback BPE, so any text can be encoded, if not in few tokens. With --words
it knows those alone, a token each; size "pocket" is too small for any other. With --gemma4, it is
LTX-2.5's text encoder, a single file with text projections.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from checkpoint_converters import synthetic
from checkpoint_converters.converting import DTYPE_CHOICES, stay_on_host
from checkpoint_converters.key_map import GEMMA, TEXT_PROJECTIONS, TEXT_TOWER, TOKENIZER_TENSOR
from checkpoint_converters.output import (
    appearing,
    file_problems,
    folder_problems,
    write_file,
)
from checkpoint_converters.safetensors_io import ConversionError, table_bytes, write_safetensors
from checkpoint_converters.shapes import ANY, expected_shapes, model_shapes
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.types import DTYPES

PROGRAM = "checkpoint_converters.synthetic_gemma"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

# heads, key/value heads, head dim, feed-forward width, vocabulary, window; width and layers follow
# from the LTX-2 checkpoint of that size
SIZES = {
    "tiny": dict(heads=4, kv_heads=2, head_dim=16, hidden=64, vocab=512, window=64),
    "small": dict(heads=8, kv_heads=4, head_dim=32, hidden=1024, vocab=2048, window=256),
    "pocket": dict(heads=4, kv_heads=2, head_dim=16, hidden=64, vocab=128, window=64),
    "full": dict(heads=16, kv_heads=8, head_dim=256, hidden=15360, vocab=262208, window=1024),
}
_NUM_SHARDS = 2

# what the tokenizer's merges are learnt from
SENTENCES = (
    "A woman in a red coat walks along the beach while gulls cry above the waves.",
    "The camera moves slowly towards an old wooden door; rain falls and thunder rolls far away.",
    "Two men talk quietly in a small kitchen. One of them says: I never wanted to leave.",
    "A black dog runs through tall grass in golden evening light, panting, seen from behind.",
    "Close-up of hands playing the piano, warm light, the soft sound of the keys in a large room.",
    "A street musician plays the violin as people pass by and a tram rings its bell.",
    "Snow covers the mountains; wind howls, and a lone climber steps over a narrow bridge.",
    "The engine starts with a roar and the blue car drives out of the city at night.",
)


def text_config(size: str) -> dict:
    """`text_config` of a Gemma 3 that fits the LTX-2 checkpoint of this size."""
    s, ltx = SIZES[size], synthetic.SIZES[size]
    return {
        "model_type": "gemma3_text",
        "vocab_size": s["vocab"],
        "hidden_size": ltx["text"],
        "intermediate_size": s["hidden"],
        "num_hidden_layers": ltx["states"] - 1,
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"],
        "head_dim": s["head_dim"],
        "query_pre_attn_scalar": s["head_dim"],
        "sliding_window": s["window"],
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }


def write(
    folder: str | pathlib.Path,
    size: str = "tiny",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    words: Sequence[str] | None = None,
    overwrite: bool = False,
) -> dict:
    """Writes a random Gemma 3 folder: config.json, shards with an index, tokenizer files.

    Args:
      folder: to create.
      size: a key of `SIZES`.
      seed: the weights are a function of seed and tensor name alone.
      dtype: "bfloat16" or "float32".
      words: all that the tokenizer knows; None: any text.
      overwrite: replace an earlier one.

    Returns:
      The content of config.json.

    Raises:
      ValueError: unknown size, or the vocabulary does not fit the size.
      ConversionError: the folder is there already, or there is no room for it.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    vocab, needed = (
        SIZES[size]["vocab"],
        len(SPECIAL_TOKENS) + (256 if words is None else len(words)),
    )
    if vocab < needed:
        raise ValueError(f"size {size} has {vocab} tokens, {needed} are needed; see --words")
    folder = pathlib.Path(folder).absolute()
    if problems := folder_problems(folder, overwrite, 0, PROGRAM):
        raise ConversionError(problems)
    config = {
        outputs.MARK: PROGRAM,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text_config(size),
    }
    with appearing(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        _write_weights(partial, GemmaConfig.from_metadata(config["text_config"]), seed, dtype)
        if words is not None:
            write_word_tokenizer(partial, words)
        else:
            write_tokenizer(partial, vocab)
    return config


def write_gemma4(
    path: str | pathlib.Path, size: str = "tiny", *, seed: int = 0, dtype: str = "bfloat16"
) -> dict:
    """Writes LTX-2.5's text encoder in the layout it is published in: one file with configuration,
    tokenizer, a random Gemma 4, and the text projections of the LTX-2.5 of this size.

    Args:
      path: file to create, `.safetensors`.
      size, seed, dtype: as for `write`.

    Returns:
      The text tower's configuration.
    """
    s, ltx = SIZES[size], synthetic.SIZES[size]
    text = text_config(size) | {"model_type": "gemma4_unified_text", "attention_k_eq_v": True}
    text |= {"global_head_dim": 2 * s["head_dim"], "num_global_key_value_heads": 1}
    del text["rope_scaling"], text["query_pre_attn_scalar"]
    layers = text["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    text["layer_types"] = [kinds[i % 4 == 3 or i == layers - 1] for i in range(layers)]
    shapes = model_shapes(TEXT_TOWER, GemmaConfig.from_metadata(text))
    tower = {
        "model." + key.removeprefix(GEMMA).replace("sequence.", "layers.", 1): shape
        for key, shape in shapes.items()
    }
    features = ltx["text"] * ltx["states"]
    connectors = expected_shapes(synthetic.metadata(size, "2.5"), "connectors")
    projections = {
        key: tuple(features if n == ANY else n for n in shape)
        for key, shape in connectors.items()
        if key.startswith(TEXT_PROJECTIONS)
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder), s["vocab"])
        tokenizer = (pathlib.Path(folder) / "tokenizer.json").read_bytes()
    stored = DTYPE_CHOICES[dtype]
    table = {key: (stored, shape) for key, shape in (tower | projections).items()}
    table[TOKENIZER_TENSOR] = (np.dtype(np.uint8), (len(tokenizer),))

    def values(key: str) -> np.ndarray:
        if key == TOKENIZER_TENSOR:
            return np.frombuffer(tokenizer, np.uint8)
        shape = table[key][1]
        noise = synthetic.noise(key, shape, seed)
        if len(shape) == 1 and key in tower:  # scales of norms and layers
            return (1 + 0.1 * noise).astype(stored)
        return (noise * shape[-1] ** -0.5).astype(stored)

    config = {"model_type": "gemma4_unified", "text_config": text}
    strings = {"gemma_config": json.dumps(config), outputs.MARK: PROGRAM}
    write_file(pathlib.Path(path).absolute(), table, strings, values)
    return text


def _write_weights(folder: pathlib.Path, config: GemmaConfig, seed: int, dtype: str) -> None:
    shapes = model_shapes(TEXT_TOWER, config)

    def values(name: str) -> np.ndarray:
        shape = shapes[name]
        # norms are applied as 1 + w; all others have their inputs on the last axis
        scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        return (scale * synthetic.noise(name, shape, seed)).astype(DTYPE_CHOICES[dtype])

    names = list(shapes)
    weight_map, total = {}, 0
    for i in range(_NUM_SHARDS):
        file = f"model-{i + 1:05d}-of-{_NUM_SHARDS:05d}.safetensors"
        chosen = names[i * len(names) // _NUM_SHARDS : (i + 1) * len(names) // _NUM_SHARDS]
        table = {name: (DTYPE_CHOICES[dtype], shapes[name]) for name in chosen}
        write_safetensors(folder / file, table, {"format": "pt"}, values)
        weight_map |= dict.fromkeys(chosen, file)
        total += table_bytes(table)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json with Gemma's conventions.

    Ids 0 to 3 are `SPECIAL_TOKENS`, 256 byte tokens follow, then what BPE learns from a few
    sentences, at most `vocab_size` in all. A space becomes "▁", and <bos> is put first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    reserved = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(reserved), show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokens = reserved + sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _save_tokenizer(folder, tokenizer)


def write_word_tokenizer(folder: pathlib.Path, words: Sequence[str]) -> None:
    """Writes the files of a tokenizer that knows the given words, a token each.

    Ids 0 to 3 are `SPECIAL_TOKENS`, the words follow in their order. Case does not matter, nor does
    anything but the letters a to z; any other word is <unk>, and <bos> is put first.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers
    from tokenizers import pre_tokenizers as pre

    ids = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre.Split(Regex("[^a-z]+"), "removed")
    _save_tokenizer(folder, tokenizer)


def _save_tokenizer(folder: pathlib.Path, tokenizer) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS}
    settings |= {"add_bos_token": True, "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.synthetic_gemma", __doc__)
    parser.add_argument("--gemma4", action="store_true", help="LTX-2.5's, a .safetensors file")
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to create")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--words", type=pathlib.Path, help="file of all words there are, one a line"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one")
    args = parser.parse_args(argv)
    stay_on_host()
    with programs.when_interrupted("nothing was written"):
        if args.gemma4:
            if args.words:
                parser.error("--words has no effect with --gemma4")
            output = args.output.absolute()
            if problems := file_problems(output, args.overwrite, 0, PROGRAM):
                raise ConversionError(problems)
            write_gemma4(output, args.size, seed=args.seed, dtype=args.dtype)
            print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
            return 0
        words = args.words.read_text().split() if args.words else None
        options = {"seed": args.seed, "dtype": args.dtype, "overwrite": args.overwrite}
        write(args.output, args.size, words=words, **options)
    num_bytes = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{args.output}: {num_bytes / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
