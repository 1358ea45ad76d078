"""Two small GPTs as people write them by hand: in the style of nanoGPT, and in that of nanochat."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, CONTEXT = 50, 16


class Attention(nn.Module):
    """One projection for queries, keys and values, split by the model's width."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd, self.fused = heads, width, fused
        if not fused:
            self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        q = q.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        v = v.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads, fused), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """Learned positions, layer norms, and an output layer that is tied to the embedding."""

    def __init__(self, width: int = 48, heads: int = 3, fused: bool = True) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(width, heads, fused) for _ in range(2))
        parts = {"wte": nn.Embedding(WORDS, width), "wpe": nn.Embedding(CONTEXT, width), "h": layers}
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(width)})
        self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.transformer["wte"](words) + self.transformer["wpe"](places)
        for layer in self.transformer["h"]:
            x = layer(x)
        return self.lm_head(self.transformer["ln_f"](x))


def norm(x: Tensor) -> Tensor:
    """Root mean square, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; each pair of dimensions lies half a head apart."""
    half = x.shape[3] // 2
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos + other * sin, other * cos - one * sin], 3)


class GroupedAttention(nn.Module):
    """Queries that share keys and values, which are repeated or left to torch."""

    def __init__(self, width: int, heads: int, kv_groups: int, repeated: bool) -> None:
        super().__init__()
        self.heads, self.kv_groups, self.size, self.repeated = heads, kv_groups, width // heads, repeated
        self.c_q = nn.Linear(width, heads * self.size, bias=False)
        self.c_k = nn.Linear(width, kv_groups * self.size, bias=False)
        self.c_v = nn.Linear(width, kv_groups * self.size, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.c_q(x).view(batch, length, self.heads, self.size)
        k = self.c_k(x).view(batch, length, self.kv_groups, self.size)
        v = self.c_v(x).view(batch, length, self.kv_groups, self.size)
        q, k = norm(turned(q, cos, sin)), norm(turned(k, cos, sin))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if self.repeated:
            k, v = (each.repeat_interleave(self.heads // self.kv_groups, dim=1) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeated)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, -1))


class NanoChat(nn.Module):
    """Rotary positions, norms without weights, squared ReLU, grouped queries, and logits within bounds."""

    def __init__(self, width: int = 64, heads: int = 8, kv_groups: int = 4, repeated: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, width)
        self.h = nn.ModuleList(GroupedAttention(width, heads, kv_groups, repeated) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(2))
        self.lm_head = nn.Linear(width, WORDS, bias=False)
        size = width // heads
        angles = torch.outer(torch.arange(CONTEXT), 10_000.0 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None, :], persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        cos, sin = self.cos[:, : words.shape[1]], self.sin[:, : words.shape[1]]
        x = norm(self.wte(words))
        for attention, up, down in zip(self.h, self.up, self.down, strict=True):
            x = x + attention(norm(x), cos, sin)
            x = x + down(F.relu(up(norm(x))).square())
        return 15 * torch.tanh(self.lm_head(norm(x)) / 15)
