"""Run with TRITON_INTERPRET=1: the kernel's candidates lead to what torch's lead to, to the last bit."""

from __future__ import annotations

import torch

from cosettle_cache.core.types import Grid
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.search import rough
from cosettle_cache.search.masked import make_slabs
from cosettle_cache.search.rough import FrameKeys, Look, RoughRanker
from cosettle_cache.search.triton_names import TritonRanker

CPU = torch.device("cpu")
CASES = (
    ("cosettle", {"radius": 2.5, "n_context": 3}),
    ("dino", {"radius": 2, "n_context": 2, "top_k": 9}),
    ("crw", {"radius": 40, "n_context": 1}),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    # No CPU multiplies float16 with float32 results.
    rough._multiply_into = lambda a, b, out: torch.mm(a.float(), b.float(), out=out)
    grid, generator = Grid(7, 11), torch.Generator().manual_seed(0)
    keys = FrameKeys(4, grid.n_tokens, 24, CPU, torch.float16)
    for frame in range(6):
        tokens = torch.randn(grid.n_tokens, 24, generator=generator)
        keys.put(torch.nn.functional.normalize(tokens, dim=-1), frame)
    for preset, fields in CASES:
        protocol = make_protocol(preset, **fields)
        slabs = make_slabs(grid, protocol, CPU, 6)
        firsts = slabs if protocol.mask_first else make_slabs(grid, None, CPU, 6)
        for slab, first in zip(slabs, firsts, strict=True):
            look = Look(keys, 5, 5 - protocol.n_context, slab, first)
            by_kernel = TritonRanker().name(look, protocol.top_k)
            by_torch = RoughRanker("cuda").name(look, protocol.top_k)
            for mine, wanted in zip(by_kernel, by_torch, strict=True):
                torch.testing.assert_close(mine, wanted, atol=0, rtol=0)
        print(preset)
