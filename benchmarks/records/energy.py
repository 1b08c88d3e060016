"""The energy that a GPU takes, as NVIDIA's management library (NVML) counts it."""

from collections.abc import Callable

import torch


def meter(device: torch.device) -> Callable[[], float | None]:
    """Start to measure. The function returned gives the joules that `device` has taken since, or
    None where nothing counts them: `device` is no GPU, is a part of one, or is older than Volta, or
    nvidia-ml-py is not installed.

    The count is that of the whole board, whoever used it; the driver updates it every 0.1 s or so.
    """
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml
    except ImportError:
        return lambda: None
    try:
        pynvml.nvmlInit()
        # By its UUID: CUDA_VISIBLE_DEVICES gives devices other numbers than NVML has.
        uuid = torch.cuda.get_device_properties(device).uuid
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(board)  # millijoules
    except pynvml.NVMLError:
        return lambda: None
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - before) / 1000
