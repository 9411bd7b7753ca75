"""The parts of the training loss, without ever storing the logits of a whole batch.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from dsv3_mini.balance import sequence_balance_loss
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import record_routing
from dsv3_mini.mtp import depth_tokens

# What does a step cost?


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of h @ weight.T against labels, some rows at a time: no (N, V) logits are ever stored.

    h (N, D), weight (V, D), labels (N,), rows a chunk, dtype of the products -> float32 scalar. Both gradients are
    computed on the way forward, while a chunk's logits are at hand.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        narrow, grad_h, grad_weight = weight.to(dtype), torch.empty_like(h), torch.zeros_like(weight)
        total = torch.zeros((), device=h.device)
        for h_rows, grad_rows, label in zip(h.split(rows), grad_h.split(rows), labels.split(rows), strict=True):
            h_rows = h_rows.to(dtype)
            log_p = (h_rows @ narrow.T).float().log_softmax(-1)  # (rows, V)
            total -= log_p.gather(1, label[:, None]).sum()
            grad = log_p.exp_()
            grad[torch.arange(len(label), device=h.device), label] -= 1.0
            grad = grad.to(dtype)
            grad_rows.copy_(grad @ narrow)
            grad_weight += grad.T @ h_rows
        ctx.save_for_backward(grad_h, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * grad, grad_weight * grad, None, None, None


def head_loss(h: Tensor, head: nn.Linear, labels: Tensor, dtype: torch.dtype, rows: int = 512) -> Tensor:
    """Cross-entropy of states (B, T, D) against labels (B, T), summed, in float32."""
    with torch.autocast(h.device.type, enabled=False):
        return HeadLoss.apply(h.flatten(0, 1).float(), head.weight, labels.flatten(), rows, dtype)


def training_losses(
    model: DeepSeekV3, windows: Tensor, mtp: bool = True, balance: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list]:
    """Every part of the loss for windows (B, T + 1), unweighted, and the routings of the main and the MTP layers.

    "loss" and "mtp" are nats a token as in `mtp_losses`, "balance" is the sequence-wise loss summed over the layers.
    """
    losses, n_labels = {}, windows[:, 1:].numel()
    with torch.autocast(windows.device.type, dtype, enabled=dtype != torch.float32), record_routing(model) as routings:
        h = model.model(windows[:, :-1])  # (B, T, D)
        losses["loss"] = head_loss(h, model.lm_head, windows[:, 1:], dtype) / n_labels
        depths = []
        for k, layer in enumerate(model.mtp_layers if mtp else [], start=1):
            given, label = depth_tokens(windows, k)  # (B, T-k)
            h = layer.shared_head.norm(layer(h[:, : given.shape[1]], given, model.model.rope(0, given.shape[1])))
            depths.append(head_loss(h, model.lm_head, label, dtype) / n_labels)
        if depths:
            losses["mtp"] = torch.stack(depths).mean()
    if routings and balance:
        top_k = model.config.num_experts_per_tok
        losses["balance"] = sum(sequence_balance_loss(r.scores, top_k, len(windows)) for r in routings)
    return losses, routings
