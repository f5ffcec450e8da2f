"""One row for both responses: the same loss, gradient and figures as two rows, and as the whole responses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from decathlon.sapo import Segment
from decathlon.sapo.pairs import Pair
from decathlon.sapo.prefix import share_prefixes, visible


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(prompt, chosen, rejected, Segment(0, 1), False, 0)


PAIRS = {
    "usual": pair([7, 9, 8], [13, 14, 15, 16, 17, 1], [13, 14, 20, 21, 17, 1]),
    "identical": pair([7, 9], [13, 14, 15, 1], [13, 14, 15, 1]),
    "early end": pair([7, 9, 13, 8], [13, 14, 15, 16, 17, 18, 1], [13, 14, 1]),
    "a prefix of it": pair([7], [13, 14, 15, 16, 1], [13, 14, 15]),
    "other from the start": pair([7, 10, 8], [13, 14, 1], [20, 21, 22, 1]),
    "one token": pair([7, 11, 8], [1], [20]),
    "one and the same token": pair([7, 8], [1], [1]),
    "a long one": pair([7, 12, 13, 14, 8], [*list(range(9, 24)), 1], [*list(range(9, 20)), 5, 6, 22, 23, 1]),
}


def llama(tiny_model: Any, attention: str) -> Any:
    return tiny_model(attn_implementation=attention)


def gpt2(tiny_model: Any, attention: str) -> Any:
    """With positions that are learned."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=25, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Outcome:
    """Loss, gradients and figures of pairs, by the trainer."""

    def __init__(self, make_trainer: Any, model: Any, pairs: list[Pair], cached: bool = False, **settings: Any) -> None:
        trainer = make_trainer(model=model, **settings)
        with torch.no_grad():  # off the reference
            for parameter in trainer.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trainer.model.train()
        inputs = trainer._prepare_inputs(trainer._collate(pairs))
        if cached:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = trainer._reference_logps(pairs)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        self.loss, self.figures = loss.item(), {name: rows[-1] for name, rows in trainer._metrics["train"].items()}
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def check(found: Outcome, wanted: Outcome, *, levels: bool) -> None:
    assert wanted.gradient.abs().max() > 1e-3
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert (found.gradient - wanted.gradient).norm() <= 1e-4 * wanted.gradient.norm()
    names = ["rewards/margins", "rewards/accuracies", *(wanted.figures if levels else ())]
    for name in names:
        assert found.figures[name] == pytest.approx(wanted.figures[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [llama, gpt2])
@pytest.mark.parametrize("cached", [False, True])
def test_packed_is_padded(make_trainer: Any, tiny_model: Any, architecture: Any, attention: str, cached: bool) -> None:
    outcomes = [
        Outcome(make_trainer, architecture(tiny_model, attention), list(PAIRS.values()), cached, **settings)
        for settings in ({"share_prefix": True}, {}, {"mask_shared_prefix": False})
    ]
    check(outcomes[0], outcomes[1], levels=True)
    check(outcomes[1], outcomes[2], levels=False)


@pytest.mark.parametrize("name", [name for name in PAIRS if "same" not in name and name != "identical"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_each_pair_alone(make_trainer: Any, tiny_model: Any, name: str, kind: str) -> None:
    outcomes = [
        Outcome(make_trainer, tiny_model(), [PAIRS[name]], loss_type=kind, **settings)
        for settings in ({"share_prefix": True}, {}, {"mask_shared_prefix": False})
    ]
    check(outcomes[0], outcomes[1], levels=True)
    check(outcomes[1], outcomes[2], levels=False)


@pytest.mark.parametrize("settings", [{"share_prefix": True}, {}, {"mask_shared_prefix": False}])
def test_identical_responses_teach_nothing(make_trainer: Any, tiny_model: Any, settings: dict[str, Any]) -> None:
    found = Outcome(make_trainer, tiny_model(), [PAIRS["identical"], PAIRS["one and the same token"]], **settings)
    assert found.loss == pytest.approx(0.6931472, abs=1e-6) and found.gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "ipo"}, {"loss_type": ["sigmoid", "sft"]}, {"ld_alpha": 0.5}, {"f_divergence_type": "forward_kl"},
     {"f_divergence_type": "js_divergence"}, {"use_weighting": True}],
)  # fmt: skip
def test_nothing_is_masked_where_it_would_not_cancel(
    make_trainer: Any, tiny_model: Any, settings: dict[str, Any]
) -> None:
    found, wanted = (
        Outcome(make_trainer, tiny_model(), list(PAIRS.values()), mask_shared_prefix=masks, **settings)
        for masks in (True, False)
    )
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert torch.allclose(found.gradient, wanted.gradient, rtol=1e-4, atol=1e-6)


def test_a_width_that_is_a_multiple(make_trainer: Any, tiny_model: Any) -> None:
    pairs = list(PAIRS.values())
    found = Outcome(make_trainer, tiny_model(), pairs, share_prefix=True, pad_to_multiple_of=8)
    check(found, Outcome(make_trainer, tiny_model(), pairs), levels=True)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_with_other_settings_of_trainers(make_trainer: Any, tiny_model: Any, settings: dict[str, Any]) -> None:
    trainer = make_trainer(share_prefix=True, learning_rate=1e-3, **settings)
    trainer.train()
    plain = make_trainer(share_prefix=True, learning_rate=1e-3)
    plain.train()
    losses = [[row["loss"] for row in made.state.log_history if "loss" in row] for made in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.03 if "bf16" in settings else 1e-6)


def test_a_bfloat16_model(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(model=tiny_model().to(torch.bfloat16), share_prefix=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-3)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_whole_runs(make_trainer: Any, tiny_model: Any, kind: str) -> None:
    rows = []
    for settings in ({"share_prefix": True}, {}, {"mask_shared_prefix": False}):
        trainer = make_trainer(model=llama(tiny_model, kind), optim="sgd", learning_rate=0.1, **settings)
        trainer.train()
        rows.append(
            [[row[name] for name in ("loss", "rewards/margins", "grad_norm")] for row in trainer.state.log_history[:-1]]
        )
    for other in rows[1:]:
        assert torch.tensor(rows[0]).allclose(torch.tensor(other), rtol=1e-3, atol=1e-4)


def test_evaluation(make_trainer: Any, pairs: Any) -> None:
    found, wanted = (make_trainer(share_prefix=share, eval_dataset=pairs).evaluate() for share in (True, False))
    for name in wanted:
        if not name.endswith(("runtime", "per_second")):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


def test_a_mixture_of_experts_is_refused(make_trainer: Any) -> None:
    config = MixtralConfig(
        vocab_size=25, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="share_prefix"):
        make_trainer(model=MixtralForCausalLM(config), share_prefix=True)


class TestRows:
    PACKED = share_prefixes([PAIRS["usual"], PAIRS["one token"]], pad_token=0, width=9)

    def test_by_hand(self) -> None:
        one, two = PAIRS["usual"], PAIRS["one token"]
        assert self.PACKED["packed_ids"].tolist() == [
            [*one.prompt_ids, 13, 14, 15, 16, 17, 1, 14, 20, 21, 17, 1],
            [*two.prompt_ids, 1, 8, 20, *[0] * 8],
        ]
        assert self.PACKED["packed_positions"].tolist() == [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8],
            [0, 1, 2, 3, 2, 3, *[0] * 8],
        ]
        none = -100
        assert self.PACKED["packed_labels"].tolist() == [
            [*[none] * 5, 15, 16, 17, 1, none, 20, 21, 17, 1],
            [none, none, none, 1, none, 20, *[none] * 8],
        ]
        assert self.PACKED["packed_places"].tolist() == [
            [-1, -1, -1, -1, 4, 5, 6, 7],
            [-1, -1, 2, -1, -1, -1, -1, -1],
            [-1, -1, -1, -1, 9, 10, 11, 12],
            [-1, -1, 4, -1, -1, -1, -1, -1],
        ]

    def test_who_sees_whom(self) -> None:
        seen = visible(self.PACKED["packed_parts"])[0, 0]
        for place in range(14):
            # first prompt, what is shared, the chosen rest; then the copy of the last shared token, the rejected rest
            wanted = set(range(place + 1)) if place < 9 else {0, 1, 2, 3, *range(9, place + 1)}
            assert set(seen[place].nonzero().flatten().tolist()) == wanted, place

    def test_padding_sees_and_is_seen_by_padding_alone(self) -> None:
        seen = visible(self.PACKED["packed_parts"])[1, 0]
        assert seen.any(dim=1).all() and seen[6:, 6:].diagonal().all() and not seen[:6, 6:].any()
