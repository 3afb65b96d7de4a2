"""Attention on TPU by the Pallas kernel that comes with JAX (splash attention): no score matrix in memory, forward or backward.

The kernel wants lengths in multiples of its blocks, at least 128, and sees padding as segments. It is one device's program: on
a mesh each device runs it on its own samples (`data`, `fsdp`) and heads (`tensor`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

LANES = 128
BLOCKS = (512, 384, 256, 128)  # queries, and scores' columns, at a time: the largest that divides a length is taken
KEYS = 3072  # keys and values in fast memory at most: all of them but for long sequences
SAVED = "attention"  # name of what remat policies may keep: the output and the softmax's normaliser


def splash_attention(
  q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, causal_offset: int | None, interpret: bool
) -> Array:
  """As `layers.attention`.  q [B,T,H,D], k and v [B,S,K,D], segments int [B,T] and [B,S] -> [B,T,H,D].

  interpret: runs the kernel's program as plain JAX, on any platform, for tests.
  """
  batch, rows, _, size = q.shape
  if q_segments is None:
    q_segments, kv_segments = jnp.ones((batch, rows), jnp.int32), jnp.ones((batch, k.shape[1]), jnp.int32)
  query_pad, key_pad = -rows % LANES, -k.shape[1] % LANES
  if query_pad and not key_pad:
    key_pad = LANES  # padded queries need a key of their own segment: a row without any isn't finite
  pad = lambda x, count: jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))
  scaled = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)  # the kernel doesn't scale
  args = [pad(scaled, query_pad), pad(k, key_pad), pad(v, key_pad), pad(q_segments, query_pad), pad(kv_segments, key_pad)]
  args[:3] = [x.swapaxes(1, 2) for x in args[:3]]

  def local(q, k, v, q_segments, kv_segments):
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], causal_offset, interpret)
    return jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, segment_ids=splash.SegmentIds(a, b)))(
      q, k, v, q_segments, kv_segments
    )

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    samples = ("data", "fsdp") if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    tensor = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    split, rows_only = PartitionSpec(samples, tensor), PartitionSpec(samples)
    local = jax.shard_map(local, in_specs=(split, split, split, rows_only, rows_only), out_specs=split, check_vma=False)
  return local(*args).swapaxes(1, 2)[:, :rows]


def _kernel(heads: int, rows: int, columns: int, causal_offset: int | None, interpret: bool):
  shape = (rows, columns)
  mask = splash.FullMask(shape) if causal_offset is None else splash.CausalMask(shape, offset=causal_offset)
  q, part = (next(size for size in BLOCKS if length % size == 0) for length in shape)
  keys = max(size for size in range(part, min(columns, KEYS) + 1, part) if columns % size == 0)
  # One kernel makes all gradients. It adds up those of queries over blocks of keys in memory, hence the large blocks. Tokens
  # are the minor axis: heads of 64 channels would fill half of a tile.
  blocks = splash.BlockSizes(
    block_q=q,
    block_kv=keys,
    block_kv_compute=part,
    block_q_dkv=q,
    block_kv_dkv=keys,
    block_kv_dkv_compute=part,
    use_fused_bwd_kernel=True,
    **dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR),
  )
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
  )
