"""RMSNorm (arXiv 1910.07467). Computed in float32 whatever the dtype. Shape legend: T rows, H features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aria_train.kernels import blocks


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension of x [..., H]."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_H, eps).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        precise = torch.promote_types(x_TH.dtype, torch.float32)
        weight = weight_H.to(precise)
        scale_T1 = x_TH.new_empty(x_TH.shape[0], 1, dtype=precise)
        out_TH = torch.empty_like(x_TH)
        for rows in blocks(x_TH):
            x, scale = x_TH[rows].to(precise), scale_T1[rows]
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            if x_TH.dtype == precise:
                torch.mul(x, scale, out=out_TH[rows]).mul_(weight)
            else:
                out_TH[rows] = x.mul_(scale).mul_(weight)
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        return out_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        weight = weight_H.to(scale_T1.dtype)
        grad_x_TH, grad_weight = torch.empty_like(x_TH), torch.zeros_like(weight)
        for rows in blocks(x_TH):
            x, grad, scale = x_TH[rows].to(weight.dtype), grad_TH[rows].to(weight.dtype), scale_T1[rows]
            product = x * grad
            grad_weight += torch.mv(product.t(), scale.squeeze(1))
            # Normalising takes from the gradient its component along x.
            along = torch.mv(product, weight).unsqueeze(1).mul_(scale.pow(3)).div_(-x.shape[1])
            torch.mul(grad, weight, out=product).mul_(scale).addcmul_(x, along)
            grad_x_TH[rows] = product
        return grad_x_TH, grad_weight.to(weight_H.dtype), None
