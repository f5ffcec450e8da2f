"""Real processes: two agree with one, accelerate's own saving works, and a run that is killed goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from decathlon.sid import EDMPrecond, SiDConfig, SiDTrainer

torch.set_num_threads(1)
task, folder = sys.argv[1], Path(sys.argv[2])


def made_up_teacher():
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.3}
    return EDMPrecond(4, 1, 3, model_type="SongUNet", augment_dim=9, **sizes).eval().requires_grad_(False)


def trainer(accelerator=None, **options):
    config = {"batch_size": 8, "batch_gpu": 2, "lr": 1e-3, "glr": 1e-3, "augment_p": 0.5, "lr_schedule": "cosine"}
    return SiDTrainer(made_up_teacher(), SiDConfig(**{**config, **options}), accelerator=accelerator)


def save(t, path):
    nets = {"generator": t.generator, "fake_score": t.fake_score, "ema": t.ema, "teacher": t.teacher}
    states = {name: net.state_dict() for name, net in nets.items()}
    save_file({f"{n}.{k}": v.clone().contiguous() for n, state in states.items() for k, v in state.items()}, path)


if task == "steps":
    accelerator = Accelerator(cpu=True)
    t = trainer(accelerator)
    losses = [t.step() for _ in range(3)]
    trainer(accelerator, batch_gpu=8 // accelerator.num_processes, share_generator_forward=True).step()
    if accelerator.is_main_process:
        save(t, folder / f"{accelerator.num_processes}.safetensors")
        print([[float(loss) for loss in pair.values()] for pair in losses])
elif task == "accelerate":
    accelerator = Accelerator(cpu=True)
    t = trainer(accelerator, total_kimg=0.024)  # short, so that the cosine falls
    t.step()
    accelerator.save_state(str(folder / "state"))
    t.step()
    save(t, folder / "whole.safetensors")
    other = trainer(accelerator := Accelerator(cpu=True), total_kimg=0.024)
    accelerator.load_state(str(folder / "state"))
    assert other.nimg == 8
    other.step()
    save(other, folder / "resumed.safetensors")
elif task == "run":
    t = trainer(output_dir=str(folder), total_kimg=0.24, snapshot_kimg=0.008, log_kimg=0.016)
    t.train(resume="--resume" in sys.argv)
    save(t, folder / "end.safetensors")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(script: Path, *arguments: str, processes: int = 1) -> str:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        command += ["--standalone"]
    done = subprocess.run([*command, str(script), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_agree_with_one(script: Path, tmp_path: Path) -> None:
    printed = [run(script, "steps", str(tmp_path), processes=n).strip().splitlines()[-1] for n in (1, 2)]
    one, two = (torch.tensor(json.loads(line)) for line in printed)
    assert torch.allclose(one, two, rtol=1e-4)
    first, second = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    for net in ("generator", "fake_score"):  # there is something to compare
        name = "model.map_layer0.weight"
        assert float((first[f"{net}.{name}"] - first[f"teacher.{name}"]).abs().max()) > 1e-4
    for name, value in first.items():
        if not name.endswith("qkv.bias"):  # a bias of keys has no gradient but rounding, which Adam blows up
            assert torch.allclose(value, second[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
def test_accelerate_s_own_saving_knows_all(script: Path, tmp_path: Path) -> None:
    run(script, "accelerate", str(tmp_path))
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "script.py").write_text(SCRIPT)
    run(folder / "script.py", "run", str(folder / "run"))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("SIGKILL", 2), ("SIGINT", 1), ("SIGTERM", 1)])
def test_a_run_that_is_killed_goes_on_bit_for_bit(
    script: Path, tmp_path: Path, whole: Path, kind: str, times: int
) -> None:
    moments = random.Random(kind)
    for _ in range(times):
        resume = ["--resume"] if (tmp_path / "killed" / "config.yaml").exists() else []
        process = subprocess.Popen([sys.executable, str(script), "run", str(tmp_path / "killed"), *resume])
        checkpoints = tmp_path / "killed" / "checkpoints"
        before = _newest(checkpoints)
        while _newest(checkpoints) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(getattr(signal, kind))
        process.wait(timeout=120)
        assert not (tmp_path / "killed" / "end.safetensors").exists(), "the run had ended: nothing was tried"
    run(script, "run", str(tmp_path / "killed"), "--resume")
    expected, killed = (load_file(folder / "end.safetensors") for folder in (whole, tmp_path / "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in expected.items())
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, tmp_path / "killed")]
    assert [json.loads(line)["nimg"] for line in logs[0]] == [json.loads(line)["nimg"] for line in logs[1]]


def _newest(folder: Path) -> str:
    names = [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(names, default="")
