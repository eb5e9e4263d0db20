"""Compiles 19B training steps and the sampler for machines that are not here, and measures them.

    python -m launch.aot --target v5p:4x4x4 --program stage3 --mesh fsdp=32,sequence=2
    python -m launch.aot --target h100:32 --program stage1 --mesh fsdp=32
    python -m launch.aot --all --output docs/scaling.json    # every row of docs/scaling.md
    python -m launch.aot --target h200:1 --program stream --mesh tensor=1 --thorough --traffic

The sampler's programs are the block step of a stream (`stream`) and a pass over a clip (`forward`).
Nothing is allocated, no device needed: weights, optimizer states and batches are shapes. A TPU
compiler refuses what does not fit into the chips' memory; for GPUs the peak is compared with what
they have. Prints, per device, arguments, temporaries and peak; what travels between devices; and a
roofline estimate of the step's time; with --traffic, what each part reads and writes in memory,
and the largest data movements by their place in the model. TPUs need libtpu, GPUs jax's CUDA plugin
(see `omniforcing_jax.scaling.devices`).
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from launch import dry_run
from omniforcing_jax import programs
from omniforcing_jax.distributed.partitioning import parse_mesh
from omniforcing_jax.io import checkpoints
from omniforcing_jax.scaling import aot, devices, traffic
from omniforcing_jax.scaling.planning import ACHIEVABLE
from omniforcing_jax.training.config.settings import STAGES

# What docs/scaling.md shows: (target, program, mesh, settings).
CASES = (
    ("v5p:4x4x4", "stage3", "fsdp=32,sequence=2", {}),
    ("v6e:8x8", "stage3", "fsdp=32,sequence=2", {}),
    ("v5p:2x4x4", "stage1", "fsdp=16,sequence=2", {}),
    ("v6e:4x8", "stage1", "fsdp=16,sequence=2", {"microbatches": 2}),
    ("v5p:2x4x4", "stage2", "fsdp=16,sequence=2", {}),
    ("v6e:4x8", "stage2", "fsdp=16,sequence=2", {"microbatches": 2}),
    ("tpu7x:2x2x4", "stage2", "fsdp=16,sequence=2", {}),
    ("tpu7x:2x2x4", "stage3", "fsdp=16,sequence=2", {"microbatches": 2}),
    ("h100:8", "stage2", "fsdp=8", {"microbatches": 4}),
    ("h100:32", "stage1", "fsdp=8,tensor=4", {}),
    ("h100:32", "stage2", "fsdp=16,sequence=2", {"microbatches": 2}),
    ("h100:32", "stage3", "fsdp=8,tensor=4", {}),
    ("h200:32", "stage3", "fsdp=8,tensor=4", {"compute.gather_weights": True}),
    ("h200:32", "stage3", "fsdp=4,tensor=4", {"compute.separate_scores": True}),
    ("h200:8", "stage1", "fsdp=8", {}),
    ("h200:8", "stage2", "fsdp=8", {"microbatches": 4}),
    ("h200:8", "stage3", "fsdp=4,tensor=2", {"microbatches": 8}),
    ("v5p:1x1x1", "stream", "tensor=1", {}),
    ("v6e:1x2", "stream", "tensor=2", {}),
    ("h100:1", "stream", "tensor=1", {}),
)
# Adapters over one base, variant 19b-lora.
ADAPTER_CASES = (
    ("h200:1", "stage3", "fsdp=1", {"microbatches": 32}),
    ("h100:1", "stage3", "fsdp=1", {"microbatches": 32, "compute.base_precision": "int8"}),
    ("h100:8", "stage3", "fsdp=4,tensor=2", {"microbatches": 2}),
    ("v5p:2x2x1", "stage3", "fsdp=4", {"microbatches": 4}),
    ("v6e:2x4", "stage3", "fsdp=4,tensor=2", {"microbatches": 8}),
)

RESULTS, PAGE = pathlib.Path("docs/scaling.json"), pathlib.Path("docs/scaling.md")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.aot", __doc__)
    add = parser.add_argument
    add("--target", default="cpu", help=f"machine: {devices.EXAMPLES}")
    add("--program", choices=(*STAGES, "stream", "forward"), default="stage3")
    add("--mesh", default="fsdp=-1", help="axes, such as fsdp=32,sequence=2; -1 is the rest")
    add("--variant", default="19b", help="of the stage's config file (default 19b)")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the config")
    add("--size", choices=dry_run.SIZES, default="full")
    add("--layers", type=int, help="of the transformer (default: as the size has)")
    add("--thorough", action="store_true", help="let the compiler optimize as for use: 2-4x slower")
    add("--all", action="store_true", help="compile every case of docs/scaling.md")
    add("--output", type=pathlib.Path, help="JSON file to which results are added")
    add("--table", action="store_true", help="write docs/scaling.md's table from the output file")
    add("--traffic", action="store_true", help="report what the programs move in memory")
    add("--hlo", type=pathlib.Path, help="folder for the compiled programs' text")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles one case; what was found.

    Raises:
      ValueError: the target is unknown, its compiler is missing, or the mesh or a setting is wrong.
    """
    target, mesh = devices.Target.parse(args.target), parse_mesh(args.mesh, rest=True)
    machine = target.load()
    changes = dry_run.parse_settings(args.set)
    if args.program in ("stream", "forward"):
        config = dry_run.stream_config(changes, size=args.size, layers=args.layers)
        make = aot.stream_case if args.program == "stream" else aot.forward_case
        case = make(target, machine, mesh, *config)
    else:
        c = dry_run.stage_config(args.program, args.variant, changes, mesh)
        e = dry_run.make_experiment(c, len(machine), size=args.size, layers=args.layers)
        case = aot.stage_case(e, target, machine)
    parts = {}
    for name in case.programs:
        start = time.perf_counter()
        print(f"compiling {args.program} {name} for {args.target}", file=sys.stderr, flush=True)
        try:
            part, text = aot.measure(case, name, thorough=args.thorough)
        except jax.errors.JaxRuntimeError as error:
            part, text = {"refused": aot.reason(error)}, ""
        parts[name] = part | {"seconds": round(time.perf_counter() - start, 1)}
        if args.traffic and text:
            parts[name]["traffic"] = aot.traffic_report(case, name, text)
        if args.hlo and text:
            args.hlo.mkdir(parents=True, exist_ok=True)
            file = f"{args.program}_{name}_{args.target.replace(':', '_')}.hlo"
            (args.hlo / file).write_text(text)
        print(describe_part(name, parts[name]), file=sys.stderr, flush=True)
        if "traffic" in parts[name]:
            print(traffic.describe(parts[name]["traffic"]), file=sys.stderr, flush=True)
    return {
        "target": args.target,
        "program": args.program,
        "variant": args.variant,
        "mesh": dry_run.mesh_text(case.mesh.shape),
        "settings": changes,
        "size": args.size,
        "layers": args.layers,
        "thorough": args.thorough,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "parts": parts,
        "step": aot.step_times(case, parts),
    }


def describe_part(name: str, part: dict[str, Any]) -> str:
    """A part's measurements as a line of text."""
    if "refused" in part:
        return f"  {name}: refused after {part['seconds']} s: {part['refused']}"
    arguments, temporaries, peak = _gib(part)
    share = f" ({part['peak'] / part['hbm']:.0%} of the device)" if part.get("hbm") else ""
    moved = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in part["moved"].items())
    return (
        f"  {name}: arguments {arguments:.2f}, temporaries {temporaries:.2f}, peak {peak:.2f} "
        f"GiB{share}; moved: {moved or 'nothing'}; compiled in {part['seconds']} s"
    )


def _gib(part: dict[str, Any]) -> list[float]:
    return [part[key] / devices.GIB for key in ("arguments", "temporaries", "peak")]


def describe_step(step: dict[str, float]) -> str:
    """The roofline as a line of text."""
    return (
        f"  average step: {step['flops'] / 1e15:.3g} PFLOP; compute {step['compute']:.3g} s, "
        f"memory {step['memory']:.3g} s, communication {step['communication']:.3g} s; "
        f"at least {step['overlapped']:.3g} s (MFU {step['mfu_bound']:.0%}), "
        f"about {step['summed']:.3g} s without overlap at {ACHIEVABLE:.0%} of the peak "
        f"(MFU {step['mfu_summed']:.0%})"
    )


def run_all(args: argparse.Namespace) -> int:
    """Compiles every case in a process of its own; those in the output file are kept."""
    output = args.output or RESULTS
    status = 0
    full = [("19b", case) for case in CASES]
    for variant, (target, program, mesh, settings) in [
        *full, *(("19b-lora", case) for case in ADAPTER_CASES)
    ]:  # fmt: skip
        done = read_results(output)
        case = {"target": target, "program": program, "mesh": mesh, "settings": settings}
        case["variant"] = variant
        if any(_key(case) == _key(r) for r in done):
            continue
        command = [sys.executable, "-m", "launch.aot", "--target", target, "--program", program]
        command += ["--mesh", mesh, "--variant", variant, "--output", str(output)]
        if settings:
            command += ["--set", *(f"{k}={json.dumps(v)}" for k, v in settings.items())]
        status = max(status, subprocess.run(command, check=False).returncode)
    return status


def read_results(file: pathlib.Path) -> list[dict[str, Any]]:
    """What the file holds so far; [] if there is none.

    Raises:
      ValueError: it holds something else.
    """

    def read(content: Any) -> list[dict[str, Any]]:
        _ = [_key(result) for result in content]
        return content

    what = "a list of results of launch.aot"
    return checkpoints.parse_json(file, what, read) if file.exists() else []


def _key(result: dict[str, Any]) -> tuple:
    """What makes two results the same case."""
    axes = sorted(p for p in result["mesh"].split(",") if not p.endswith("=1") and p != "1")
    settings = json.dumps(result["settings"], sort_keys=True)
    size, layers = result.get("size", "full"), result.get("layers")
    variant = result.get("variant", "19b")
    return result["target"], result["program"], variant, axes, settings, size, layers


# Kinds of messages that stand together in the table.
_COLUMNS = (
    ("all-gather",),
    ("all-reduce", "reduce-scatter"),
    ("all-to-all", "collective-permute"),
)
_START, _END = "<!-- table: python -m launch.aot --table -->", "<!-- end of table -->"


def write_table(results: pathlib.Path, page: pathlib.Path) -> None:
    """Puts the results between the marks of a Markdown page.

    Raises:
      ValueError: the page has no marks.
    """
    text = page.read_text()
    if _START not in text or _END not in text:
        raise ValueError(f"{page} needs the lines {_START!r} and {_END!r}")
    order = {("19b", *case[:2]): i for i, case in enumerate(CASES)}
    order |= {("19b-lora", *case[:2]): len(CASES) + i for i, case in enumerate(ADAPTER_CASES)}
    rows = sorted(
        read_results(results),
        key=lambda r: order.get((r.get("variant", "19b"), r["target"], r["program"]), len(order)),
    )
    lines = [
        "| program, target | mesh, settings | part | arguments / temporaries / peak, GiB "
        "| of HBM | all-gather / reduce / exchange, GB | compute / network, s | step, s | MFU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines += _table_rows(r)
    before, after = text.split(_START)[0], text.split(_END)[1]
    page.write_text(f"{before}{_START}\n" + "\n".join(lines) + f"\n{_END}{after}")


def _table_rows(r: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{k}={v}" for k, v in r["settings"].items())
    lines = []
    for i, (name, part) in enumerate(r["parts"].items()):
        adapters = " adapters" if r.get("variant", "19b").endswith("-lora") else ""
        cells = [f"{r['program']}{adapters}, {r['target']}", f"{r['mesh']} {settings}".strip()]
        cells = cells if i == 0 else ["", ""]
        if "refused" in part:
            lines.append(f"| {' | '.join(cells)} | {name} | refused | | | | | |")
            continue
        gib = " / ".join(f"{size:.1f}" for size in _gib(part))
        sent = " / ".join(
            f"{sum(part['moved'].get(kind, 0) for kind in kinds) / 1e9:.0f}" for kinds in _COLUMNS
        )
        step, times = r["step"], ["", "", ""]
        if step and i == len(r["parts"]) - 1:
            times = [
                f"{step['compute']:.2f} / {step['communication']:.2f}",
                f"{step['overlapped']:.2f} to {step['summed']:.2f}",
                f"{step['mfu_bound']:.0%} to {step['mfu_summed']:.0%}",
            ]
        share = f"{part['peak'] / part['hbm']:.0%}"
        lines.append("| " + " | ".join([*cells, name, gib, share, sent, *times]) + " |")
    return lines


def add_result(file: pathlib.Path, result: dict[str, Any]) -> None:
    """Adds a result, in the place of an older one of the same case."""
    results = read_results(file)
    results = [r for r in results if _key(r) != _key(result)] + [result]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 fits, 1 does not fit, 2 the arguments are wrong."""
    args = parse_arguments(argv)
    if args.table:
        write_table(args.output or RESULTS, PAGE)
        return 0
    if args.all:
        return run_all(args)
    if args.output:
        read_results(args.output)  # before minutes of compilation
    result = measure(args)
    if result["step"]:
        print(describe_step(result["step"]), file=sys.stderr)
    if args.output:
        add_result(args.output, result)
    else:
        print(json.dumps(result, indent=1))
    fits = all(part.get("fits", False) for part in result["parts"].values())
    return 0 if fits or args.target == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
