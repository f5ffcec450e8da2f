"""Cross-entropy of many logits in little memory: what `losses.token_cross_entropy` computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows of logits, a chunk at a time: no copy of the logits outlives its chunk.

    Forward keeps the logits and the log-normaliser of each row; backward computes the softmax again and writes the
    gradient in the logits' own precision.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float, chunk: int) -> Tensor:
        """Losses of the tokens, [N], of logits [N, V] and labels [N]; 0 where the label is `ignore_index`."""
        mask = labels != ignore_index
        targets = labels.masked_fill(~mask, 0)
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(labels.shape, dtype=wide, device=logits.device)
        normalizers = torch.empty_like(losses)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            scores = logits[part].to(wide)
            torch.logsumexp(scores, dim=1, out=normalizers[part])
            losses[part] = normalizers[part] - scores.gather(1, targets[part, None]).squeeze(1)
            if smoothing:
                uniform = normalizers[part] - scores.mean(dim=1)
                losses[part] = (1 - smoothing) * losses[part] + smoothing * uniform
        ctx.save_for_backward(logits, targets, mask, normalizers)
        ctx.smoothing, ctx.chunk = smoothing, chunk
        return losses.masked_fill_(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of the logits, [N, V], in their own precision."""
        logits, targets, mask, normalizers = ctx.saved_tensors
        result, asked = torch.empty_like(logits), mask & (gradient != 0)
        in_place = logits.dtype == normalizers.dtype  # then nothing has to be copied
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if in_place:
                scores = torch.sub(logits[part], normalizers[part, None], out=result[part]).exp_()
            else:
                scores = (logits[part].to(normalizers.dtype) - normalizers[part, None]).exp_()
            if ctx.smoothing:
                scores -= ctx.smoothing / scores.shape[1]
            scores.scatter_add_(1, targets[part, None], scores.new_full((len(scores), 1), ctx.smoothing - 1))
            # where nothing is asked for, nothing comes, not even of logits that are not finite
            scores.mul_(gradient[part, None]).masked_fill_(~asked[part, None], 0.0)
            if not in_place:
                result[part] = scores
        return result, None, None, None, None
