"""The shell launchers: what they would run, what they refuse, when they start a run again."""

import json
import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from launch import serve

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = {
    "local.sh": {},
    "tpu_pod.sh": {"TPU_NAME": "pod", "BUCKET": "gs://bucket", "ACCELERATOR": "v5p-128"},
    "xpk.sh": {
        "CLUSTER": "cluster",
        "PROJECT": "project",
        "ZONE": "zone",
        "TPU_TYPE": "v5p-128",
        "BUCKET": "gs://bucket",
    },
    "slurm.sbatch": {},
}
# a flag that a shell would take apart
FLAGS = ["--config=configs/stage3.py:19b", "--config.score.video_cfg=(1.0, 3.5)"]


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a launcher without running what it launches."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        env=clean | SCRIPTS[script] | {"DRY_RUN": "1"} | environment,
        timeout=240,
    )


def commands(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """Commands that a launcher would run, taken apart as a shell would."""
    done = launch(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line.replace("$'", "'")) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_syntax(script):
    path = ROOT / "launch" / script
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script == "common.sh" or os.access(path, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_words(script):
    for arguments in (["--help"], []):
        done = launch(script, *arguments)
        assert done.returncode == 0 and "DRY_RUN=1" in done.stdout
        assert "SBATCH" not in done.stdout and "set -e" not in done.stdout
    words = {"tpu_pod.sh": ["run", "stage4"], "xpk.sh": ["run", "name", "stage4"]}
    done = launch(script, *words.get(script, ["stage4"]))
    assert done.returncode == 2 and "there is no stage 'stage4'; there are stage1" in done.stderr
    assert not done.stdout


def test_local():
    (command,) = commands("local.sh", "stage3", *FLAGS, PYTHON="python3", PLATFORM="cuda")
    assert command[-5:] == ["python3", "-m", "launch.stage3", *FLAGS]
    assert {"JAX_PLATFORMS=cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"} <= set(command)


def test_slurm():
    (command,) = commands("slurm.sbatch", "stage3", *FLAGS)
    assert command[0] == "srun" and "--kill-on-bad-exit=0" in command
    assert command[-5:] == ["-m", "launch.stage3", "--distributed", *FLAGS]
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    for option in ("--signal=TERM@120", "--requeue", "--ntasks-per-node=8"):
        assert f"\n#SBATCH {option}\n" in text
    assert text.index("#SBATCH") < text.index("set -euo"), "SLURM reads no options behind commands"


def test_tpu_pod():
    (command,) = commands("tpu_pod.sh", "run", "stage3", *FLAGS, PROJECT="mine", ZONE="here")
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert command[6] == "--worker=all" and command[-2:] == ["--project=mine", "--zone=here"]
    remote = shlex.split(command[7].removeprefix("--command="))
    assert remote[-5:] == ["-m", "launch.stage3", "--distributed", *FLAGS]
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled" in remote
    (command,) = commands("tpu_pod.sh", "create", SPOT="1")
    assert command[3:6] == ["queued-resources", "create", "pod"]
    assert {"--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(command)
    done = launch("tpu_pod.sh", "create", ACCELERATOR="v9-4")
    assert done.returncode == 2 and "set RUNTIME: the software version for v9-4" in done.stderr
    done = launch("tpu_pod.sh", "create", TPU_NAME="")
    assert done.returncode == 2 and "set TPU_NAME: a name for the slice" in done.stderr
    done = launch("tpu_pod.sh", "install")
    assert "git archive" in done.stdout and "gcsfuse --implicit-dirs bucket shared" in done.stdout


def test_xpk():
    (command,) = commands("xpk.sh", "run", "name", "stage3", *FLAGS)
    assert command[:4] == ["xpk", "workload", "create", "--workload=name"]
    assert {"--tpu-type=v5p-128", "--restart-on-user-code-failure"} <= set(command)
    remote = shlex.split(command[-1].removeprefix("--command="))
    assert remote[-5:] == ["-m", "launch.stage3", "--distributed", *FLAGS]


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [
        ([134, 5, 0], 3, 0),  # another process died, this one hung, finished
        ([2], 1, 2),  # a config that is refused is refused again
        ([1], 1, 1),
        ([143], 1, 143),  # whoever stopped it on this machine wants it stopped
        ([4] * 9, 3, 4),  # MAX_RESTARTS=2
    ],
)
def test_what_is_started_again(tmp_path, statuses, starts, status):
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        echo start >> {tmp_path}/starts
        statuses=({" ".join(map(str, statuses))})
        exit ${{statuses[$(wc -l < {tmp_path}/starts) - 1]}}
        """
    )
    python.chmod(0o755)
    settings = {"DRY_RUN": "0", "PYTHON": str(python), "MAX_RESTARTS": "2", "RESTART_SECONDS": "0"}
    done = launch("local.sh", "stage3", **settings)
    assert done.returncode == status, done.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert ("goes on from its checkpoint" in done.stderr) == (starts > 1)


def test_a_pod_that_was_taken_away_is_asked_for_anew(tmp_path):
    """With a stand-in for gcloud: the slice is gone after the first run, the second finishes."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"""#!/usr/bin/env bash
        echo "$*" >> {tmp_path}/calls
        runs=$(grep -c launch.stage3 {tmp_path}/calls)
        creations=$(grep -c "queued-resources create" {tmp_path}/calls)
        case "$*" in
          *describe*) if ((creations)); then echo ACTIVE; else echo SUSPENDED; fi ;;
          *launch.stage3*) if ((runs == 1)); then exit 255; fi ;;
        esac
        """
    )
    gcloud.chmod(0o755)
    (tmp_path / "git").write_text("#!/usr/bin/env bash\n")
    (tmp_path / "git").chmod(0o755)
    mktemp = tmp_path / "mktemp"  # macOS's knows no long options
    mktemp.write_text(f'#!/usr/bin/env bash\n[[ "$*" != *--* ]] && echo {tmp_path}/archive\n')
    mktemp.chmod(0o755)
    done = launch(
        "tpu_pod.sh",
        *("run", "stage3", "--workdir=gs://bucket/run"),
        DRY_RUN="0",
        RESTART_SECONDS="0",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert "the slice is gone; asking for another" in done.stderr
    words = ("launch.stage3", "delete", "create", "scp", "gcsfuse", "launch.stage3")
    calls = (tmp_path / "calls").read_text()
    for word in words:
        assert word in calls, (word, calls)
        calls = calls[calls.index(word) + len(word) :]


def test_container_and_kubernetes():
    """They name files, extras, options and addresses that are there."""
    entry = ["python", "-m", "launch.serve"]
    lines = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert "omniforcing_jax" in copied
    assert all((ROOT / path).exists() for path in copied)
    assert f"ENTRYPOINT {json.dumps(entry)}" in lines
    (extras,) = (line.partition("EXTRAS=")[2] for line in lines if line.startswith("ARG EXTRAS"))
    assert all(f'"{extra}":' in (ROOT / "setup.py").read_text() for extra in extras.split(","))
    (example,) = (line for line in lines if "docker run --gpus" in line)
    options = shlex.split(example[example.index("--host") :].replace("#", ""))
    assert serve.parse_arguments(options).host == "0.0.0.0"
    text = (ROOT / "launch" / "kubernetes.yaml").read_text()
    deployment, _, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    args = serve.parse_arguments(container["args"])
    assert args.host == "0.0.0.0" and args.token == "$(TOKEN)"
    assert [port["containerPort"] for port in container["ports"]] == [args.port]
    assert service["spec"]["ports"][0]["port"] == args.port
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == volumes
    assert f"/{pathlib.Path(args.checkpoint).parts[1]}" in mounts
    source = (ROOT / "omniforcing_jax" / "serving" / "web.py").read_text()
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")]
    assert all(f'Route("{path}"' in source for path in probes)
