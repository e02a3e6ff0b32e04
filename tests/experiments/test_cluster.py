"""The files for Kubernetes and Slurm: valid, and their commands are those that experiments.train understands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import cli, processes, train

FOLDER = Path(train.__file__).parent / "cluster"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def documents() -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / "job.yaml").read_text()))


def pod() -> dict:
    return documents()[1]["spec"]["template"]["spec"]


def programs(folder: Path, **programs: str) -> dict[str, str]:
    """Write shell scripts in place of programs; return the environment that finds them first."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def parsed(words: list[str]) -> train.Config:
    """Return the options of a command line that is valid."""
    assert words[:2] == ["-m", "experiments.train"]
    config = cli.parse(train.Config, words[2:], prog=train.PROG)
    if config.resume is None:
        train.check(config)
    processes.check(config)
    return config


def test_kubernetes_accepts_the_job():
    validate = pytest.importorskip("kubernetes_validate").validate
    for version in ("1.28", "1.34"):
        for document in documents():
            validate(document, version, strict=True)
    service, job = documents()
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod()["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_the_command_of_the_job(tmp_path):
    container, (service, job) = pod()["containers"][0], documents()
    script = container["args"][0].replace("/runs/lecture", str(tmp_path / "run"))
    env = programs(tmp_path, python='printf "%s\\n" "$@"') | {"JOB_COMPLETION_INDEX": "1"}
    for resumed in (False, True):
        if resumed:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "config.json").touch()
        done = subprocess.run([*container["command"], script], env=env, capture_output=True, text=True, check=True)
        config = parsed(done.stdout.splitlines())
        assert (config.resume, config.out)[resumed] is None
        assert (config.processes, config.process) == (job["spec"]["completions"], 1)
        name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        assert config.coordinator == f"{job['metadata']['name']}-0.{name}:{port}"


@pytest.mark.parametrize("status", [0, 143])
def test_the_commands_of_the_batch_file(tmp_path, status):
    srun = f'printf "%s\\n" "$@"\nexit {status}'
    env = programs(tmp_path, srun=srun, scontrol='echo "scontrol $@"') | {"SLURM_JOB_ID": "7"}
    for n, arguments in enumerate(([], ["--model", "mlp"], ["--resume", "runs/other"], [])):
        if n == 3:
            (tmp_path / "runs" / "slurm-7").mkdir(parents=True)
            (tmp_path / "runs" / "slurm-7" / "config.json").touch()
        command = ["bash", str(FOLDER / "train.sbatch"), *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert done.returncode == status, done.stderr
        assert lines[:2] == ["--kill-on-bad-exit=0", ".venv/bin/python"]
        requeued = ["scontrol requeue 7"] if status else []
        assert lines[len(lines) - len(requeued) :] == requeued
        config = parsed(lines[2 : len(lines) - len(requeued)])
        assert config.cluster
        assert config.model == ("mlp" if n == 1 else "lecture")
        assert config.resume == (None, None, Path("runs/other"), Path("runs/slurm-7"))[n]


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_accepts_the_scripts(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{pod()['containers'][0]['args'][0]}")
    subprocess.run([SHELLCHECK, FOLDER / "train.sbatch", script], check=True)
