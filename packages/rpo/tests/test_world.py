from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decathlon.rpo.world import (
    EOS,
    FILLER,
    LONGEST,
    POLITE,
    RUDE,
    SHORTEST,
    TEMPLATES,
    TOPICS,
    corpus,
    gold_reward,
    gold_rewards,
    make_model,
    make_tokenizer,
    preference_pairs,
    prompts,
    responses,
)


class TestWords:
    def test_kinds_do_not_overlap(self) -> None:
        kinds = [POLITE, RUDE, FILLER, *(words.split() for _, words in TOPICS.values())]
        words = [word for kind in kinds for word in kind]
        assert len(set(words)) == len(words)
        assert all(len(objects.split()) == 6 and len(words.split()) == 12 for objects, words in TOPICS.values())

    def test_prompts_are_held_out_by_combination(self) -> None:
        learned, held_out = prompts(False), prompts(True)
        assert len(learned) == len(held_out) == 144 and not set(learned) & set(held_out)
        for part in (learned, held_out):
            texts = [prompt.text for prompt in part]
            for objects, _ in TOPICS.values():
                for word in objects.split():
                    assert sum(f" {word} " in text for text in texts) == 4
            for template in TEMPLATES:
                assert sum(text.startswith(template.partition("{")[0]) for text in texts) >= 18


class TestReward:
    @pytest.mark.parametrize(
        ("response", "reward"),
        [
            ("wave salt tide sail coast sailor storm island", 8.0),
            ("wave salt tide sail", 4 - 0.4),
            ("wave wave wave wave", 1 - 0.9 - 0.4),
            ("please thanks kindly the a of and it", 1.0),
            ("stupid idiot the a of and it is", -2.0),
            ("flour star the a of and it is", -1.0),
            ("wave flour please stupid the the", 1 + 0.5 - 1 - 0.5 - 0.3 - 0.2),
            ("", -0.8),
        ],
    )
    def test_by_hand(self, response: str, reward: float) -> None:
        assert gold_reward("sea", response) == pytest.approx(reward)

    @given(st.permutations(["wave", "flour", "please", "stupid", "the", "the", "of", "salt"]))
    def test_order_does_not_matter(self, words: list[str]) -> None:
        assert gold_reward("sea", " ".join(words)) == pytest.approx(gold_reward("sea", " ".join(sorted(words))))

    def test_of_several(self) -> None:
        asked = [prompts(True)[0], prompts(True)[-1]]
        assert gold_rewards(asked, ["wave", "star"]).tolist() == pytest.approx([0.3, 0.3])
        assert gold_rewards(asked, ["star", "wave"]).tolist() == pytest.approx([-1.2, -1.2])


class TestData:
    def test_responses(self) -> None:
        found = responses(["sea"] * 2000 + ["music"] * 2000, np.random.default_rng(0))
        lengths = {len(response.split()) for response in found}
        assert lengths == set(range(SHORTEST, LONGEST + 1))
        own = [np.mean([gold_reward(topic, text) for text in found[part]]) for topic, part in _parts("sea", "music")]
        other = [np.mean([gold_reward(topic, text) for text in found[part]]) for topic, part in _parts("music", "sea")]
        assert min(own) > max(other) + 1

    def test_labels_are_right_in_about_four_of_five_pairs(self) -> None:
        pairs = preference_pairs(3000, np.random.default_rng(0))
        right = np.mean([pair.chosen_reward > pair.rejected_reward for pair in pairs])
        assert 0.74 < right < 0.83
        for pair in pairs[:50]:
            assert pair.chosen_reward == gold_reward(pair.prompt.topic, pair.chosen)
            assert pair.rejected_reward == gold_reward(pair.prompt.topic, pair.rejected)

    def test_clean_pairs(self) -> None:
        pairs = preference_pairs(200, np.random.default_rng(0), held_out=True, noisy=False)
        assert len(pairs) == 200 and all(pair.chosen_reward > pair.rejected_reward for pair in pairs)
        assert {pair.prompt for pair in pairs} <= set(prompts(True))

    def test_the_same_generator_gives_the_same(self) -> None:
        for draw in (lambda rng: corpus(50, rng), lambda rng: preference_pairs(50, rng)):
            first, again, other = (draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
            assert first == again != other


class TestModel:
    def test_tokenizer_knows_every_word(self) -> None:
        tokenizer = make_tokenizer()
        asked, answers = corpus(500, np.random.default_rng(0))
        for text in [f"{a} {b}{EOS}" for a, b in zip(asked, answers, strict=True)]:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(EOS)

    def test_model(self) -> None:
        tokenizer = make_tokenizer()
        state = torch.get_rng_state()
        first, again, other = (make_model(tokenizer, hidden=16, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        weights = [model.lm_head.weight for model in (first, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        assert first.dtype == torch.float32 and first.config.vocab_size == len(tokenizer)


def _parts(first: str, second: str) -> list[tuple[str, slice]]:
    return [(first, slice(2000)), (second, slice(2000, None))]
