"""The end of a control channel."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvtransfer.control import Outbox


async def test_a_carrier_cancelled_during_its_last_write_leaves_no_task_and_no_unread_exception() -> None:
    """As grpc.aio does: the channel is given up, its last write is under way, and the peer cancels the call."""
    unread: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unread.append(context))
    outbox: Outbox[int] = Outbox()
    is_writing, is_broken = asyncio.Event(), asyncio.Event()

    async def write(message: int) -> None:
        is_writing.set()
        await is_broken.wait()
        raise ConnectionError(f"{message} was not taken")

    async def read() -> None:
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    outbox.put(1)
    carrying = asyncio.create_task(outbox.carry(read(), write, last_write_timeout_s=10.0))
    await is_writing.wait()
    outbox.lose("given up")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    carrying.cancel()
    is_broken.set()
    with pytest.raises(asyncio.CancelledError):
        await carrying
    del carrying
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert unread == []
