"""What devices can do at best."""

import re

# Peak of dense bfloat16 matrix products, FLOP/s a device; float16 for V100, which has no bfloat16.
# From the makers' data sheets. JAX's names of the kinds on the left.
PEAK_FLOPS = (
    (r"NVIDIA H200( NVL)?", 989e12),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM.*", 989e12),  # not the PCIe and NVL cards
    (r"(NVIDIA )?A100.*", 312e12),
    (r"(Tesla |NVIDIA )?V100.*", 125e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in dense bfloat16, None where it is not known (a CPU, say).

    Args:
      device_kind: `jax.Device.device_kind`.
    """
    for pattern, peak in PEAK_FLOPS:
        if re.fullmatch(pattern, device_kind):
            return peak
    return None
