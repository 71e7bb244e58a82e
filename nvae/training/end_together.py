"""A rank that fails ends all ranks within seconds, and the first one says why, once.

The others may be waiting for the failed rank in a kernel that nothing interrupts, or may see no
more of it than a closed connection. So every rank has a thread that holds a connection to the
first: a rank that fails sends the cause, one that is killed ends its connection without a word. The
first rank prints the cause and tells all; then each process leaves without waiting for a library's
cleanup, which would wait for the collective acts that are under way.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NoReturn

import pytorch_lightning as pl
import torch.distributed as dist

from nvae.command_line import brief
from nvae.training.ranks import OtherRankError, on_first_rank, together

PATIENCE = 5.0
"""Seconds for a cause to arrive, or for the loggers to end."""

MEET = 60.0
"""Seconds for the other ranks to connect to the first."""

_DONE = b"done\n"


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        text: what the user reads.
        code: of every process's exit.
    """

    text: str
    code: int

    def line(self) -> bytes:
        """To be sent."""
        return json.dumps(asdict(self)).encode() + b"\n"


class EndTogether(pl.Callback):
    """Tells all ranks of an error on one, and ends them.

    Has to be the first of the callbacks. One process alone needs none.

    Args:
        explain: text for the user, and exit code, of an error on this rank.
        agreed: errors that all ranks raise at once, or that end the others in another way.
    """

    def __init__(
        self,
        explain: Callable[[BaseException], tuple[str, int]],
        agreed: tuple[type[BaseException], ...],
    ) -> None:
        self._explain, self._agreed = explain, agreed
        self._peers: dict[socket.socket, int] = {}  # and their ranks; the first for all others

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The ranks have met: begin to watch."""
        self._trainer, self._rank = trainer, trainer.global_rank
        self._over, self._logged = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        launcher = trainer.strategy.launcher
        started: list[subprocess.Popen[bytes]] = getattr(launcher, "procs", [])
        if started:  # Lightning's own observer keeps the other list: it would kill this process
            launcher.procs = list(started)  # type: ignore[union-attr]
            started.clear()
        self._peers = connections(self._rank, trainer.world_size)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All has gone well."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End all ranks, unless they have agreed to end."""
        if not self._peers:
            return
        if isinstance(exception, self._agreed):
            self._stop()
            return
        if _is_consequence(exception):
            time.sleep(PATIENCE)  # the thread hears of the cause, and ends this process
            error = brief(exception, 200)
            failure = Failure(f"error: another rank is gone or does not answer ({error})", 1)
        else:
            failure = Failure(*self._explain(exception))
        if self._rank == 0:
            self._end_all(failure)
        self._send(failure.line())
        time.sleep(3 * PATIENCE)
        self._leave(failure)

    def _stop(self) -> None:
        if not self._peers:
            return
        self._over.set()
        self._thread.join()
        self._send(_DONE)
        for peer in self._peers:
            peer.close()
        self._peers = {}

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in selector.select(0.2):
                    assert isinstance(key.fileobj, socket.socket)
                    said = _line(key.fileobj)
                    selector.unregister(key.fileobj)
                    if said != _DONE:
                        self._hear(said, self._peers[key.fileobj])

    def _hear(self, said: bytes, rank: int) -> NoReturn:
        if self._rank == 0:
            self._end_all(Failure(**json.loads(said)) if said else self._death(rank))
        if said:
            os._exit(Failure(**json.loads(said)).code)  # the first has printed it
        self._leave(Failure("error: the first rank was ended without a word", 1))

    def _death(self, rank: int) -> Failure:
        """Of a rank that has said nothing; the system's word where this process has started it."""
        started = getattr(self._trainer.strategy.launcher, "procs", [])
        text = f"error: rank {rank} was ended"
        if 1 <= rank <= len(started):
            process = started[rank - 1]
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(PATIENCE)
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                text = f"error: rank {rank} (process {process.pid}) was ended {how}"
        return Failure(f"{text}; a full memory may be why; run the same command again", 1)

    def _end_all(self, failure: Failure) -> NoReturn:
        """In the first rank."""
        self._ending.acquire()  # for good: the other thread of this process waits for its end
        _say(failure)
        threading.Thread(target=self._tell_loggers, daemon=True).start()
        self._logged.wait(PATIENCE)
        self._send(failure.line())
        os._exit(failure.code)

    def _leave(self, failure: Failure) -> NoReturn:
        """In another rank, which the first has not answered."""
        _say(failure)
        os._exit(failure.code)

    def _send(self, line: bytes) -> None:
        for peer in self._peers:
            with suppress(OSError):  # it is gone
                peer.sendall(line)

    def _tell_loggers(self) -> None:
        for logger in self._trainer.loggers:
            try:
                logger.finalize("failed")
            except Exception as error:
                print(f"a logger did not end: {brief(error)}", file=sys.stderr)
        self._logged.set()


def connections(rank: int, world: int) -> dict[socket.socket, int]:
    """From the first rank to all others, and from each of them to the first; a common act.

    Returns:
        The open sockets, with the rank at the other end of each.
    """
    servers: list[socket.socket] = []

    def listen() -> tuple[int, str]:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        servers.append(
            socket.create_server(("", 0), family=family, backlog=world, dualstack_ipv6=dual)
        )
        return servers[0].getsockname()[1], secrets.token_hex(16)

    port, word = on_first_rank(listen)
    found: dict[socket.socket, int] = {}
    with together():
        if rank:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), MEET)
            peer.sendall(f"{word} {rank}\n".encode())
            found[peer] = 0
        while rank == 0 and len(found) < world - 1:
            servers[0].settimeout(MEET)
            peer, _ = servers[0].accept()
            peer.settimeout(MEET)
            given, _, number = _line(peer).decode(errors="replace").partition(" ")
            if secrets.compare_digest(given.encode(), word.encode()):
                found[peer] = int(number)
            else:
                peer.close()  # whoever that was
    for server in servers:
        server.close()
    for peer in found:  # hours may pass without a word
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return found


def _line(peer: socket.socket) -> bytes:
    """One line; what the peer's end cuts off is nothing."""
    said = b""
    with suppress(OSError):
        while not said.endswith(b"\n") and (more := peer.recv(65536)):
            said += more
    return said if said.endswith(b"\n") else b""


def _is_consequence(error: BaseException) -> bool:
    """Whether it says no more than that another rank is gone."""
    if isinstance(error, OtherRankError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        name in str(error).lower() for name in ("gloo", "nccl", "connection closed by peer")
    )


def _say(failure: Failure) -> None:
    sys.stdout.flush()
    print(failure.text, file=sys.stderr, flush=True)
