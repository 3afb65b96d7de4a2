"""How tests compile for the CPU: fast, as programs are small and many. What XLA's optimizer adds is nothing that they test."""

import importlib.metadata

FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # half the time to compile; newer compilers don't have it
  FAST += " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
  """XLA_FLAGS of a process that simulates so many devices; to set before it imports JAX."""
  return f"{FAST} --xla_force_host_platform_device_count={devices}"
