"""Peak dense bf16 FLOP/s of known devices, the denominator of MFU.

Dense figures (without structured sparsity) of NVIDIA's data sheets. A device that is not listed has no MFU rather
than a wrong one.
"""

# First match wins, so the narrower names come first. Compared with the lower-case device name.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989.4e12),
    ("h200 nvl", 835.5e12),
    ("h200", 989.4e12),
    ("h100 nvl", 835.5e12),
    ("h100 pcie", 756e12),
    ("h100", 989.4e12),
    ("a100", 312e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, e.g. 9.894e14 for "NVIDIA H100 80GB HBM3"; None when it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
    """
    name = device_name.lower()
    if " mig " in f" {name} ":  # a slice of a device does not reach the device's peak
        return None
    return next((peak for known, peak in _PEAKS if known in name), None)
