"""Proposes meshes and policies for a machine, with memory and time per step.

    python -m launch.plan --target v6e:8x8 --stage stage3
    python -m launch.plan --target h100:32 --stage stage1 --batch-size 64 --height 704 --width 1280
    python -m launch.plan --stage stage3 --smallest          # on how many of each is it possible?

By arithmetic alone: nothing is compiled, no device is needed. docs/scaling.md compares the figures
with those of compiled programs.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from launch import dry_run
from omniforcing_jax import programs
from omniforcing_jax.distributed.partitioning import parse_mesh
from omniforcing_jax.io import checkpoints
from omniforcing_jax.scaling import planning
from omniforcing_jax.scaling.devices import EXAMPLES, GIB, Target
from omniforcing_jax.scaling.planning import MeshProposal
from omniforcing_jax.training.config.settings import STAGES

# Sizes that can be rented, for --smallest.
MACHINES = {
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "h100": ("1", "8", "16", "32", "64", "128"),
    "h200": ("1", "8", "16", "32", "64"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.plan", __doc__)
    add = parser.add_argument
    add("--target", help=f"machine: {EXAMPLES}")
    add("--stage", choices=STAGES, default="stage3")
    add("--variant", default="19b", help="of the stage's config file (default 19b)")
    add("--batch-size", type=int, help="clips per step (default: the config's)")
    add("--height", type=int, help="pixels (default: the config's)")
    add("--width", type=int)
    add("--blocks", type=int, help="seconds of a clip, roughly (default: the config's)")
    add("--steps", type=int, help="training steps, for hours and cost (default: the config's)")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the config")
    add("--show", type=int, default=5, help="proposals to print (default 5)")
    add("--smallest", action="store_true", help="the smallest machine of each kind that fits")
    add("--compare", type=pathlib.Path, metavar="JSON", help="with results of launch.aot, and exit")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict:
    """Settings of the config that the command line changes."""
    named = {"batch_size": args.batch_size, "clip.height": args.height, "clip.width": args.width}
    named |= {"clip.blocks": args.blocks}
    if args.stage == "stage3":
        named["rollout_blocks"] = args.blocks
    if args.blocks is not None:
        named["student.window"] = max(args.blocks - 2, 1)  # as long as training allows
    changes = {name: value for name, value in named.items() if value is not None}
    return changes | dry_run.parse_settings(args.set)


def propose(
    stage: str, target: Target, variant: str, changes: Mapping[str, Any], slices: int = 1
) -> list[MeshProposal]:
    """Every mesh and policy for a stage on a target, fastest estimate first.

    Args:
      changes: settings that differ from the variant's, such as {"batch_size": 64}.
      slices: into how many of them, connected by the data centre's network, the target is split.

    Raises:
      ValueError: a setting that there is not, or no mesh is possible.
    """
    parts = (changes["microbatches"],) if "microbatches" in changes else planning.MICROBATCHES
    return planning.propose(
        dry_run.stage_config(stage, variant, changes),
        dry_run.make_experiment,
        target,
        slices=slices,
        microbatches=parts,
    )


def fitting(found: list[MeshProposal], target: Target) -> list[MeshProposal]:
    """Those that leave a tenth of the memory free."""
    return [p for p in found if target.device.holds(p.bytes)]


def table(found: list[MeshProposal], target: Target, steps: int, show: int) -> str:
    """The best proposals as text."""
    hbm, good = target.device.hbm, fitting(found, target)
    lines = [
        f"{target.name}: {target.num_devices} devices with {hbm / GIB:.1f} GiB; "
        f"{len(good)} of {len(found)} possible settings stay below 90 %",
    ]
    shown = good[:show]
    if not good:
        shown = sorted(found, key=lambda p: p.bytes)[:1]
        lines.append("none fits; the smallest is")
    header = (
        "mesh", "microbatches", "weights in rollouts", "GiB", "of HBM", "compute s", "network s",
        "step s, from", "to", "MFU", f"{steps:,} steps", "list price",
    )  # fmt: skip
    rows = [header]
    for p in shown:
        times = [f"{p.step[k]:.2f}" for k in ("compute", "communication", "overlapped", "summed")]
        hours = p.step["summed"] * steps / 3600
        rows.append(
            (
                dry_run.mesh_text(p.mesh),
                str(p.microbatches),
                "whole" if p.gather_weights else "by layer",
                f"{p.bytes / GIB:.1f}",
                f"{p.bytes / hbm:.0%}",
                *times,
                f"{p.step['mfu_summed']:.0%}",
                f"{hours:.1f} h",
                f"${hours * target.num_devices * target.device.dollars:,.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if shown:
        lines += ["", "memory per device of the first"]
        lines += [f"  {name:<45}{n / GIB:>8.2f} GiB" for name, n in shown[0].memory.items()]
    return "\n".join(lines)


def smallest(args: argparse.Namespace, changes: dict, steps: int) -> str:
    """The smallest machine of each kind on which the stage fits, with its best proposal."""
    lines = []
    for kind, shapes in MACHINES.items():
        for shape in shapes:
            target = Target.parse(f"{kind}:{shape}")
            found = propose(args.stage, target, args.variant, changes)
            if fitting(found, target):
                lines += [*table(found, target, steps, show=1).splitlines()[:3], ""]
                break
        else:
            lines += [f"{kind}: does not fit on {shapes[-1]} or less", ""]
    return "\n".join(lines)


def compare(file: pathlib.Path) -> str:
    """Planned against compiled, as a Markdown table: peak memory, and bytes taken in per step."""
    lines = [
        "| program, target | mesh | peak, GiB: planned / compiled | error "
        "| sent per step, GB: planned / compiled | error |",
        "|---|---|---|---|---|---|",
    ]
    for r in checkpoints.parse_json(file, "a list of results of launch.aot", list):
        if not r["step"] or r["program"] == "stream":
            continue
        target = Target.parse(r["target"])
        mesh = parse_mesh(r["mesh"])
        changes, variant = r["settings"], r.get("variant")
        if variant is None:  # compiled when gradients were added up in the compute dtype
            changes, variant = {"compute.reduce_dtype": "bfloat16"} | changes, "19b"
        c = dry_run.stage_config(r["program"], variant, changes, mesh)
        planned = planning.evaluate(dry_run.make_experiment(c, target.num_devices), target)
        peak = max(part["peak"] for part in r["parts"].values())
        share = {"generator_step": 1 / c.get("critic_updates", 1)}
        sent, moved = sum(planned.sent.values()), 0.0
        for name, part in r["parts"].items():
            moved += sum(part["moved"].values()) * share.get(name, 1.0)
        error = sent / moved - 1 if moved else 0.0  # one device sends nothing
        lines.append(
            f"| {r['program']}{'' if variant == '19b' else f' {variant}'}, {r['target']} "
            f"| {r['mesh']} "
            f"| {planned.bytes / GIB:.1f} / {peak / GIB:.1f} | {planned.bytes / peak - 1:+.0%} "
            f"| {sent / 1e9:.0f} / {moved / 1e9:.0f} | {error:+.0%} |"
        )
    return "\n".join(lines)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if nothing fits, 2 for wrong arguments."""
    args = parse_arguments(argv)
    if args.compare:
        print(compare(args.compare))
        return 0
    changes = settings(args)
    steps = args.steps or dry_run.stage_config(args.stage, args.variant).num_steps
    if args.smallest:
        print(smallest(args, changes, steps))
        return 0
    if not args.target:
        raise ValueError("name a machine with --target, or ask for --smallest")
    target = Target.parse(args.target)
    if target.device is None:
        raise ValueError(f"plans are for TPUs and GPUs, not for {target.name}")
    found = propose(args.stage, target, args.variant, changes)
    if not found:
        raise ValueError(
            "no mesh is possible: the batch must be a multiple of fsdp x microbatches, and "
            "tensor x sequence must divide the heads"
        )
    print(table(found, target, steps, args.show))
    return 0 if fitting(found, target) else 1


if __name__ == "__main__":
    sys.exit(main())
