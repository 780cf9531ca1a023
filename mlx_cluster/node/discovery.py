"""mDNS: this node advertises itself on the local network and hears where the other configured nodes can be dialled.

Owns: a thread with an event loop of its own, in which ``zeroconf`` speaks and listens. Does not own: what counts of it
(``cluster.discovery``), which address is dialled (``cluster.addresses``).
Invariant: nothing waits for it; what it hears is looked up one service at a time, from a bounded queue.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import re
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_cluster import log
from mlx_cluster.cluster.discovery import MAX_ADDRESSES, SERVICE_TYPE, Announcement, Hints, Known, read, usable
from mlx_cluster.config.names import is_loopback, settings_of_node
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError
from mlx_cluster.node.identity import Identity

if TYPE_CHECKING:
    from zeroconf import Zeroconf

ANSWER_SECONDS = 3.0  # for the records of one service
STOP_SECONDS = 1.0
MAX_QUEUED = 64  # services to look up; what comes beyond is announced again by itself
MAX_LABEL = 40  # of a node's name in the service's name, whose label has 63 bytes at most

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Reach:
    """``interfaces``: own addresses on which mDNS is spoken. ``advertised``: own addresses that others may dial."""

    interfaces: tuple[str, ...]
    advertised: tuple[str, ...]


def make_discovery(settings: Settings, identity: Identity, version: str) -> Discovery | None:
    """None while ``cluster.discovery`` is static. Raises ``ConfigError`` naming what is missing."""
    if settings.cluster.discovery != "mdns":
        return None
    if importlib.util.find_spec("zeroconf") is None:
        raise ConfigError(
            "cluster.discovery: mdns needs the package zeroconf: pip install 'mlx-cluster[discovery]', "
            "or set cluster.discovery: static",
            key="cluster.discovery",
        )
    wanted = settings_of_node(settings, identity.entry).interfaces
    reach = find_reach(own_addresses(), wanted, identity.bind_host, f"nodes.{identity.name}.interfaces")
    own = Announcement(
        settings.cluster.name, identity.node_id, identity.name, version, identity.ports.comms, reach.advertised
    )
    known = {
        member.node_id: Known(
            member.name,
            int(identity.peers[member.node_id].rpartition(":")[2]),
            (identity.peers[member.node_id], *identity.other_addresses.get(member.node_id, ())),
        )
        for member in identity.members
        if member.node_id != identity.node_id
    }
    loopback = any(is_loopback(each) for each in reach.interfaces)
    return Discovery(own, reach.interfaces, Hints(settings.cluster.name, known, loopback=loopback))


def own_addresses() -> dict[str, tuple[str, ...]]:
    """Interface → its addresses, without IPv6 zones."""
    import ifaddr  # comes with zeroconf

    return {
        adapter.nice_name: tuple(ip.ip if isinstance(ip.ip, str) else ip.ip[0] for ip in adapter.ips)
        for adapter in ifaddr.get_adapters()
    }


def find_reach(there: dict[str, tuple[str, ...]], wanted: Iterable[str], bind_host: str, key: str) -> Reach:
    """Where to speak mDNS, and what to advertise: what ``wanted`` names, or all but loopback.

    A node that listens on one address advertises only that. Raises ``ConfigError`` for an interface that is not there.
    """
    wanted = tuple(wanted)
    chosen: list[str] = []
    for each in wanted:
        matching = there.get(each) or tuple(a for addresses in there.values() for a in addresses if a == each)
        if not matching:
            names = ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in there.items())
            raise ConfigError(f"{key}: this machine has no interface or address {each!r}; it has {names}", key=key)
        chosen += matching
    if not wanted:
        chosen = [a for addresses in there.values() for a in addresses if not is_loopback(a)]
    listens_on_all = bind_host in ("0.0.0.0", "::")
    advertised = [a for a in chosen if usable(a, loopback=bool(wanted)) and (listens_on_all or a == bind_host)]
    # Multicast itself goes over IPv4, whose interfaces are named by their addresses.
    interfaces = [a for a in chosen if ipaddress.ip_address(a).version == 4]
    return Reach(tuple(dict.fromkeys(interfaces)), tuple(dict.fromkeys(advertised))[:MAX_ADDRESSES])


class Discovery:
    """``hints`` fill while it runs; ``start`` and ``stop`` once each."""

    def __init__(self, own: Announcement, interfaces: tuple[str, ...], hints: Hints) -> None:
        self._own, self._interfaces, self.hints = own, interfaces, hints
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = threading.Event()
        self._end: asyncio.Event | None = None
        self._waiting: dict[str, bool] = {}  # service → whether it is there, in the order in which it was heard
        self._news = asyncio.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Say goodbye on the network and end; blocks for at most ``seconds``."""
        self._ending.set()
        loop, end = self._loop, self._end
        if loop is not None and end is not None and not loop.is_closed():
            loop.call_soon_threadsafe(end.set)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            asyncio.run(self._discover())
        except OSError as error:
            _log.warning(
                "no mDNS here: only the configured addresses are dialled",
                interfaces=list(self._interfaces),
                reason=str(error),
            )
        except Exception:  # noqa: BLE001  # logged with its traceback
            # The root of the thread: discovery is a hint, and the cluster goes on without it.
            _log.exception("discovery ended")

    async def _discover(self) -> None:
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        if self._ending.is_set():
            return
        if not self._interfaces:
            _log.warning("no mDNS here: this machine has no interface but loopback, and nodes.*.interfaces names none")
            return
        mdns = AsyncZeroconf(interfaces=list(self._interfaces), ip_version=IPVersion.V4Only)
        try:
            await self._advertise(mdns)
            browser = AsyncServiceBrowser(mdns.zeroconf, SERVICE_TYPE, handlers=[self._on_change])
            looking = asyncio.create_task(self._look_up_all(mdns.zeroconf))
            ending = asyncio.create_task(self._end.wait())
            await asyncio.wait({looking, ending}, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
            looking.cancel()
            await browser.async_cancel()
        finally:
            await mdns.async_unregister_all_services()
            await mdns.async_close()

    async def _advertise(self, mdns: Any) -> None:
        from zeroconf import ServiceInfo

        if not self._own.addresses:
            _log.info("nothing is advertised: this node listens on no address of these interfaces")
            return
        # A name of its own for every boot, so that what a former one said cannot be in its way.
        label = re.sub(r"[^A-Za-z0-9-]", "-", self._own.name)[:MAX_LABEL]
        name = f"{label}-{self._own.node_id}-{secrets.token_hex(4)}"
        info = ServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=self._own.port,
            properties=self._own.properties(),
            server=f"{name}.local.",
            parsed_addresses=list(self._own.addresses),
        )
        await mdns.async_register_service(info)
        _log.info("advertised by mDNS", service=name, addresses=list(self._own.addresses), port=self._own.port)

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        from zeroconf import ServiceStateChange

        if name not in self._waiting and len(self._waiting) >= MAX_QUEUED:
            return
        self._waiting[name] = state_change is not ServiceStateChange.Removed
        self._news.set()

    async def _look_up_all(self, zeroconf: Zeroconf) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                name = next(iter(self._waiting))
                if self._waiting.pop(name):
                    await self._look_up(zeroconf, name)
                else:
                    self.hints.gone(name)

    async def _look_up(self, zeroconf: Zeroconf, name: str) -> None:
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(SERVICE_TYPE, name)
        if not await info.async_request(zeroconf, ANSWER_SECONDS * 1000):
            return
        said = read(info.properties, info.port, info.parsed_addresses(IPVersion.All))
        if said is None:
            self.hints.gone(name)
            return
        before = self.hints.of(said.node_id)
        reason, found = self.hints.heard(name, said), self.hints.of(said.node_id)
        if reason:
            _log.debug("an mDNS service is ignored", service=repr(name[:MAX_LABEL]), reason=reason)
        elif found != before:
            _log.info("mDNS tells of a node", node=said.name, version=said.version, further_addresses=list(found))
