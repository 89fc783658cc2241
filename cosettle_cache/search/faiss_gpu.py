"""FAISS on a GPU, on torch's own memory and stream: nearest keys by dot products, whatever the window."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cosettle_cache.core.errors import UsageError, first_line

#: Neighbours that FAISS finds on a GPU at most.
MOST_ON_GPU = 2048
#: Bytes on the card that FAISS keeps for itself.
_SCRATCH_BYTES = 2**28


def check_gpu_faiss() -> None:
    """Raise `UsageError` unless FAISS can be loaded and sees a GPU."""
    hint = "in place of what is there 'cosettle-cache[gpu]' (CUDA 12) or [gpu-cuda13]; or --search torch"
    try:
        faiss: Any = import_module("faiss")
    except (ImportError, OSError) as error:  # another CUDA's libraries are not there
        raise UsageError("FAISS cannot be loaded", found=first_line(error), hint=hint) from error
    found = f"FAISS {faiss.__version__} beside torch for CUDA {torch.version.cuda}"
    if not hasattr(faiss, "StandardGpuResources"):
        raise UsageError("the FAISS that is installed knows no GPU", found=found, hint=hint)
    if not faiss.get_num_gpus():
        raise UsageError("FAISS sees no GPU: it was built for another CUDA", found=found, hint=hint)


def nearest_on_gpu(
    queries: Float[Tensor, "query dim"], keys: Float[Tensor, "key dim"], k: int
) -> tuple[Float32[Tensor, "query k"], Int64[Tensor, "query k"]]:
    """Return the k largest dot products and where their keys are; both tensors are float32 or both float16.

    FAISS reads torch's memory on torch's stream, and neither waits; float16 products are summed in float32.
    """
    faiss: Any = import_module("faiss")
    device = queries.device.index or 0
    kinds = {torch.float16: faiss.DistanceDataType_F16, torch.float32: faiss.DistanceDataType_F32}
    queries, keys = queries.contiguous(), keys.contiguous()
    values = torch.empty(len(queries), k, device=queries.device)
    index = torch.empty(len(queries), k, device=queries.device, dtype=torch.int64)
    asked, pointer = faiss.GpuDistanceParams(), faiss.cast_integer_to_void_ptr
    asked.metric, asked.k, asked.dims, asked.device = faiss.METRIC_INNER_PRODUCT, k, keys.shape[1], device
    asked.vectors, asked.numVectors, asked.vectorsRowMajor = pointer(keys.data_ptr()), len(keys), True
    asked.queries, asked.numQueries, asked.queriesRowMajor = pointer(queries.data_ptr()), len(queries), True
    asked.vectorType, asked.queryType = kinds[keys.dtype], kinds[queries.dtype]
    asked.outDistances = faiss.cast_integer_to_float_ptr(values.data_ptr())
    asked.outIndices, asked.outIndicesType = pointer(index.data_ptr()), faiss.IndicesDataType_I64
    resources = _resources(device)
    stream = torch.cuda.current_stream(queries.device).cuda_stream
    resources.setDefaultStream(device, faiss.cast_integer_to_cudastream_t(stream))
    faiss.bfKnn(resources, asked)
    return values, index


@cache
def _resources(device: int) -> Any:
    faiss: Any = import_module("faiss")
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    return resources
