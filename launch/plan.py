"""Proposes meshes and policies for a machine, with memory and time per step.

    python -m launch.plan --target v6e:8x8 --stage stage3
    python -m launch.plan --target h100:32 --stage stage1 --batch-size 64 --height 704 --width 1280
    python -m launch.plan --stage stage3 --smallest          # on how many of each is it possible?

By arithmetic alone: nothing is compiled, no device is needed. docs/scaling.md compares the figures
with those of compiled programs.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from omniforcing_jax.scaling import aot, cost, dry_run, planning, proposals
from omniforcing_jax.scaling import devices as hardware
from omniforcing_jax.training.config.settings import STAGES

# Sizes that can be rented, for --smallest.
MACHINES = {
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "h100": ("8", "16", "32", "64", "128"),
    "h200": ("8", "16", "32", "64"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m launch.plan")
    add = parser.add_argument
    add("--target", help=f"machine: {hardware.EXAMPLES}")
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
    for pair in args.set:
        name, _, value = pair.partition("=")
        changes[name] = json.loads(value)
    return changes


def table(found: list[proposals.Proposal], target: str, steps: int, show: int) -> str:
    """The best proposals as text."""
    kind, _ = hardware.parse(target)
    device, devices = hardware.DEVICES[kind], hardware.device_count(target)
    limit = 0.9 * device.hbm
    fitting = [p for p in found if p.bytes <= limit]
    lines = [
        f"{target}: {devices} devices with {device.hbm / hardware.GIB:.1f} GiB; "
        f"{len(fitting)} of {len(found)} possible settings stay below 90 %",
    ]
    shown = fitting[:show]
    if not fitting:
        shown = sorted(found, key=lambda p: p.bytes)[:1]
        lines.append("none fits; the smallest is")
    header = (
        "mesh", "microbatches", "weights in rollouts", "GiB", "of HBM", "compute s", "network s",
        "step s, from", "to", "MFU", f"{steps:,} steps", "list price",
    )  # fmt: skip
    rows = [header]
    for p in shown:
        hours = p.seconds[1] * steps / 3600
        rows.append(
            (
                ",".join(f"{k}={v}" for k, v in p.mesh.items() if v > 1) or "1",
                str(p.microbatches),
                "whole" if p.gather_weights else "by layer",
                f"{p.bytes / hardware.GIB:.1f}",
                f"{p.bytes / device.hbm:.0%}",
                f"{p.parts['compute']:.2f}",
                f"{p.parts['communication']:.2f}",
                f"{p.seconds[0]:.2f}",
                f"{p.seconds[1]:.2f}",
                f"{p.mfu:.0%}",
                f"{hours:.1f} h",
                f"${hours * devices * device.dollars:,.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    if shown:
        lines += ["", "memory per device of the first"]
        lines += [
            f"  {name:<45}{size / hardware.GIB:>8.2f} GiB" for name, size in shown[0].memory.items()
        ]
    return "\n".join(lines)


def smallest(args: argparse.Namespace, changes: dict, steps: int) -> str:
    """The smallest machine of each kind on which the stage fits, with its best proposal."""
    lines = []
    for kind, shapes in MACHINES.items():
        for shape in shapes:
            found = proposals.propose(
                args.stage, f"{kind}:{shape}", variant=args.variant, changes=changes
            )
            limit = 0.9 * hardware.DEVICES[kind].hbm
            if any(p.bytes <= limit for p in found):
                text = table(found, f"{kind}:{shape}", steps, show=1)
                lines += [*text.splitlines()[:3], ""]
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
    for r in json.loads(file.read_text()):
        if not r["step"] or r["program"] == "stream":
            continue
        kind, _ = hardware.parse(r["target"])
        mesh = {name: int(n) for name, n in (pair.split("=") for pair in r["mesh"].split(","))}
        # these rows were compiled when gradients of weights were added up in the compute dtype
        changes = {"compute.reduce_dtype": "bfloat16"} | r["settings"]
        c = aot.stage_config(r["program"], mesh, "19b", changes)
        devices = hardware.device_count(r["target"])
        e = dry_run.make_experiment(c, devices)
        planned = proposals.evaluate(e, kind, hardware.DEVICES[kind], devices)
        traffic = cost.traffic(e, cost.step(e), planning.make_plan(e).parameters["generator"])
        sent = sum(dataclasses.astuple(traffic)) / 1e9
        peak = max(part["peak"] for part in r["parts"].values()) / hardware.GIB
        share = {"generator_step": 1 / c.get("critic_updates", 1)}
        moved = sum(
            sum(part["moved"].values()) * share.get(name, 1.0) for name, part in r["parts"].items()
        )
        lines.append(
            f"| {r['program']}, {r['target']} | {r['mesh']} "
            f"| {planned.bytes / hardware.GIB:.1f} / {peak:.1f} "
            f"| {planned.bytes / hardware.GIB / peak - 1:+.0%} "
            f"| {sent:.0f} / {moved / 1e9:.0f} | {sent * 1e9 / moved - 1:+.0%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if nothing fits, 2 for wrong arguments."""
    args = parse_arguments(argv)
    if args.compare:
        print(compare(args.compare))
        return 0
    try:
        changes = settings(args)
        steps = args.steps or proposals.steps_of(args.stage, args.variant)
        if args.smallest:
            print(smallest(args, changes, steps))
            return 0
        if not args.target:
            raise ValueError("name a machine with --target, or ask for --smallest")
        found = proposals.propose(args.stage, args.target, variant=args.variant, changes=changes)
        if not found:
            raise ValueError(
                "no mesh is possible: the batch must be a multiple of fsdp x microbatches, and "
                "tensor x sequence must divide the heads"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found, args.target, steps, args.show))
    limit = 0.9 * hardware.DEVICES[hardware.parse(args.target)[0]].hbm
    return 0 if any(p.bytes <= limit for p in found) else 1


if __name__ == "__main__":
    sys.exit(main())
