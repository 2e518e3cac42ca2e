"""Run by test_processes.py: one of two processes under a PeerWatch; the second comes to grief in
the way named.

python tests/peer_program.py HOST:PORT PROCESS_ID hang|die|fail
"""

from __future__ import annotations

import os
import signal
import sys
import time

from jax.experimental import multihost_utils

from contextdiff_jax.parallel import processes


def main(address: str, index: str, how: str) -> None:
    """Both start step 1; the first then waits in a collective for a step 2 that the second never
    reaches.
    """
    processes.start(address, 2, int(index), os.environ, timeout=60)
    with processes.PeerWatch(4) as watch:
        watch("in step 1")
        multihost_utils.sync_global_devices("step 1")
        if index == "1":
            time.sleep(2)  # several beats: the table says where it was
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "fail":
                raise ValueError("the disk of process 1 is gone")
            watch("reading the batch of step 2")
            time.sleep(120)
        watch("reading the batch of step 2")
        watch("in step 2")
        multihost_utils.sync_global_devices("step 2")


if __name__ == "__main__":
    main(*sys.argv[1:])
