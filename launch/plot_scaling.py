"""Draws weak scaling on paper: a training step on 16 to 4,096 devices, half a clip per device.

    python -m launch.plot_scaling --output docs/scaling.png

By the arithmetic of `launch.plan`: at every size the fastest mesh that stays below 90 % of the
memory. A slice ends where its interconnect does; beyond it `data` runs over the data centre's
network, one slice (v6e: 256 chips) a row.
"""

import argparse
import pathlib
import sys

from omniforcing_jax.scaling import devices as hardware
from omniforcing_jax.scaling import proposals
from omniforcing_jax.streaming.contact_sheet import new_figure

SIZES = (16, 64, 256, 1024, 4096)
SLICES = {"v5p": 4096, "v6e": 256, "h100": 512}  # devices that weights are spread over at most
COLOURS = {"v5p": "#2f6f9f", "v6e": "#c8553d", "h100": "#5b8c5a"}


def points(kind: str, stage: str, sizes=SIZES) -> list[tuple[int, proposals.Proposal | None]]:
    """(devices, the fastest proposal that fits) for every size."""
    found = []
    for devices in sizes:
        slices = max(devices // SLICES[kind], 1)
        all_of_them = proposals.propose(
            stage, _target(kind, devices), changes={"batch_size": devices // 2}, slices=slices
        )
        limit = 0.9 * hardware.DEVICES[kind].hbm
        fitting = [p for p in all_of_them if p.bytes <= limit]
        found.append((devices, fitting[0] if fitting else None))
    return found


def _target(kind: str, devices: int) -> str:
    return f"{kind}:{devices}" + ("x1" if kind in hardware.TPUS else "")


def draw(curves: dict[str, list], stage: str, file: pathlib.Path) -> None:
    """Time per step with its parts, and MFU, over the number of devices."""
    figure = new_figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, curve in curves.items():
        there = [(n, p) for n, p in curve if p is not None]
        if not there:
            continue
        sizes = [n for n, _ in there]
        colour = COLOURS[kind]
        left.plot(sizes, [p.seconds[1] for _, p in there], "o-", color=colour, label=kind)
        network = [p.parts["communication"] for _, p in there]
        left.plot(sizes, network, "--", color=colour, lw=1, label=f"{kind}: network")
        compute = [p.parts["compute"] for _, p in there]
        left.plot(sizes, compute, ":", color=colour, lw=1, label=f"{kind}: compute at peak")
        right.plot(sizes, [100 * p.mfu for _, p in there], "o-", color=colour, label=kind)
    for axes, title in ((left, f"{stage}: seconds per step"), (right, "MFU without overlap, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], fontsize=8)
        axes.set_xlabel("devices, half a clip each")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, 1.5 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.plot_scaling")
    parser.add_argument("--stage", default="stage3")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/scaling.png"))
    args = parser.parse_args(argv)
    curves = {}
    for kind in SLICES:
        print(f"{kind}", file=sys.stderr)
        curves[kind] = points(kind, args.stage)
        for devices, p in curves[kind]:
            mesh = "does not fit" if p is None else ",".join(
                f"{k}={v}" for k, v in p.mesh.items() if v > 1
            )  # fmt: skip
            seconds = "" if p is None else f"{p.seconds[1]:.2f} s, MFU {p.mfu:.0%}, "
            policy = (
                "" if p is None else f", {p.microbatches} microbatches, whole={p.gather_weights}"
            )
            print(f"  {devices:>5}  {seconds}{mesh}{policy}", file=sys.stderr)
    try:
        draw(curves, args.stage, args.output)
    except ValueError as error:  # no matplotlib
        parser.error(str(error))
    print(f"{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
