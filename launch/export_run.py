"""Turns a run's generator into a checkpoint to stream from, and into one safetensors file.

Example:
  python -m launch.export_run --run runs/stage3 --output checkpoints/student
  python -m launch.export_run --run runs/stage3 --output checkpoints/student \\
      --weights params --step 1500 --safetensors student.safetensors
  python -m launch.export_run --run runs/stage3-lora --lora student_lora.safetensors

The other components (VAEs, vocoder, connectors) are copied from the converted checkpoint that the
run was trained with. What the student was trained with (layout, timesteps, cache, text length,
size, rate) goes into the new config.json and into the file, and is the default of launch.stream.
Of a run with adapters, --output has them in its weights, and --lora holds them alone.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from checkpoint_converters import adapter_files
from checkpoint_converters.export import PROGRAM as EXPORT
from checkpoint_converters.export import export
from checkpoint_converters.output import (
    appearing,
    file_problems,
    folder_problems,
    write_file,
)
from checkpoint_converters.safetensors_io import ConversionError, table_bytes
from launch.options import add_verify
from omniforcing_jax import Transformer, TransformerConfig, programs
from omniforcing_jax.io import checkpoints, checksums, outputs
from omniforcing_jax.models.transformer.model import init_boxed_params, init_params
from omniforcing_jax.sampling.trained import ENTRY
from omniforcing_jax.training import adapters
from omniforcing_jax.training.config.run_config import RunConfig
from omniforcing_jax.training.training_checkpoints import (
    FOLDER,
    latest_step,
    load_generator,
)
from omniforcing_jax.types import DTYPES

PROGRAM = "launch.export_run"
# fields of TransformerConfig in which a student may differ from its teacher: their metadata keys
_METADATA_KEYS = {
    "rope_type": "rope_type",
    "rope_frequency_dtype": "frequencies_precision",
    "cross_gate_timestep_scale": "av_ca_timestep_scale_multiplier",
    "num_audio_sinks": "num_audio_sink_tokens",
    "sink_rope": "sink_rope",
    "extra_qk_norm": "extra_qk_norm",
    "tanh_gated_attention": "tanh_gated_attention",
}


def student_content(
    base: dict[str, Any], run: RunConfig, source: str
) -> tuple[dict[str, Any], TransformerConfig]:
    """config.json of the exported checkpoint, and the transformer that it describes.

    Args:
      base: content of the checkpoint that the run was trained with.
      run: what it was trained with.
      source: what to say about the transformer's origin.

    Raises:
      ValueError: the student is not a variant of the base's transformer.
    """
    student = run.settings["student_config"]
    before = base["config"]["transformer"]
    section = before | {key: student[field] for field, key in _METADATA_KEYS.items()}
    described = TransformerConfig.from_metadata(section, base["model_version"])
    now = json.loads(json.dumps(dataclasses.asdict(described)))
    wrong = [f"{name} is {student[name]!r}, not {value!r}"
             for name, value in now.items() if student[name] != value]  # fmt: skip
    if wrong:
        raise ValueError(f"the run's student is no variant of --base: {'; '.join(wrong)}")
    trained = run.trained
    content = base | {
        outputs.MARK: PROGRAM,
        "family": "omniforcing" if trained.causal else base["family"],
        # the connectors were not trained: they keep the settings they came with
        "config": base["config"]
        | {
            "transformer": section,
            "connectors": checkpoints.component_metadata(base, "connectors"),
        },
        ENTRY: trained.to_json(),
        "source": [*base["source"], {"name": source, "bytes": 0}],
    }
    return content, described


def export_run(
    run: pathlib.Path,
    output: pathlib.Path,
    *,
    base: pathlib.Path | None = None,
    weights: str = "ema",
    step: int | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    verify: bool = True,
) -> int:
    """Writes a converted checkpoint with the run's generator.

    Args:
      run: the run's folder.
      output: folder to create.
      base: converted checkpoint that the run was trained with; None: where it was then.
      weights: "ema" or "params".
      step: None takes the latest complete checkpoint.
      dtype: to store.
      overwrite: replace an earlier checkpoint in `output`.
      verify: compare what is read with its checksums first.

    Returns:
      The step that was exported.

    Raises:
      ValueError, FileNotFoundError: the run or the base is not what it should be.
      ConversionError: the output cannot be written.
      DamagedFile: a file is not what was written, or is missing.
    """
    if not (run / FOLDER).is_dir():
        raise ValueError(f"{run} is not a run: it has no config.json and {FOLDER}/")
    config = RunConfig.read(run)
    base = pathlib.Path(config.checkpoint) if base is None else base
    step = latest_step(run) if step is None else step
    if step is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint yet")
    source = f"{run.resolve().name}, step {step}, {weights}"
    before = checkpoints.load_config(base)
    content, student = student_content(before, config, source)
    shapes = jax.eval_shape(lambda: init_params(Transformer(student), jax.random.key(0)))
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPES[dtype]), shapes)
    generator = load_generator(run, expected, which=weights, step=step, verify=verify)
    names = [name for name in before["components"] if name != "transformer"]
    if verify:
        checkpoints.verify_components(base, names)

    others = {
        name: pathlib.Path(checkpoints.component_folder(base, name, before)) for name in names
    }
    files = [f for folder in others.values() for f in folder.rglob("*") if f.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    num_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(generator))
    output = output.absolute()
    problems = folder_problems(output, overwrite, num_bytes, PROGRAM, [run, base])
    if problems:
        raise ConversionError(problems)
    with appearing(output) as partial:
        for name, folder in others.items():
            shutil.copytree(folder, partial / name)
        content["checksums"] = {name: checksums.write(partial / name) for name in names}
        checkpoints.save_params(partial, "transformer", generator, content)
    return step


def load_adapters(run: pathlib.Path, config: RunConfig, weights: str, step: int) -> Any:
    """What the run trained of its generator, as the tree of `training.adapters`, float32."""
    model = Transformer(config.student)
    boxed = jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))
    expected = nn.unbox(adapters.boxed_trained(boxed, config.adapters))
    return load_generator(run, expected, which=weights, step=step)


def export_lora(
    run: pathlib.Path,
    file: pathlib.Path,
    *,
    weights: str = "ema",
    step: int | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> int:
    """Writes a run's adapters as a LoRA with the keys of LTX-2's trainer.

    Its metadata say rank and alpha (which is in `lora_B` already) by product, the fingerprint of
    the base, and as "trained" what a checkpoint's config.json says: layout, timesteps, cache, ...

    Returns:
      The step that was exported.

    Raises:
      ValueError, FileNotFoundError: the run has no adapters, or trains what a LoRA cannot hold.
      ConversionError: the file cannot be written.
    """
    config = RunConfig.read(run)
    step = latest_step(run) if step is None else step
    if step is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint yet")
    if not config.adapters.used:
        raise ValueError(f"{run} trained all weights; a LoRA is made of a run with adapters")
    tensors = adapter_files.tensors(load_adapters(run, config, weights, step), config.adapters)
    number = np.dtype(DTYPES[dtype])
    table = {key: (number, make().shape) for key, make in tensors.items()}
    file = file.absolute()
    if problems := file_problems(file, overwrite, table_bytes(table), PROGRAM, [run]):
        raise ConversionError(problems)
    products = config.adapters.products
    strings = {
        "rank": json.dumps({name: config.adapters.rank(name) for name in products}),
        "alpha": json.dumps({name: config.adapters.alpha(name) for name in products}),
        "model_version": config.model_version,
        adapter_files.BASE: config.settings.get("base") or "",
        ENTRY: json.dumps(config.trained.to_json()),
        outputs.MARK: PROGRAM,
    }
    write_file(file, table, strings, lambda key: tensors[key]().astype(number))
    return step


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("launch.export_run", __doc__)
    add = parser.add_argument
    add("--run", type=pathlib.Path, required=True, help="folder of a training run")
    add("--output", type=pathlib.Path, help="folder to create")
    add("--base", type=pathlib.Path, help="its converted checkpoint, if that was moved")
    add("--weights", choices=("ema", "params"), default="ema", help="average or raw weights")
    add("--step", type=int, help="by default the latest checkpoint's")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--safetensors", type=pathlib.Path, help="also write one file in the official layout")
    add("--lora", type=pathlib.Path, help="write the adapters of a run alone, as a LoRA")
    add("--overwrite", action="store_true", help="replace what is there")
    add_verify(parser)
    args = parser.parse_args(argv)
    if not args.output and (args.safetensors or not args.lora):
        parser.error("name the folder to create with --output, or a file with --lora")
    if args.lora:
        how = {"weights": args.weights, "step": args.step, "dtype": args.dtype}
        with programs.when_interrupted("nothing was written"):
            step = export_lora(args.run, args.lora, **how, overwrite=args.overwrite)
        print(f"{args.lora}: adapters of {args.run}, {args.weights}, step {step}")
    if not args.output:
        return 0
    file = args.safetensors and args.safetensors.absolute()
    inputs = [args.run, args.base]
    with programs.when_interrupted("nothing was written"):
        if file and (problems := file_problems(file, args.overwrite, 0, EXPORT, inputs)):
            raise ConversionError(problems)
        step = export_run(
            args.run,
            args.output,
            base=args.base,
            weights=args.weights,
            step=args.step,
            dtype=args.dtype,
            overwrite=args.overwrite,
            verify=args.verify,
        )
    print(f"{args.output}: {args.weights} of {args.run}, step {step}")
    if not file:
        return 0
    left = (
        f"{file} was not written; {args.output} was, and is complete: "
        "checkpoint_converters.export makes the file from it"
    )
    with programs.when_interrupted(left):
        try:
            export(args.output, file, overwrite=args.overwrite, show_progress=True)
        except ConversionError as error:
            raise ValueError("\n".join([left, *error.problems])) from error
    print(f"{args.safetensors}: {file.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
