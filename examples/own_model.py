"""A custom model: what can be pruned, what is skipped and why, and the cut."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop


class Block(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(hidden_size, 2 * hidden_size)
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states, [batch, tokens, hidden], for hidden states of the same shape."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def main() -> None:
    """List the model's groups, and cut it."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(64, 4), Block(64, 4), nn.Linear(64, 10))
    example = torch.randn(2, 16, 64)

    found = upop.find_prunable(model, example=example)
    for group in found.groups:
        print(f"{group.name}: {group.size} to choose from ({group.kind})")
    for skipped in found.skipped:
        print(f"{skipped.name} is skipped: {skipped.reason}")

    # Your own indices, here every other channel; `upop.Compression` and `upop.calibrate` choose them by importance.
    plan = {group.name: range(0, group.size, 2) for group in found.groups}
    before = upop.count_parameters(model)
    upop.shrink(model, plan, verify=example)
    print(f"{before:,} parameters before, {upop.count_parameters(model):,} now")


if __name__ == "__main__":
    main()
