"""Prompt and shared leading tokens of a pair run through the model once (beyond the paper).

A pair becomes one row: prompt, shared tokens, the rest of the chosen response, the rest of the rejected one, which
neither sees the chosen one nor stands after it. The log-probability of a token comes from the token before it, and the
last shared token has only one successor in the row, so a copy of it stands before the rejected rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from decathlon.sapo.objectives import IGNORED
from decathlon.sapo.pairs import Pair

_FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
_SHARED, _LAST, _CHOSEN, _REJECTED, _PADDING = range(5)  # parts of a row; _LAST is the last shared token


def share_prefixes(pairs: Sequence[Pair], pad_token: int, width: int) -> dict[str, Tensor]:
    """The rows, and where each token of the padded batch stands in them.

    Args:
        pairs: B pairs.
        pad_token: Fills up the rows.
        width: T, of the padded batch.

    Returns:
        `packed_ids`, `packed_labels`, `packed_positions` and `packed_parts`, int64 [B, N]; `packed_places`, int64
        [2 B, T - 1]: of a token of a chosen row, then of a rejected one, the place of its log-probability in its row,
        and -1 where there is none.
    """
    ids, labels, positions, parts, places = [], [], [], [], []
    for pair in pairs:
        prefix = pair.prompt_ids + pair.chosen_ids[: pair.shared]
        chosen, rejected = pair.chosen_ids[pair.shared :], pair.rejected_ids[pair.shared :]
        size = len(prefix)
        ids.append(torch.tensor([*prefix, *chosen, prefix[-1], *rejected]))
        labels.append(torch.tensor([IGNORED] * size + chosen + [IGNORED] + rejected))
        positions.append(torch.cat((torch.arange(size + len(chosen)), torch.arange(size - 1, size + len(rejected)))))
        parts.append(
            torch.tensor([_SHARED] * (size - 1) + [_LAST] + [_CHOSEN] * len(chosen) + [_REJECTED] * (len(rejected) + 1))
        )
        for first, rest in ((size, chosen), (size + len(chosen) + 1, rejected)):
            row = torch.full((width - 1,), -1)
            row[size - 1 : size - 1 + len(rest)] = torch.arange(first - 1, first - 1 + len(rest))
            places.append(row)
    return {
        "packed_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token),
        "packed_labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "packed_positions": pad_sequence(positions, batch_first=True),
        "packed_parts": pad_sequence(parts, batch_first=True, padding_value=_PADDING),
        "packed_places": torch.stack(places[0::2] + places[1::2]),
    }


def visible(parts: Tensor) -> Tensor:
    """Which tokens of a row see which, bool [B, 1, N, N].

    Args:
        parts: Part of the row that a token belongs to, [B, N].
    """
    size = parts.shape[1]
    order = torch.ones(size, size, dtype=torch.bool, device=parts.device).tril()
    asks, seen = parts[:, :, None], parts[:, None, :]
    shared = (seen == _SHARED) | ((seen == _LAST) & (asks != _REJECTED))
    # padding sees itself, as attention to nothing is not a number
    return (order & (shared | (seen == asks)))[:, None]


class SharingModel:
    """A model that runs the packed rows, and gives its output in the shape of the padded batch.

    Args:
        model: With trl's fused head.
        packed: As `share_prefixes` gives it.
    """

    def __init__(self, model: Any, packed: dict[str, Tensor]) -> None:
        self._model, self._packed = model, packed

    @classmethod
    def take(cls, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What to call, and with what: the model itself where nothing is packed."""
        packed = {name: value for name, value in inputs.items() if name.startswith("packed_")}
        if not packed:
            return model, inputs
        return cls(model, packed), {name: value for name, value in inputs.items() if name not in packed}

    def __call__(self, *, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The output for the padded batch, 0 where it has no label; without labels, the model's own."""
        if labels is None:
            return self._model(input_ids=input_ids, **kwargs)
        kwargs.pop("attention_mask")
        packed = self._packed
        nothing = torch.zeros((), dtype=_dtype_of(self._model), device=input_ids.device)
        hidden = ~visible(packed["packed_parts"])
        output = self._model(
            input_ids=packed["packed_ids"],
            position_ids=packed["packed_positions"],
            attention_mask=nothing.masked_fill(hidden, torch.finfo(nothing.dtype).min),
            labels=packed["packed_labels"],
            **kwargs,
        )
        places = packed["packed_places"]
        absent = places < 0

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.repeat(2, 1).gather(1, places.clamp(min=0)).masked_fill(absent, 0)

        found = {name: spread(getattr(output, name, None)) for name in _FIELDS}
        return SimpleNamespace(**found, aux_loss=getattr(output, "aux_loss", None))


def _dtype_of(model: Any) -> torch.dtype:
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return next(model.parameters()).dtype
