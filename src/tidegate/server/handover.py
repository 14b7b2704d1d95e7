"""Hand-over of the addresses from one process to its successor, with `[server] reuse_port`: both listen for a while.

The kernel distributes new connections over all sockets that listen on one address (SO_REUSEPORT). So the old process stops
accepting as soon as it drains, if another one listens: it accepts what the kernel has queued for it, closes its socket, and
answers on its open connections until their clients have left. Connections whose TCP handshake is in progress at that moment are
reset by the kernel, unless `net.ipv4.tcp_migrate_req` is 1 (Linux 5.14): then it moves them to the other socket.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Final

from tidegate.listen_address import is_unix, parse_address
from tidegate.server.addresses import free_address

_TABLES: Final = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}
_LISTEN: Final = "0A"


def shared_address(text: str, name: str) -> tuple[str, int]:
    """The address of a setting, where another process may listen too.

    Args:
        text: `host:port`; port 0 for any free one.
        name: of the setting, for the error.

    Returns:
        Host and port.

    Raises:
        SettingsError: if it is not a valid address.
    """
    host, port = parse_address(text, name)
    return (host, port) if port or is_unix(host) else free_address(text, name)


def listening_sockets(host: str, port: int) -> int:
    """How many sockets of this machine listen on an address; 0 where the system does not report it (it is not Linux).

    Args:
        host: as in the setting.
        port: 1 to 65535.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        lines = _TABLES[family].read_text().splitlines()[1:]
    except (OSError, KeyError):
        return 0
    # 127.0.0.1:8080 is 0100007F:1F90: words in the byte order of the machine.
    packed = socket.inet_pton(family, str(address[0]).partition("%")[0])
    local = "".join(f"{word:08X}" for (word,) in struct.iter_unpack("=I", packed)) + f":{port:04X}"
    found = 0
    for line in lines:
        _, where, _, state, *_ = line.split()
        found += where == local and state == _LISTEN
    return found
