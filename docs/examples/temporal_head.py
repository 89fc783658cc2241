"""Train a temporal head on stored tokens: it predicts the tokens of a clip's next frame from the frames before.

    cosettle-cache manifest build sprites --split train --out sprites.parquet
    cosettle-cache extract --backbone dino_s --manifest sprites.parquet --plan frames --out sprites.zarr
    python docs/examples/temporal_head.py sprites.zarr

A quarter of the videos is held out. What the head has learnt is its error there over that of copying the last frame.
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from cosettle_cache import TokenClips

LENGTH, STRIDE, WIDTH = 4, 2, 128


class NextFrame(nn.Module):
    """Convolutions over time and place, `[clip frame row col dim]` to `[clip row col dim]`; starts as a copy."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(dim, WIDTH, (LENGTH - 1, 3, 3), padding=(0, 1, 1))
        self.out = nn.Conv2d(WIDTH, dim, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, past: Tensor) -> Tensor:
        """Return the last frame and what is expected to change."""
        mixed = nn.functional.gelu(self.mix(past.permute(0, 4, 1, 2, 3))).squeeze(2)
        return past[:, -1] + self.out(mixed).permute(0, 2, 3, 1)


def main(store: str, epochs: int = 60, workers: int = 2) -> tuple[float, float]:
    """Return the mean square error on held-out videos, and that of copying the last frame."""
    clips = TokenClips(store, LENGTH, STRIDE)  # one clip per video, another one in every epoch
    seeded = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    learnt, held_out = random_split(clips, (0.75, 0.25), seeded)
    loader = DataLoader(
        learnt, 4, shuffle=True, generator=seeded, num_workers=workers, persistent_workers=workers > 0
    )
    head = NextFrame(clips[0].tokens.shape[-1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for epoch in range(epochs):
        clips.set_epoch(epoch)
        for batch in loader:
            tokens = nn.functional.normalize(batch.tokens.float(), dim=-1)
            loss = nn.functional.mse_loss(head(tokens[:, :-1]), tokens[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        tokens = nn.functional.normalize(torch.stack([clip.tokens for clip in held_out]).float(), dim=-1)
        found = nn.functional.mse_loss(head(tokens[:, :-1]), tokens[:, -1]).item()
        copied = nn.functional.mse_loss(tokens[:, -2], tokens[:, -1]).item()
    print(
        f"{len(held_out)} held-out videos: error {found:.3g}, of a copy {copied:.3g}, ratio {found / copied:.3f}"
    )
    return found, copied


if __name__ == "__main__":
    main(sys.argv[1])
