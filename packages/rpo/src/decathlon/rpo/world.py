"""A small language in which the true reward of a response is known.

A prompt asks about an object of one of six topics; a response is a handful of words. Good ones name many different
things of the topic, politely and in about eight words. Half of the combinations of object and template are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOPICS = {
    "sea": (
        "ship harbour anchor lighthouse dolphin reef",
        "wave salt tide sail coast sailor storm island shell fish deep blue",
    ),
    "kitchen": (
        "oven soup bread kettle spoon recipe",
        "flour butter taste boil sugar pepper dish cook warm slice bowl stew",
    ),
    "garden": (
        "rose tulip hedge orchard lawn greenhouse",
        "seed soil bloom leaf root water grow bee petal green spade shade",
    ),
    "music": (
        "violin piano choir drum opera guitar",
        "tune string chord rhythm melody note sing stage tempo harmony loud play",
    ),
    "football": (
        "goalkeeper striker referee stadium penalty league",
        "goal kick pass team match score win ball fan half defend whistle",
    ),
    "space": (
        "rocket planet comet telescope moon astronaut",
        "star orbit launch galaxy gravity crater light dust sky lunar engine far",
    ),
}
"""Of each topic six objects to ask about, and twelve words to answer with."""

TEMPLATES = (
    "tell me about the {} :",
    "what should i know about the {} ?",
    "please describe the {} :",
    "why do people like the {} ?",
    "write something about the {} :",
    "what comes to mind with the {} ?",
    "how would you explain the {} ?",
    "give me some words on the {} :",
)
POLITE = tuple(["please", "thanks", "kindly", "gladly", "welcome", "sorry"])
RUDE = tuple(["stupid", "idiot", "shut", "dumb", "ugly", "hate"])
FILLER = tuple(["the", "a", "of", "and", "it", "is", "in", "with", "so", "very", "to", "on"])

SHORTEST, LONGEST, BEST_LENGTH = 4, 11, 8
PAD, EOS = "<pad>", "<eos>"

# how often a word comes from the topic, from other topics, is polite, rude, or filler: of careful and careless answers
_SHARES = np.array([[0.45, 0.10, 0.12, 0.04, 0.29], [0.15, 0.40, 0.04, 0.16, 0.25]])
_NAMES = tuple(TOPICS)
_WORDS = {topic: tuple(words.split()) for topic, (_, words) in TOPICS.items()}
_TOPIC_OF = {word: topic for topic, words in _WORDS.items() for word in words}


@dataclass(frozen=True)
class Prompt:
    """A question and the topic that it is about."""

    text: str
    topic: str


@dataclass(frozen=True)
class Pair:
    """A prompt with the preferred response and the other one, and what they are worth."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


def prompts(held_out: bool) -> list[Prompt]:
    """The 144 prompts to learn from or, `held_out`, the 144 others; every object and every template is in both."""
    return [
        Prompt(template.format(word), topic)
        for topic, (objects, _) in TOPICS.items()
        for number, word in enumerate(objects.split())
        for place, template in enumerate(TEMPLATES)
        if (number + place) % 2 == held_out
    ]


def gold_reward(topic: str, response: str) -> float:
    """What a response is worth, of which no method is told more than which of two is better, and that with errors.

    1 for each different word of the topic, 0.5 for each polite one (two of them count), -1 for each rude one, -0.5 for
    each word of another topic, -0.3 for each repetition, and -0.1 for each word more or less than eight.
    """
    words = response.split()
    on_topic = {word for word in words if _TOPIC_OF.get(word) == topic}
    off_topic = sum(word in _TOPIC_OF and _TOPIC_OF[word] != topic for word in words)
    polite, rude = (sum(word in kind for word in words) for kind in (POLITE, RUDE))
    repetitions = len(words) - len(set(words))
    return (
        len(on_topic)
        + 0.5 * min(polite, 2)
        - rude
        - 0.5 * off_topic
        - 0.3 * repetitions
        - 0.1 * abs(len(words) - BEST_LENGTH)
    )


def responses(topics: Sequence[str], rng: np.random.Generator) -> list[str]:
    """A response for each topic, half of them careful: 4 to 11 words, each drawn by itself."""
    count = len(topics)
    lengths = rng.integers(SHORTEST, LONGEST + 1, count)
    ends = _SHARES[rng.integers(0, len(_SHARES), count)].cumsum(1)[:, None, :-1]
    kinds = (rng.random((count, LONGEST, 1)) >= ends).sum(2)
    # a number for each word, which picks one within its kind
    picks, others = rng.integers(0, 2**31, (count, LONGEST)), rng.integers(1, len(_NAMES), (count, LONGEST))
    found = []
    for row, topic in enumerate(topics):
        own = _NAMES.index(topic)
        kept = slice(lengths[row])
        words = []
        for kind, pick, other in zip(kinds[row, kept], picks[row, kept], others[row, kept], strict=True):
            elsewhere = _WORDS[_NAMES[(own + other) % len(_NAMES)]]
            vocabulary = (_WORDS[topic], elsewhere, POLITE, RUDE, FILLER)[kind]
            words.append(vocabulary[pick % len(vocabulary)])
        found.append(" ".join(words))
    return found


def preference_pairs(count: int, rng: np.random.Generator, *, held_out: bool = False, noisy: bool = True) -> list[Pair]:
    """Pairs of responses to drawn prompts.

    Args:
        count: Number of pairs.
        rng: Draws them.
        held_out: Of which prompts.
        noisy: The preferred one is drawn by Bradley and Terry's model on half the gold reward, which prefers the better
            one in four of five pairs; False: the better one, of pairs that differ.
    """
    known = prompts(held_out)
    pairs: list[Pair] = []
    while len(pairs) < count:
        drawn = [known[place] for place in rng.integers(0, len(known), count)]
        topics = [prompt.topic for prompt in drawn]
        first, second, chances = responses(topics, rng), responses(topics, rng), rng.random(count)
        for prompt, one, other, chance in zip(drawn, first, second, chances, strict=True):
            here, there = gold_reward(prompt.topic, one), gold_reward(prompt.topic, other)
            if not noisy and here == there:
                continue
            better = chance < 1 / (1 + np.exp((there - here) / 2)) if noisy else here > there
            pairs.append(Pair(prompt, one, other, here, there) if better else Pair(prompt, other, one, there, here))
    return pairs[:count]


def corpus(count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Prompts to learn from, drawn, and a response of mixed quality for each."""
    known = prompts(held_out=False)
    drawn = [known[place] for place in rng.integers(0, len(known), count)]
    return [prompt.text for prompt in drawn], responses([prompt.topic for prompt in drawn], rng)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that knows the language."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    texts = [*POLITE, *RUDE, *FILLER, *TEMPLATES, *(text for parts in TOPICS.values() for text in parts)]
    words = dict.fromkeys(word for text in texts for word in text.split() if word != "{}")
    vocabulary = {word: number for number, word in enumerate([PAD, EOS, "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="<unk>", padding_side="left"
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 64, layers: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """A fresh tiny Llama in float32 for a tokenizer.

    Args:
        tokenizer: Gives the size of the vocabulary, and the ends.
        hidden: Width; a multiple of 8, as there are four heads.
        layers: Depth.
        seed: Of the initial weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,  # from the usual 0.02, so narrow a model takes long to find out what a prompt is about
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def gold_rewards(asked: Sequence[Prompt], answers: Sequence[str]) -> NDArray[np.float64]:
    """Gold rewards (N,) of a response to each prompt."""
    return np.array([gold_reward(prompt.topic, answer) for prompt, answer in zip(asked, answers, strict=True)])
