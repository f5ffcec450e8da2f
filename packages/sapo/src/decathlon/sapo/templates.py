"""Templates of conversations: those of the paper's runs, and models that are made ready for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text.

    Attributes:
        text: In jinja.
        tokens: Special tokens that it takes for granted.
        end: Which of them ends a response; None leaves the tokenizer's end token.
    """

    text: str
    tokens: tuple[str, ...] = ()
    end: str | None = None


TEMPLATES = {
    "zephyr": Template(
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": Template(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        tokens=("<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
    ),
}
"""By name."""


def find_template(name: str) -> Template:
    """A template by name, or from a file.

    Raises:
        UserError: If there is none.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise UserError(f"chat_template must be {', '.join(TEMPLATES)} or a .jinja file that is there, got {name!r}")
    return Template(path.read_text(encoding="utf-8"))


def set_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer a template.

    Raises:
        UserError: If there is none, or the tokenizer lacks its tokens.
    """
    template = find_template(name)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in template.tokens if token not in vocabulary]:
        raise UserError(
            f"chat_template {name} needs the tokens {', '.join(missing)}, which this model does not have: make a copy "
            f"that has them, `decathlon-sapo prepare MODEL FOLDER --chat_template {name}`, and train that"
        )
    tokenizer.chat_template = template.text
    if template.end is not None:
        tokenizer.eos_token = template.end


def prepare_model(model: Any, tokenizer: Any, name: str, folder: str | Path) -> int:
    """Save a model with a template, and with embeddings of the tokens that it needs.

    Args:
        model: Of transformers; changed in place.
        tokenizer: Of the model; changed in place.
        name: Of the template.
        folder: Where to.

    Returns:
        The number of tokens that are new.

    Raises:
        UserError: As `find_template`.
    """
    template = find_template(name)
    added = int(tokenizer.add_tokens(list(template.tokens), special_tokens=True))
    set_template(tokenizer, name)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    with atomic_path(folder) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return added
