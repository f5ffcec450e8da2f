"""The training step against the official loop, and what the trainer promises around it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from decathlon.shared.files import locked
from decathlon.sid.augment import AugmentPipe
from decathlon.sid.config import SiDConfig, TeacherConfig
from decathlon.sid.denoisers import frozen, label_probabilities
from decathlon.sid.draws import SiDDraws
from decathlon.sid.evaluate import FrechetEvaluator
from decathlon.sid.features import DigitsFeatures
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.processes import Processes
from decathlon.sid.trainer import SiDTrainer
from decathlon.sid.training import summary

SMALL = {
    "img_resolution": 8,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def small_net(seed: int = 0, **changes: Any) -> EDMPrecond:
    torch.manual_seed(seed)
    net = EDMPrecond(**{**SMALL, "dropout": 0.0, **changes})
    with torch.no_grad():  # as trained: the initial network nearly ignores its input
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


def small_config(**changes: Any) -> SiDConfig:
    return SiDConfig(**{"batch_size": 8, "lr": 1e-3, "glr": 1e-3, "total_kimg": 0.08, "log_kimg": 0.016, **changes})


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def weights(trainer: SiDTrainer) -> dict[str, torch.Tensor]:
    nets = {"generator": trainer.generator, "fake_score": trainer.fake_score, "ema": trainer.ema}
    return {f"{n}.{key}": value.clone() for n, net in nets.items() for key, value in net.state_dict().items()}


def some_draws(batch: int, seed: int = 0) -> SiDDraws:
    g = torch.Generator().manual_seed(seed)
    images, column = (batch, 1, 8, 8), (batch, 1, 1, 1)
    normal = [torch.randn(images, generator=g) for _ in range(4)]
    level, u = torch.randn(column, generator=g), torch.rand(column, generator=g)
    return SiDDraws(normal[0], level, normal[1], normal[2], u, normal[3])


def golden_draws(arrays: dict[str, Any], step: int) -> SiDDraws:
    names = ("z_f", "rnd_normal", "noise_f", "z_g", "u", "noise_g", "labels_f", "labels_g")
    return SiDDraws(*(torch.from_numpy(arrays[name][step]) for name in names))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


@pytest.fixture
def arrays(golden: Any) -> dict[str, Any]:
    return golden("train_loop")


@pytest.mark.parametrize("batch_gpu", [None, 4, 2])
def test_agrees_with_the_official_loop(arrays: dict[str, Any], fill_weights: Any, batch_gpu: int | None) -> None:
    hyper = json.loads(str(arrays["hyper"]))
    steps = hyper.pop("steps")
    teacher = fill_weights(EDMPrecond(**json.loads(str(arrays["config"]))), int(arrays["weights_seed"]))
    trainer = SiDTrainer(teacher, SiDConfig(**{**hyper, "batch_gpu": batch_gpu}))
    for step in range(steps):
        losses = trainer.step(golden_draws(arrays, step))
        assert float(losses["fake_loss"]) == pytest.approx(arrays["fake_loss_sum"][step], rel=2e-3)
        assert float(losses["generator_loss"]) == pytest.approx(arrays["g_loss_sum"][step], rel=2e-2)
    z, x, sigma = (torch.from_numpy(arrays[name]) for name in ("probe_z", "probe_x", "probe_sigma"))
    start_z, start_x = (torch.from_numpy(arrays[name]) for name in ("probe_teacher_z", "probe_teacher_x"))
    with torch.no_grad():
        probes = {
            "probe_G": (trainer.generator(z, 2.5), start_z),
            "probe_G_ema": (trainer.ema(z, 2.5), start_z),
            "probe_fake": (trainer.fake_score(x, sigma), start_x),
        }
    for name, (got, start) in probes.items():
        want = torch.from_numpy(arrays[name])
        assert rms(got - want) < 2e-3 * rms(want - start), name  # the tolerance of the golden figures is 2e-2
    for name, net in (("G", trainer.generator), ("G_ema", trainer.ema), ("fake_score", trainer.fake_score)):
        start = dict(teacher.named_parameters())
        # that of a bias of keys is rounding alone, which Adam blows up
        moved = {
            key: float((p - start[key]).detach().double().norm())
            for key, p in net.named_parameters()
            if not key.endswith("qkv.bias")
        }
        wanted = dict(zip(arrays["param_names"], arrays[f"delta_norm_{name}"], strict=True))
        for key, norm in moved.items():
            assert norm == pytest.approx(wanted[key], rel=0.05, abs=1e-3 * max(wanted.values())), (name, key)


def test_the_teacher_is_neither_copied_without_need_nor_changed() -> None:
    teacher = small_net()
    before = copy.deepcopy(teacher)
    trainer = SiDTrainer(teacher, small_config())
    assert trainer.teacher is teacher
    learning = small_net().train().requires_grad_(True)
    other = SiDTrainer(learning, small_config())
    assert other.teacher is not learning
    for t in (trainer, other):
        t.step()
    assert same(teacher, before)
    assert learning.training and all(p.requires_grad for p in learning.parameters())


def test_the_teacher_stays_on_its_device() -> None:
    teacher = small_net()
    assert frozen(teacher) is frozen(teacher, "cpu") is teacher
    assert {p.device.type for p in frozen(teacher, "meta").parameters()} == {"meta"}
    assert {p.device.type for p in teacher.parameters()} == {"cpu"}
    teacher.model.enc.train()  # a part alone
    assert not any(module.training for module in frozen(teacher).modules()) and teacher.model.enc.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_teaches_float32_weights(dtype: torch.dtype) -> None:
    teacher = small_net().to(dtype)
    trainer = SiDTrainer(teacher, small_config(lr=1e-5, glr=1e-5))
    for _ in range(3):
        trainer.step()
    assert trainer.teacher is teacher and teacher.dtype == dtype
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}
    start = dict(teacher.named_parameters())
    moved = [(p != start[name].float()).flatten() for name, p in trainer.generator.named_parameters()]
    assert float(torch.cat(moved).float().mean()) > 0.9


def test_the_average_starts_at_the_generator_and_then_lags() -> None:
    trainer = SiDTrainer(small_net(), small_config(ema_rampup_ratio=0.5))
    trainer.step()
    assert same(trainer.ema, trainer.generator)
    trainer.step()
    assert not same(trainer.ema, trainer.generator)
    assert trainer.nimg == 16


def test_draws_depend_on_seed_and_step_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (SiDTrainer(small_net(), small_config(seed=seed)) for seed in (3, 3, 4))
    torch.set_rng_state(state)
    losses = [float(first.step()["generator_loss"]) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    torch.rand(10)
    assert [float(second.step()["generator_loss"]) for _ in range(3)] == losses
    assert float(other.step()["generator_loss"]) != losses[0]
    assert len(set(losses)) == 3


def test_no_other_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("every GPU was seeded")

    trainer = SiDTrainer(small_net(), small_config())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    trainer.step()


def test_dropout_acts_and_does_not_depend_on_the_caller() -> None:
    with_dropout = [SiDTrainer(small_net(dropout=0.5), small_config()) for _ in range(2)]
    without = SiDTrainer(small_net(), small_config())
    torch.manual_seed(1)
    first = with_dropout[0].step()
    torch.manual_seed(2)
    second = with_dropout[1].step()
    assert float(first["fake_loss"]) == float(second["fake_loss"]) != float(without.step()["fake_loss"])


def test_a_conditional_teacher() -> None:
    probs = [0.0, 0.25, 0.75]
    seen: list[torch.Tensor] = []
    teacher = small_net(label_dim=3)
    hook = teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    trainer = SiDTrainer(teacher, small_config(batch_size=64, label_probs=probs))
    for _ in range(4):
        trainer.step()
    hook.remove()
    shares = torch.cat(seen).mean(0)
    assert shares[0] == 0 and shares[2] == pytest.approx(0.75, abs=0.12)
    assert math.isfinite(float(trainer.step()["generator_loss"]))


def test_probabilities_may_be_integers() -> None:
    trainer = SiDTrainer(small_net(label_dim=3), small_config(label_probs=[1, 0, 0]))
    assert math.isfinite(float(trainer.step()["generator_loss"]))
    given: Any = [0, 1]
    assert label_probabilities(given, 2).dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", ["sid", "diff_instruct"])
def test_both_losses_train(loss: str) -> None:
    trainer = SiDTrainer(small_net(), small_config(loss=loss))
    before = copy.deepcopy(trainer.generator)
    trainer.step()
    assert not same(trainer.generator, before)


def test_diff_instruct_as_measured_differs_from_the_paper_s() -> None:
    plain = SiDTrainer(small_net(), small_config(loss="diff_instruct"))
    measured = SiDTrainer(small_net(), small_config(loss="diff_instruct", sigma_dist="time", weighting="l1"))
    assert float(plain.step()["generator_loss"]) != float(measured.step()["generator_loss"])


def test_a_shared_pass_saves_one_and_sees_the_same_latents() -> None:
    calls = []
    trainer = SiDTrainer(small_net(), small_config(share_generator_forward=True))
    trainer.generator.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    trainer.step()
    assert len(calls) == 1
    trainer = SiDTrainer(small_net(), small_config())
    trainer.generator.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    trainer.step()
    assert len(calls) == 3 and not torch.equal(calls[1], calls[2])


def test_a_shared_pass_needs_a_single_round() -> None:
    SiDTrainer(small_net(), small_config(share_generator_forward=True, batch_gpu=8)).step()
    with pytest.raises(ValueError, match=r"share_generator_forward .* set it to 8"):
        SiDTrainer(small_net(), small_config(share_generator_forward=True, batch_gpu=4))


def test_how_a_batch_is_divided() -> None:
    cpu = torch.device("cpu")
    alone = Processes(None, cpu)
    two = Processes(SimpleNamespace(num_processes=2, process_index=1, device=cpu), cpu)
    assert [alone.rounds(8, size) for size in (None, 8, 2)] == [(8, 1), (8, 1), (2, 4)]
    assert [two.rounds(8, size) for size in (None, 4, 2)] == [(4, 1), (4, 1), (2, 2)]
    with pytest.raises(ValueError, match="2 processes, got 7"):
        two.rounds(7, None)
    with pytest.raises(ValueError, match=r"batch_gpu \(8\) times the 2 processes"):
        two.rounds(8, 8)


def test_more_steps_of_the_fake_score_network() -> None:
    calls = []
    trainer = SiDTrainer(small_net(), small_config(fake_steps_per_generator_step=3))
    trainer.generator.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    trainer.step()
    assert len(calls) == 4 and trainer.nimg == 8
    assert len({float(z.sum()) for z in calls}) == 4
    with pytest.raises(ValueError, match="fake_steps_per_generator_step"):
        trainer.step(some_draws(8))


def test_augmentation_reaches_the_fake_score_network_alone() -> None:
    teacher = small_net(augment_dim=9)
    seen: dict[str, list[Any]] = {"fake_score": [], "generator": []}
    trainer = SiDTrainer(teacher, small_config(augment_p=0.5))
    for name, calls in seen.items():
        net = getattr(trainer, name)
        net.register_forward_pre_hook(lambda _, arguments, calls=calls: calls.append(arguments[3:]))
    trainer.step()
    assert seen["fake_score"][0][0].shape == (8, 9) and not seen["fake_score"][1]
    assert not any(seen["generator"])
    name = "model.map_augment.weight"
    start = teacher.state_dict()[name]
    assert not torch.equal(trainer.fake_score.state_dict()[name], start)
    assert torch.equal(trainer.generator.state_dict()[name], start)
    assert isinstance(AugmentPipe(0.1), AugmentPipe)
    with pytest.raises(ValueError, match="augment_p"):
        SiDTrainer(small_net(), small_config(augment_p=0.1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_float32_weights(precision: Any) -> None:
    trainer = SiDTrainer(small_net(), small_config(mixed_precision=precision))
    plain = SiDTrainer(small_net(), small_config())
    got, want = trainer.step(), plain.step()
    assert float(got["fake_loss"]) == pytest.approx(float(want["fake_loss"]), rel=0.1)
    assert float(got["fake_loss"]) != float(want["fake_loss"])
    assert {p.dtype for p in trainer.generator.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------- NaN


class Poisoned(EDMPrecond):
    """A denoiser that returns NaN for the first `bad` images whenever it is asked for a gradient."""

    bad = 8

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rows = torch.arange(len(x)).reshape(-1, 1, 1, 1) < type(self).bad
        return torch.where(rows, float("nan"), super().forward(x, *arguments, **options))


def poisoned_trainer(monkeypatch: pytest.MonkeyPatch, bad: int) -> SiDTrainer:
    monkeypatch.setattr(Poisoned, "bad", bad)
    torch.manual_seed(0)
    teacher = Poisoned(**{**SMALL, "dropout": 0.0}).eval().requires_grad_(False)
    return SiDTrainer(teacher, small_config())


def test_a_step_without_a_finite_sample_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = poisoned_trainer(monkeypatch, bad=8)
    before = weights(trainer)
    with pytest.warns(UserWarning, match="skipped"):
        trainer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        for _ in range(98):
            trainer.step()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    with pytest.raises(RuntimeError, match="100 steps in a row"):
        trainer.step()


def test_the_count_of_skipped_steps_starts_anew_after_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decathlon.sid.trainer.MAX_SKIPPED", 5)
    trainer = poisoned_trainer(monkeypatch, bad=8)
    with pytest.warns(UserWarning, match="skipped"):
        trainer.step()
    for bad, steps in ((8, 3), (0, 1), (8, 4)):
        monkeypatch.setattr(Poisoned, "bad", bad)
        for _ in range(steps):
            trainer.step()


def test_some_bad_samples_do_not_reach_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = poisoned_trainer(monkeypatch, bad=2)
    trainer.step()
    assert all(value.isfinite().all() for value in weights(trainer).values())


# ----------------------------------------------------------------------------------------------- mistakes


def test_what_is_no_denoiser() -> None:
    with pytest.raises(TypeError, match=r"img_resolution.*forward"):
        SiDTrainer(nn.Linear(2, 2))


class Foreign(nn.Module):
    """A denoiser that is none of diffusers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        for name in ("img_resolution", "img_channels", "label_dim", "sigma_data", "sigma_min", "sigma_max"):
            setattr(self, name, getattr(self.net, name))

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.net(*arguments)


def test_a_foreign_module_is_trained_but_not_exported(tmp_path: Path) -> None:
    teacher = Foreign().eval().requires_grad_(False)
    with pytest.raises(TypeError, match=r"Foreign has no save_pretrained .* output_dir"):
        SiDTrainer(teacher, small_config(output_dir=str(tmp_path / "run")))
    trainer = SiDTrainer(teacher, small_config(total_kimg=0.016))
    assert trainer.train().nimg == 16
    with pytest.raises(TypeError, match=r"trainer.ema.state_dict"):
        trainer.export(tmp_path / "pipe")
    assert not any(tmp_path.iterdir())
    trainer.save_checkpoint(tmp_path / "state")
    again = SiDTrainer(teacher, small_config(total_kimg=0.016))
    again.load_checkpoint(tmp_path / "state")
    assert same(again.ema, trainer.ema)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"z_f": torch.zeros(4, 1, 8, 8)}, r"draws.z_f must be \[8, 1, 8, 8\]"),
        ({"u": torch.zeros(8)}, r"draws.u must be \[8, 1, 1, 1\]"),
        ({"labels_f": torch.zeros(8, 3)}, "no classes"),
    ],
)
def test_draws_that_do_not_fit(changes: dict[str, torch.Tensor], text: str) -> None:
    trainer = SiDTrainer(small_net(), small_config())
    draws = SiDDraws(**{**vars(some_draws(8)), **changes})
    with pytest.raises(ValueError, match=text):
        trainer.step(draws)


def test_classes_that_are_missing_or_too_many() -> None:
    with pytest.raises(ValueError, match="3 classes, so they are needed"):
        SiDTrainer(small_net(label_dim=3), small_config()).step(some_draws(8))
    with pytest.raises(ValueError, match="2 entries, the teacher 3"):
        SiDTrainer(small_net(label_dim=3), small_config(label_probs=[0.5, 0.5]))


# ------------------------------------------------------------------------------------------------ the run


def test_a_run_leaves_log_checkpoint_and_pipelines(tmp_path: Path) -> None:
    figures = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    called = []
    config = small_config(output_dir=str(tmp_path / "run"), eval_kimg=0.016, snapshot_kimg=0.032, keep_last=2)
    trainer = SiDTrainer(
        small_net(), config, evaluator=lambda net: next(figures), callbacks=[lambda t, losses: called.append(t.nimg)]
    )
    result = trainer.train()
    assert result.nimg == 80 and result.best == 1.0 and called == list(range(8, 88, 8))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history and [row["nimg"] for row in rows] == [16, 32, 48, 64, 80]
    assert [row["metric"] for row in rows] == [3, 1, 2, 4, 5]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["000000000064", "000000000080"]
    assert {"last", "best"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(("figures", "best"), [([math.nan, 3.0, 2.0], 2.0), ([math.nan] * 3, None)])
def test_an_evaluation_without_a_result_is_not_the_best(
    tmp_path: Path, figures: list[float], best: float | None
) -> None:
    left = iter(figures)
    config = small_config(total_kimg=0.024, eval_kimg=0.008, output_dir=str(tmp_path / "run"))
    trainer = SiDTrainer(small_net(), config, evaluator=lambda net: next(left))
    result = trainer.train()
    assert result.best == best and (tmp_path / "run" / "best").exists() == (best is not None)
    assert str(best if best is not None else "none").removesuffix(".0") in summary(result, trainer).splitlines()[-1]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = small_config(lr_schedule="cosine", snapshot_kimg=0.008)

    class Stop(Exception):
        pass

    def stop(trainer: SiDTrainer, _: Any) -> None:
        if trainer.nimg == 40:
            raise Stop

    whole = SiDTrainer(small_net(dropout=0.3), copy.deepcopy(config))
    whole_result = whole.train()
    config.output_dir = str(tmp_path / "run")
    with pytest.raises(Stop):
        SiDTrainer(small_net(dropout=0.3), config, callbacks=[stop]).train()
    with pytest.raises(ValueError, match="--resume"):
        SiDTrainer(small_net(dropout=0.3), config).train()
    resumed = SiDTrainer(small_net(dropout=0.3), config)
    result = resumed.train(resume=True)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())
    keys = ("nimg", "fake_loss", "generator_loss")
    assert [[r[k] for k in keys] for r in result.history][-2:] == [[r[k] for k in keys] for r in whole_result.history][
        -2:
    ]


def test_a_folder_is_kept_for_one_run(tmp_path: Path) -> None:
    trainer = SiDTrainer(small_net(), small_config(output_dir=str(tmp_path / "run")))
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="in use by another run"):
        trainer.train()
    trainer.train()


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    trainer = SiDTrainer(small_net(), small_config())
    trainer.step()
    trainer.save_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="alpha, tmax"):
        SiDTrainer(small_net(), small_config(alpha=1.0, tmax=600)).load_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="another teacher"):
        SiDTrainer(small_net(seed=1), small_config()).load_checkpoint(tmp_path / "state")
    # the default is the whole share, which more processes would halve
    SiDTrainer(small_net(), small_config(batch_gpu=8)).load_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="another batch_gpu"):
        SiDTrainer(small_net(), small_config(batch_gpu=4)).load_checkpoint(tmp_path / "state")
    (tmp_path / "state" / "ema.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"ema.safetensors is damaged"):
        SiDTrainer(small_net(), small_config()).load_checkpoint(tmp_path / "state")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no training state"):
        trainer.save_checkpoint(tmp_path / "foreign")


def test_a_checkpoint_of_another_augmentation_is_refused(tmp_path: Path) -> None:
    pipes = [AugmentPipe(0.1), AugmentPipe(0.1, scale=0)]
    saved, same_pipe, other = (
        SiDTrainer(small_net(augment_dim=9), small_config(), augment_pipe=pipe) for pipe in (*pipes[:1] * 2, pipes[1])
    )
    saved.save_checkpoint(tmp_path / "state")
    same_pipe.load_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="another augment_pipe"):
        other.load_checkpoint(tmp_path / "state")


# ------------------------------------------------------------------------------- evaluations and bad ends


def evaluated_config(folder: Path) -> SiDConfig:
    return small_config(total_kimg=0.048, eval_kimg=0.016, snapshot_kimg=1.0, output_dir=str(folder))


def test_an_evaluator_that_cannot_measure_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = evaluated_config(tmp_path / "run")
    statistics = {"mu": torch.zeros(5), "sigma": torch.eye(5)}
    for evaluator, message in (
        (FrechetEvaluator(DigitsFeatures(), statistics), "of 5 features, but digits CNN, 32 features gives 32"),
        (FrechetEvaluator(DigitsFeatures(resolution=12), torch.zeros(4, 1, 12, 12)), r"\[1, 8, 8\], but the real ones"),
        (FrechetEvaluator(nn.Conv2d(3, 2, 1), statistics), r"does not take images \[1, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SiDTrainer(small_net(), config, evaluator=evaluator)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_loses_nothing(tmp_path: Path) -> None:
    def fails(net: nn.Module) -> float:
        if trainer.nimg == 32:
            raise MemoryError
        return float(trainer.nimg)

    config = evaluated_config(tmp_path / "run")
    trainer = SiDTrainer(small_net(), copy.deepcopy(config), evaluator=fails)
    with pytest.raises(MemoryError):
        trainer.train()
    assert (tmp_path / "run/checkpoints/000000000032").is_dir() and (tmp_path / "run/last").is_dir()
    resumed = SiDTrainer(small_net(), config, evaluator=lambda net: 100.0 - resumed.nimg)
    result = resumed.train(resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["nimg"], row["metric"]) for row in lines] == [(16, 16), (32, 68), (48, 52)]
    assert result.history == lines and result.best == 16


def test_ctrl_c_leaves_an_evaluation_at_the_next_batch(tmp_path: Path) -> None:
    calls = []

    def interrupted(net: nn.Module) -> float:
        for _ in range(100):
            net(torch.zeros(1, 1, 8, 8), torch.ones(()))
            calls.append(trainer.nimg)
            if calls == [16, 16]:
                signal.raise_signal(signal.SIGINT)
        return 1.0

    config = evaluated_config(tmp_path / "run")
    trainer = SiDTrainer(small_net(), copy.deepcopy(config), evaluator=interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert calls == [16, 16] and trainer.nimg == 16 and not trainer.ema._forward_pre_hooks
    trainer = SiDTrainer(small_net(), config, evaluator=interrupted)
    assert [row["metric"] for row in trainer.train(resume=True).history] == [1.0] * 3 and len(calls) == 302


def test_a_run_that_is_done_says_so(tmp_path: Path) -> None:
    config = small_config(output_dir=str(tmp_path / "run"), total_kimg=0.016)
    SiDTrainer(small_net(), copy.deepcopy(config)).train()
    config.total_kimg = 0.008
    with pytest.warns(UserWarning, match=r"run is done already: it has seen 16 images, total_kimg asks for 0\.008"):
        SiDTrainer(small_net(), config).train(resume=True)


def test_a_training_that_diverges_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decathlon.sid.trainer.MAX_SKIPPED", 2)
    trainer = poisoned_trainer(monkeypatch, bad=8)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(RuntimeError, match="the teacher itself makes NaN"):
        trainer.step(), trainer.step()
    trainer = SiDTrainer(small_net(), small_config(lr=1e30, glr=1e30))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(RuntimeError, match="begin anew in another folder"):
        trainer.train()


def test_a_damaged_state_names_its_file(tmp_path: Path) -> None:
    trainer = SiDTrainer(small_net(), small_config())
    trainer.save_checkpoint(tmp_path / "state")
    (tmp_path / "state/optimizers.pt").write_bytes(pickle.dumps(Path("evil"), 2))
    with pytest.raises(ValueError, match=r"optimizers\.pt is damaged: no plain tensors in it$"):
        trainer.load_checkpoint(tmp_path / "state")
    trainer.save_checkpoint(tmp_path / "state")
    (tmp_path / "state/state.json").write_text('{"format": 1, "config": {}}')
    with pytest.raises(ValueError, match=r"state\.json is damaged: it has no best, history, nimg, skipped"):
        trainer.load_checkpoint(tmp_path / "state")


def test_a_config_of_another_kind() -> None:
    config: Any = TeacherConfig()
    with pytest.raises(TypeError, match="config must be a SiDConfig, got a TeacherConfig"):
        SiDTrainer(small_net(), config)
