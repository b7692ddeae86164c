"""`clip-ray train` whose workers log their samples: CONFIG IDS_FOLDER PAUSE_S STOP_AT."""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any


def main() -> None:
    if address := os.environ.get("DRIVER_ADDRESS"):
        # Among several nodes of a machine Ray would take the head for the driver's.
        import ray

        ray.init = functools.partial(ray.init, _node_ip_address=address)
    from clip_ray import cli
    from clip_ray.training import launch

    config, folder, pause_s, stop_at = sys.argv[1:]

    def worker(loop_config: dict[str, Any]) -> None:
        logging_worker(loop_config, folder, float(pause_s), int(stop_at))

    launch.train_worker = worker
    launch.RESIZE_INTERVAL_S = 5.0
    cli.main(["train", config])


def logging_worker(loop_config: dict[str, Any], folder: str, pause_s: float, stop_at: int) -> None:
    import time
    from pathlib import Path

    from sample_log import wants_memory

    from clip_ray.collectives import broadcast_object
    from clip_ray.training import worker
    from clip_ray.training.context import Asked

    class Context(worker.RayContext):
        def micro_batches(self, steps: range) -> Any:
            # The ledger counts attempts; what is logged must be told apart without it.
            attempt = broadcast_object(time.time())
            wanted = wants_memory(Path(folder), os.getpid())
            with Path(folder, f"{self._rank}-{os.getpid()}").open("a") as log:
                for step, batch in zip(steps, super().micro_batches(steps), strict=True):
                    ids = batch["sample_ids"].tolist()
                    entry = {"step": step, "rank": self._rank, "attempt": attempt}
                    entry |= {"at_s": time.time(), "ids": ids}
                    print(json.dumps(entry), file=log, flush=True)
                    self._done = step + 1
                    if wanted.exists():
                        bytearray(2**33)
                    yield batch
                    time.sleep(pause_s)

        def asked(self) -> Asked:
            return Asked.STOP if self._done == stop_at else super().asked()

    worker.RayContext = Context
    worker.train_worker(loop_config)


if __name__ == "__main__":
    main()
