"""A few threads for work on large inputs, so that the event loop stays responsive.

The threads share Python's lock, so work here must release it within milliseconds: inputs are bounded before
(`router/face/body.py`) and tokenized by a call that releases it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from baton.errors import Overloaded

_Result = TypeVar("_Result")


class Offload:
    def __init__(self, num_threads: int, max_jobs: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="offload")
        self._max_jobs = max_jobs
        # Running and waiting jobs, including those whose caller has left.
        self._jobs: list[Future[Any]] = []

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Raises Overloaded at once if too many jobs wait, and the errors of ``work``."""
        self._jobs = [job for job in self._jobs if not job.done()]
        if len(self._jobs) >= self._max_jobs:
            raise Overloaded(
                f"{len(self._jobs)} large requests are being read, the limit; try again", retry_after_s=1.0
            )
        job = self._executor.submit(work)
        self._jobs.append(job)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Waiting jobs are dropped; running ones end on their own within moments."""
        self._executor.shutdown(wait=False, cancel_futures=True)
