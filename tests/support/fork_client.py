"""Asks a `fork_server` to run a script with the streams of this process, and ends as it has ended.

python -ISs fork_client.py SOCKET SCRIPT [ARGUMENT...]
"""

import array
import json
import os
import signal
import socket
import sys


def main() -> None:
    """Kills the script if this process is killed: the server sees the connection close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script is told, too
    request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109 - pathlib takes longer to import than all of this
    message = json.dumps(request).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
        sent = server.sendmsg([message], [rights])
        server.sendall(message[sent:])
        for stream in (0, 1, 2):
            os.close(stream)  # a pipe ends when the script has ended
        answer = server.recv(100)
    code = int(answer or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
