"""``nn.MultiheadAttention`` in layers that can be resized."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench.width.resize import detached


class SeparateAttention(nn.Module):
    """What ``nn.MultiheadAttention`` does, with a linear layer each for queries, keys and values.

    torch's own keeps all three in one tensor, and takes their width from the stream's: no head, and
    no part of one, can go without it. Here they have widths of their own. It is called in the same
    way; masks for each head are refused once heads are gone, by their shape.

    Args:
        attention: What it replaces; it gets the same weights.

    Raises:
        ValueError: If that adds keys of its own (``add_bias_kv``, ``add_zero_attn``).
    """

    in_proj_weight = in_proj_bias = None  # torch's encoders look at it before they take a fused way
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not separable(attention):
            raise ValueError("attention with keys of its own (add_bias_kv, add_zero_attn)")
        width = attention.embed_dim
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.split(width)
        else:
            own = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            weights = own
        bias = attention.in_proj_bias
        biases = (None, None, None) if bias is None else bias.split(width)
        parts = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = parts
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.num_heads = attention.num_heads
        self.scale = (width // attention.num_heads) ** -0.5
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``: outputs, and weights where they are asked for.

        Raises:
            RuntimeError: With ``is_causal`` and no mask, as torch's own.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint: it needs attn_mask, too")
        single = query.dim() == 2
        if not single and not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if single:
            query, key, value = (t[None] for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        heads = self.num_heads
        q, k, v = (
            t.unflatten(-1, (heads, t.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v)
        )
        mask = _mask(attn_mask, key_padding_mask, q, heads)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale
            )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if single:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _mask(own: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """What is added to the scores ``[B, heads, L, S]``: ``-inf`` where a key is not looked at."""
    added: Tensor | None = None
    if own is not None:
        own = own.unflatten(0, (-1, heads)) if own.dim() == 3 else own
        added = _number(own, q)
    if padding is not None:
        more = _number(padding[:, None, None, :], q)
        added = more if added is None else added + more
    return added


def _number(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def separable(attention: nn.MultiheadAttention) -> bool:
    """Whether ``SeparateAttention`` does what this attention does."""
    return attention.bias_k is None and not attention.add_zero_attn


def separated(model: nn.Module) -> nn.Module:
    """The network with ``SeparateAttention`` in place of each ``nn.MultiheadAttention``.

    Its outputs are the same. ``widthbench.apply`` does it by itself; ``find_groups`` and ``resize``
    take the network as it is.

    Args:
        model: The network; it is left as it was.

    Returns:
        A copy, or the network itself if there is no such attention in it.
    """
    if not any(_replaceable(m) for m in model.modules()):
        return model
    model = copy.deepcopy(model, detached(model))
    made: dict[int, SeparateAttention] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # the same one twice, too
            if child is not None and _replaceable(child):
                new = made.setdefault(id(child), SeparateAttention(child))
                setattr(parent, name, new)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # for torch's fused way alone
    return SeparateAttention(model) if _replaceable(model) else model


def _replaceable(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return type(module) is nn.MultiheadAttention and separable(module)
