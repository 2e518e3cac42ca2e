# Sourced before a command on NVIDIA GPUs: what XLA is told, each with its reason. Your own flags, in
# XLA_FLAGS, stand last and win. docs/accelerators.md has what an H200 does with them; what each is
# worth is timed nowhere yet.
#   source launch/gpu_environment.sh && python -m contextdiff_jax.train --config=... --workdir=...
flags=(
  # collectives of a sharded step start early and end late, with other layers' products between
  --xla_gpu_enable_latency_hiding_scheduler=true
  # one all-reduce of many gradients: a UNet has hundreds, most of them small
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  # matrix products of bfloat16 by the fastest of Triton's and cuBLAS' kernels
  --xla_gpu_enable_triton_gemm=true
)
# DETERMINISTIC=1: the same bits in every run, at the price of slower scatters and sums
[ "${DETERMINISTIC:-0}" = 1 ] && flags+=(--xla_gpu_deterministic_ops=true)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
# a training has the GPU alone; what shares it (the benchmark beside torch) takes memory as it needs
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
unset flags
