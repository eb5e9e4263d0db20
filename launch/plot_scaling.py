"""Draws weak scaling on paper: a training step on 16 to 4,096 devices, half a clip per device.

    python -m launch.plot_scaling --output docs/scaling.png

By the arithmetic of `launch.plan`: at every size the fastest mesh that stays below 90 % of the
memory. A slice ends where its interconnect does; beyond it `data` runs over the data centre's
network, one slice (v6e: 256 chips) a row.
"""

import pathlib
import sys

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"{error}; pictures need it: pip install -e '.[train]'") from None

from launch.dry_run import mesh_text
from launch.plan import fitting, propose
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.scaling.devices import DEVICES, Target
from omniforcing_jax.scaling.planning import MeshProposal

PROGRAM = "launch.plot_scaling"
SIZES = (16, 64, 256, 1024, 4096)
SLICES = {"v5p": 4096, "v6e": 256, "h100": 512}  # devices that weights are spread over at most
COLOURS = {"v5p": "#2f6f9f", "v6e": "#c8553d", "h100": "#5b8c5a"}


def points(kind: str, stage: str, sizes=SIZES) -> list[tuple[int, MeshProposal | None]]:
    """(devices, the fastest proposal that fits) for every size."""
    found = []
    for devices in sizes:
        target = Target.parse(f"{kind}:{devices}" + ("x1" if DEVICES[kind].torus else ""))
        slices = max(devices // SLICES[kind], 1)
        proposals = propose(stage, target, "19b", {"batch_size": devices // 2}, slices)
        found.append((devices, next(iter(fitting(proposals, target)), None)))
    return found


def draw(curves: dict[str, list], stage: str, file: pathlib.Path) -> None:
    """Time per step with its parts, and MFU, over the number of devices."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, curve in curves.items():
        there = [(n, p) for n, p in curve if p is not None]
        if not there:
            continue
        sizes = [n for n, _ in there]
        colour = COLOURS[kind]
        left.plot(sizes, [p.step["summed"] for _, p in there], "o-", color=colour, label=kind)
        network = [p.step["communication"] for _, p in there]
        left.plot(sizes, network, "--", color=colour, lw=1, label=f"{kind}: network")
        compute = [p.step["compute"] for _, p in there]
        left.plot(sizes, compute, ":", color=colour, lw=1, label=f"{kind}: compute at peak")
        mfu = [100 * p.step["mfu_summed"] for _, p in there]
        right.plot(sizes, mfu, "o-", color=colour, label=kind)
    for axes, title in ((left, f"{stage}: seconds per step"), (right, "MFU without overlap, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], fontsize=8)
        axes.set_xlabel("devices, half a clip each")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, 1.5 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
    outputs.save_picture(figure, file, PROGRAM)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("launch.plot_scaling", __doc__)
    parser.add_argument("--stage", default="stage3")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/scaling.png"))
    args = parser.parse_args(argv)
    outputs.check(args.output, program=PROGRAM, overwrite=True)
    curves = {}
    for kind in SLICES:
        print(f"{kind}", file=sys.stderr)
        curves[kind] = points(kind, args.stage)
        for devices, p in curves[kind]:
            text = "does not fit"
            if p is not None:
                text = (
                    f"{p.step['summed']:.2f} s, MFU {p.step['mfu_summed']:.0%}, "
                    f"{mesh_text(p.mesh)}, {p.microbatches} microbatches, whole={p.gather_weights}"
                )
            print(f"  {devices:>5}  {text}", file=sys.stderr)
    draw(curves, args.stage, args.output)
    print(f"{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
