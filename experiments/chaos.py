"""Kill a training with SIGKILL at random moments, resume it, and compare it with an undisturbed one."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from experiments import cli
from experiments.errors import RunError, bad_value
from experiments.files import creating
from experiments.run_folder import new_folder

PROG = "python -m experiments.chaos"


@dataclasses.dataclass(frozen=True)
class Config:
    """Start a training, kill it at random moments (also while it saves), resume it each time, and let it finish.

    The losses of every step and the weights must then equal those of an undisturbed training, bit for bit.
    """

    kills: int = 20
    """Number of SIGKILLs."""
    model: str = "mlp"
    """Net, as for experiments.train."""
    data: str = "fashion-mnist-sample"
    """Images, as for experiments.train."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the images, as for experiments.train."""
    epochs: int = 3
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    save_every: int = 20
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the moments; the training has its own."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the runs, new or empty; if omitted, runs/<time>-chaos."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, chaos, argv, prog=PROG)


def chaos(config: Config) -> int:
    """Compare the runs and print the result; raise RunError if they differ, UsageError for a wrong option."""
    cli.check_count("--kills", config.kills)
    draw = random.Random(config.seed)
    with new_folder(config.out, "chaos") as folder:
        began = time.perf_counter()
        finish(config, folder / "undisturbed", folder)
        print(f"undisturbed: {time.perf_counter() - began:.1f} s", flush=True)
        expected = results(folder / "undisturbed")
        kills: list[dict[str, Any]] = []
        rounds = 0
        while len(kills) < config.kills:
            rounds += 1
            run = folder / f"killed-{rounds}"
            # A training that finishes before its time is over is compared, and the next one takes the other kills.
            while len(kills) < config.kills and (kill := killed(config, run, folder, draw)) is not None:
                kills.append(kill)
                during = "while saving" if kill["saving"] else f"after step {kill['step']}"
                print(f"kill {len(kills):>2} of {config.kills}: {kill['seconds']:.2f} s after the start, {during}")
                sys.stdout.flush()
            finish(config, run, folder)
            if different := [name for name, value in results(run).items() if value != expected[name]]:
                got = f"different {', '.join(different)} in {run}"
                raise bad_value(RunError, "a killed and resumed run", "equal to the undisturbed one", got)
        saving = sum(kill["saving"] for kill in kills)
        runs, steps = f"{rounds} {'run' if rounds == 1 else 'runs'}", len(expected["losses"])
        text = (
            f"{len(kills)} SIGKILLs in {runs}, {saving} of them while a checkpoint was being written; losses of all "
            f"{steps} steps, weights, epochs and test results equal the undisturbed run's bit for bit"
        )
        with creating(folder / "chaos.json") as path:
            path.write_text(json.dumps({"result": text, "kills": kills}, indent=2) + "\n", "utf-8")
        print(text, f"results in {folder}", sep="\n", flush=True)
    return 0


def command(config: Config, run: Path) -> list[str]:
    """Return the command that starts the training in `run`, or resumes it if it has started."""
    python = [sys.executable, "-m", "experiments.train"]
    if (run / "config.json").exists():
        return [*python, "--resume", str(run)]
    options = {
        "--model": config.model,
        "--data": config.data,
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--save-every": config.save_every,
        "--norms-every": 0,
        "--out": run,
    } | ({} if config.data_dir is None else {"--data-dir": config.data_dir})
    return [*python, "--no-report", *(str(word) for pair in options.items() for word in pair)]


def start(config: Config, run: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a process of the training, whose messages go to stderr.txt."""
    # One cache of compiled programs for all, so that a process soon reaches its first step.
    cache = folder.absolute() / "compiled"
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (folder / "stderr.txt").open("a") as errors:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        return subprocess.Popen(command(config, run), env={**os.environ, **variables}, **pipes)


def finish(config: Config, run: Path, folder: Path) -> None:
    """Let the training finish, unless it has; raise RunError if it fails."""
    process = start(config, run, folder) if end(run) != "finished" else None
    if process is not None:
        process.communicate()
        if process.returncode:
            line = (folder / "stderr.txt").read_text("utf-8").splitlines()[-1:]
            raise RunError(f"{run}: the training failed with status {process.returncode}: {' '.join(line)}")


def killed(config: Config, run: Path, folder: Path, draw: random.Random) -> dict[str, Any] | None:
    """Start the training and kill it at a random moment; return the moment, or None if it ended before."""
    before = {path.name for path in (run / "checkpoints").glob("*")}
    process = start(config, run, folder)
    assert process.stdout is not None
    try:
        # One moment in five counts from the start of the process, the others from its first step.
        if draw.random() < 0.8:
            while line := process.stdout.readline():
                if line.startswith("compiling"):
                    break
        began = time.perf_counter()
        delay = draw.uniform(0, 2.0)
        try:
            process.wait(delay)
            return None
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    after = {path.name for path in (run / "checkpoints").glob("*")}
    steps = [int(name) for name in after if name.isdigit()]
    saving = any(not name.isdigit() for name in after - before)
    return {"seconds": seconds, "step": max(steps, default=0), "saving": saving}


def end(run: Path) -> str | None:
    """Return how the run in a folder ended, or None if it has not."""
    path = run / "config.json"
    return json.loads(path.read_text("utf-8")).get("end") if path.exists() else None


def results(run: Path) -> dict[str, Any]:
    """Return everything that a run computed, without times."""
    from safetensors.numpy import load_file

    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [line.split(",")[:6] for line in (run / "metrics.csv").read_text("utf-8").splitlines()]
    config = json.loads((run / "config.json").read_text("utf-8"))
    return {
        "losses": lines,
        "weights": {name: array.tobytes() for name, array in load_file(run / "weights.safetensors").items()},
        "epochs": rows,
        "test results": {name: config.get(name) for name in ("steps", "best_step", "test_loss", "test_accuracy")},
    }


if __name__ == "__main__":
    sys.exit(main())
