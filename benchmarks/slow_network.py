"""A TCP proxy on loopback that gives each connection a limited bandwidth, as S3 gives a request about 80 MB/s.

    python benchmarks/slow_network.py 127.0.0.1:8333 80

Prints the address it listens on, and runs until it is killed.
"""

import socket
import sys
import threading
import time

CHUNK_BYTES = 2**18


def copy(source: socket.socket, target: socket.socket, bytes_per_second: float) -> None:
    """Pass bytes on until the source ends. What it did not use while it was idle is not made up for."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    due = time.monotonic()
    try:
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
            now = time.monotonic()
            due = max(due, now - CHUNK_BYTES / bytes_per_second) + count / bytes_per_second
            if due > now:
                time.sleep(due - now)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        target.close()


def main(upstream: str, megabytes_per_second: float) -> None:
    """Serve connections."""
    host, _, port = upstream.rpartition(":")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, int(port)))
            for source, target in ((client, server), (server, client)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                arguments = (source, target, megabytes_per_second * 1e6)
                threading.Thread(target=copy, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
