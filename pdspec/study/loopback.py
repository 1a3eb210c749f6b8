"""What carries bytes at best on this machine: a plain socket of the loopback, and one core that copies."""

from __future__ import annotations

import socket
import threading

import numpy as np

from pdspec.study.machine import best_seconds

_MESSAGE = 2 << 20


def socket_rate(megabytes: int = 512) -> float:
    """Bytes per second from one thread's ``sendall`` to another's ``recv_into`` over TCP on the loopback."""
    count = (megabytes << 20) // _MESSAGE
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            source, target = bytearray(_MESSAGE), memoryview(bytearray(_MESSAGE))

            def send() -> None:
                for _ in range(count):
                    sender.sendall(source)

            def work() -> None:
                thread = threading.Thread(target=send)
                thread.start()
                left = count * _MESSAGE
                while left:
                    left -= receiver.recv_into(target, min(left, _MESSAGE))
                thread.join()

            return count * _MESSAGE / best_seconds(work, 3)


def copy_rate(megabytes: int = 256) -> float:
    """Bytes per second that one core copies out of memory into a buffer that stays in its cache, and no further."""
    source, target = np.ones((megabytes << 20) // _MESSAGE * _MESSAGE, np.uint8), np.zeros(_MESSAGE, np.uint8)

    def work() -> None:
        for at in range(0, len(source), _MESSAGE):
            target[:] = source[at : at + _MESSAGE]

    return source.nbytes / best_seconds(work, 3)
