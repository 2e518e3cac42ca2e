"""ContextDiff (ICLR 2024) in JAX: diffusion whose forward and reverse process share a learned
cross-modal context.
"""
