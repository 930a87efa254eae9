"""Runs inside a network namespace: listens on ports, or says which ports of which addresses it reaches.

python reaching.py listen tcp/80 udp/53
python reaching.py reach 10.0.0.1,10.0.0.2 tcp/80 udp/53
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys

_SECONDS = 30.0
"""Much longer than an answer takes. Silence is neither yes nor no, so it is an error."""


class _Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(data, addr)


async def listen(ports: list[str]) -> None:
    """Answer on every port until standard input ends."""
    loop = asyncio.get_running_loop()
    for protocol, _, number in (port.partition("/") for port in ports):
        if protocol == "tcp":
            await asyncio.start_server(lambda _, writer: writer.close(), "0.0.0.0", int(number))
        else:
            await loop.create_datagram_endpoint(_Echo, ("0.0.0.0", int(number)))
    print("listening", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def reach(addresses: list[str], ports: list[str]) -> None:
    """Print, as JSON, the ports of each address that answer."""
    tried = [(address, port) for address in addresses for port in ports]
    answers = await asyncio.gather(*(_answers(address, *port.split("/")) for address, port in tried))
    found: dict[str, list[str]] = {address: [] for address in addresses}
    for (address, port), answered in zip(tried, answers, strict=True):
        if answered:
            found[address].append(port)
    print(json.dumps(found))


async def _answers(address: str, protocol: str, number: str) -> bool:
    """Whether somebody answers; False where the network says that nobody may. Raises TimeoutError on silence."""
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as made:
        made.setblocking(False)
        try:
            async with asyncio.timeout(_SECONDS):
                await loop.sock_connect(made, (address, int(number)))
                if protocol == "udp":
                    await loop.sock_sendall(made, b"?")
                    await loop.sock_recv(made, 1)
        except TimeoutError:
            raise TimeoutError(f"{address} {protocol}/{number} says nothing") from None
        except OSError:
            return False
        return True


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        asyncio.run(listen(sys.argv[2:]))
    else:
        asyncio.run(reach(sys.argv[2].split(","), sys.argv[3:]))
