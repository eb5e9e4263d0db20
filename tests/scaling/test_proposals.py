"""Plans: what is possible on a machine, by arithmetic that is held against compiled programs."""

import pathlib

import pytest

from launch import plan
from omniforcing_jax.scaling import aot, cost, dry_run, proposals
from omniforcing_jax.scaling import devices as hardware
from omniforcing_jax.training.config.settings import ConfigError

COMPILED = pathlib.Path(__file__).parents[2] / "docs" / "scaling.json"


def experiment(stage: str, devices: int, mesh: dict, **changes):
    return dry_run.make_experiment(aot.stage_config(stage, mesh, "19b", changes), devices)


def test_work_of_a_stage_by_hand():
    """Stage III in units of passes: 6 blocks, 4 steps, exit after 2.5 on average, one refresh."""
    work = cost.updates(experiment("stage3", 64, {"fsdp": 32, "sequence": 2}))
    rollout = 6 * 3.5
    assert work["critic"].gathers == rollout + 2
    assert work["generator"].gathers == rollout + 2 * 6 + 2
    assert work["critic"].reductions == work["generator"].reductions == 1
    gathered = cost.updates(
        experiment("stage3", 64, {"fsdp": 32, "sequence": 2}, **{"compute.gather_weights": True})
    )
    assert gathered["critic"].gathers == 1 + 2
    assert gathered["critic"].flops == work["critic"].flops
    step = cost.step(experiment("stage3", 64, {"fsdp": 32, "sequence": 2}))
    assert step.flops == pytest.approx(work["critic"].flops + work["generator"].flops / 5)


def test_traffic_by_hand():
    """One pass and one gradient: weights in bfloat16 and gradients in float32, and half of the
    tokens' exchanges leave."""
    e = experiment("stage2", 32, {"fsdp": 16, "sequence": 2})
    work = cost.Work(0.0, 0.0, gathers=1, reductions=1, passes=((6144, 1.0),))
    t = cost.traffic(e, work, weights=10**9)
    assert t.fsdp == pytest.approx((2e9 + 4e9) * 31 / 32)
    assert (t.data, t.tensor) == (0, 0)
    rows = 32 / 16
    assert t.sequence == pytest.approx(48 * rows * 3072 * (6 * 4096 + 4 * 2048) * 2 * 1 / 2)


def test_plan_against_compiled_programs():
    """Peak and bytes of the planned steps, against those that were compiled (docs/scaling.json)."""
    rows = [line for line in plan.compare(COMPILED).splitlines() if line.startswith("| stage")]
    assert len(rows) >= 6
    for row in rows:
        peak, sent = (float(cell.strip().rstrip("%")) / 100 for cell in row.split("|")[4:7:2])
        assert abs(peak) < 0.15 and abs(sent) < 0.15, row


def test_proposals_are_possible_and_sorted():
    found = proposals.propose("stage2", "v6e:2x4", changes={"batch_size": 8})
    assert len(found) > 10
    assert [p.seconds[1] for p in found] == sorted(p.seconds[1] for p in found)
    for p in found:
        assert p.mesh["fsdp"] * p.mesh["sequence"] * p.mesh["tensor"] == 8
        assert 8 % (p.mesh["fsdp"] * p.microbatches) == 0
        assert 0 < p.mfu < 1 and p.seconds[0] < p.seconds[1]
    more = [p for p in found if p.microbatches == 1 and p.mesh["tensor"] == 1]
    split = {p.mesh["sequence"]: p for p in more}
    # the same devices hold the same weights; only activations depend on how tokens are split
    assert split[1].memory["generator: masters"] == split[8].memory["generator: masters"]


def test_command_line(capsys):
    small = ["--set", "clip.blocks=2", "--batch-size", "4", "--stage", "stage2"]
    assert plan.main(["--target", "v5p:2x2x2", *small]) == 0
    out = capsys.readouterr().out
    assert "microbatches" in out and "memory per device of the first" in out
    assert plan.main(["--target", "v5e:2x2", *small]) == 1
    assert "none fits" in capsys.readouterr().out
    for arguments, expected in (
        (["--target", "abacus"], "there are, for example"),
        (["--stage", "stage2"], "name a machine"),
        (["--target", "v5p:2x2x1", "--set", "colour=1"], "colour"),
    ):
        assert plan.main(arguments) == 2
        assert expected in capsys.readouterr().err


def test_heads_limit_the_mesh():
    with pytest.raises(ConfigError, match="32 heads"):
        experiment("stage2", 64, {"fsdp": 1, "sequence": 64})


def test_device_counts():
    assert hardware.device_count("tpu7x:2x2x1") == 8
    assert hardware.device_count("v6e:16x16") == 256
    assert hardware.device_count("h100:32") == 32
