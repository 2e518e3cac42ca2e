"""python -m contextdiff_jax.data.cache: the first edition's name of the command that caches
latents, `contextdiff_jax.cache_latents`.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("contextdiff_jax.cache_latents", run_name="__main__", alter_sys=True)
