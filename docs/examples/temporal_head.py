"""Train a head of your own on stored tokens: it tells clips in order from clips with two frames swapped.

    cosettle-cache manifest build sprites --split train --out sprites.parquet
    cosettle-cache extract --backbone dino_s --manifest sprites.parquet --plan frames --out sprites.zarr
    python docs/examples/temporal_head.py sprites.zarr

A quarter of the videos is held out (the task: Misra et al., Shuffle and Learn, ECCV 2016).
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from cosettle_cache import TokenClips

LENGTH, STRIDE, WIDTH = 4, 2, 32
SWAPPED = [0, 2, 1, 3]


class OrderHead(nn.Module):
    """Logit of the right order, from how much each channel of a reduced token changes from frame to frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, WIDTH)
        self.judge = nn.Sequential(nn.LayerNorm(WIDTH * (LENGTH - 1)), nn.Linear(WIDTH * (LENGTH - 1), 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `[clip]` of tokens `[clip frame row col dim]`."""
        change = self.reduce(nn.functional.normalize(tokens.float(), dim=-1)).diff(dim=1).abs()
        return self.judge(change.mean((2, 3)).flatten(1)).squeeze(-1)


def both_orders(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return every clip twice, in order and with two frames swapped, and which is which."""
    return torch.cat([tokens, tokens[:, SWAPPED]]), torch.tensor([1.0, 0.0]).repeat_interleave(len(tokens))


def main(store: str, epochs: int = 30, workers: int = 2) -> tuple[list[float], float]:
    """Return the loss of every step and the accuracy on held-out videos; chance is 0.5."""
    torch.manual_seed(0)
    clips = TokenClips(store, LENGTH, STRIDE)  # one clip of every video, another one in every epoch
    learnt, held_out = random_split(clips, (0.75, 0.25))
    loader = DataLoader(learnt, 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    head, losses = OrderHead(clips[0].tokens.shape[-1]), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for epoch in range(epochs):
        clips.set_epoch(epoch)
        for batch in loader:
            tokens, is_right = both_orders(batch.tokens)
            loss = nn.functional.binary_cross_entropy_with_logits(head(tokens), is_right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    right = []
    for epoch in range(10):
        clips.set_epoch(epoch)
        tokens, is_right = both_orders(torch.stack([clip.tokens for clip in held_out]))
        right += ((head(tokens) > 0) == (is_right > 0)).tolist()
    accuracy = sum(right) / len(right)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {accuracy:.2f} of {len(right)} held-out clips right")  # noqa: T201
    return losses, accuracy


if __name__ == "__main__":
    main(sys.argv[1])
