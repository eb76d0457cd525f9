"""A lower bound of a compiled program's time, in the order of XLA's schedule.

A core runs one operation after another; each takes the longer of its FLOPs at the
matrix unit's peak and its bytes at HBM's rate. Asynchronous collectives and copies
overlap with the operations between their start and end; the rest is waited for. Vector
units, latencies and contention are left out, so the sum is a bound and no forecast.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sd3_jax.tools.plan import operation_costs
from sd3_jax.tools.plan.hlo import Computation, Instruction, Module
from sd3_jax.tools.plan.link_traffic import Collective, Links, channel, collective
from sd3_jax.tools.plan.loop_trips import trips
from sd3_jax.tools.plan.operation_costs import Cost
from sd3_jax.tools.plan.slices import Generation


@dataclass
class Account:
    """Totals of one run of the program on one device."""

    seconds: float = 0.0  # the serial floor
    by_kind: Counter = field(default_factory=Counter)  # of seconds
    flops: float = 0.0  # of matrix products, as run
    read: float = 0.0  # bytes of HBM
    written: float = 0.0
    wire: Counter = field(default_factory=Counter)  # bytes sent, by (axes, kind)
    outside: float = 0.0  # bytes sent to other slices
    host: float = 0.0  # bytes to and from the host's memory
    beside: float = 0.0  # bytes sent while a product ran
    hidden: float = 0.0  # bytes sent that nothing waited for
    links: Counter = field(default_factory=Counter)  # seconds that links are busy
    sources: Counter = field(default_factory=Counter)  # bytes sent, by source

    @property
    def hbm(self) -> float:
        return self.read + self.written

    @property
    def sent(self) -> float:
        """Bytes between the chips of a slice."""
        return sum(self.wire.values())


class Event(NamedTuple):
    """An instruction's effect on the clock."""

    action: str  # run, start, end, loop, call
    name: str = ""  # of what starts or ends; of what is called
    cost: Cost = Cost()
    transfer: Collective | None = None
    seconds: float = 0.0
    times: int = 1
    background: float = 0.0  # seconds of HBM, of an asynchronous copy


# What the clock waits for, by the network or memory that is late.
WAITS = {"ici": "ICI", "dcn": "DCN", "hbm": "prefetch", "host": "host"}


class Schedule:
    """A program's operations as events, and the account of a run.

    Of a conditional it runs `usual_branch`. Loops whose trip count cannot be read off
    the program run `turns` times. Without `turns` they count one turn, as kernels of
    unknown FLOPs count none: see `unknown`.
    """

    def __init__(
        self,
        module: Module,
        chip: Generation,
        mesh: Mapping[str, int],
        links: Links,
        turns: int | None = None,
    ):
        self.module, self.chip, self.mesh, self.links = module, chip, mesh, links
        self.turns = turns
        self.unknown: set[str] = set()  # what could not be counted
        self._events: dict[str, list[Event]] = {}

    def run(self) -> Account:
        account = Account()
        self._clock = 0.0
        self._free = defaultdict(float)  # when a network is free again
        self._ends: dict[str, tuple[float, str, Event]] = {}
        self._begun: dict[str, float] = {}  # product seconds until a transfer began
        self._products = 0.0
        self._asked, self._moved = 0.0, 0.0  # seconds of HBM in the background
        self._play(self.module.entry, account)
        account.seconds = self._clock
        return account

    # From instructions to events

    def events(self, name: str) -> list[Event]:
        if name not in self._events:
            home = self.module[name]
            self._events[name] = [e for x in home for e in self._of(x, home)]
        return self._events[name]

    def _of(self, x: Instruction, home: Computation) -> Iterator[Event]:
        if x.opcode == "while":
            body = x.attribute(r"body=%?([\w.\-]+)")
            turns = trips(x, home, self.module)
            turns = self.turns if turns is None else turns
            if turns is None:
                self.unknown.add(f"turns of {x.name}")
            yield Event("call", body, times=1 if turns is None else turns)
        elif x.opcode == "call":
            yield Event("call", x.called[0])
        elif x.opcode == "conditional":
            lengths = {name: self.module.size(name) for name in x.branches}
            yield Event("call", usual_branch(x, lengths))
        elif operation_costs.is_done(x):
            yield Event("end", _first(x, home))
        else:
            yield from self._operation(x, home)

    def _operation(self, x: Instruction, home: Computation) -> Iterator[Event]:
        cost = operation_costs.cost(x, home, self.module, self.chip.matrix)
        transfers = list(self._transfers(x, home))
        # Transfers with a channel run through several fusions and end in the fusion
        # that has AsyncCollectiveDone; those without end at their own -done.
        fused = [t for t in transfers if t[0]]
        whole = [transfer for number, transfer in transfers if not number]
        for number, transfer in fused:
            seconds = self.links.seconds(transfer)
            yield Event(
                "start", f"channel {number}", transfer=transfer, seconds=seconds
            )
        if operation_costs.is_start(x):
            yield self._start_of(x, cost, whole)
        elif whole:
            # A synchronous collective starts and ends with nothing in between.
            for transfer in whole:
                seconds = self.links.seconds(transfer)
                yield Event("start", x.name, cost, transfer, seconds)
                yield Event("end", x.name)
                cost = Cost()  # counted once, with the first of them
        elif cost.kind:
            if x.opcode == "custom-call" and not cost.flops:
                self.unknown.add(f"FLOPs of {x.name}")
            yield Event("run", x.name, cost)
        for number in self._finished(x):
            yield Event("end", f"channel {number}")

    def _start_of(self, x: Instruction, cost: Cost, whole: list[Collective]) -> Event:
        """The start of an asynchronous collective or copy."""
        if whole:
            seconds = sum(self.links.seconds(transfer) for transfer in whole)
            return Event("start", x.name, cost, whole[0], seconds)
        if cost.host:
            # Host memory is a network of its own: PCIe carries one copy at a time.
            transfer = Collective("host", (), cost.host, (), "", x.source)
            seconds = cost.host / self.chip.host_rate
            return Event("start", x.name, cost, transfer, seconds)
        # A copy within HBM takes its bandwidth in the background of products.
        background = cost.bytes / self.chip.hbm_rate
        return Event("start", x.name, cost, background=background)

    def _transfers(self, x, home) -> Iterator[tuple[str, Collective]]:
        """Collectives that `x` is or that it calls, each with its channel if it runs
        through several operations."""
        candidates = [(x, home)]
        if x.opcode in ("fusion", "async-start", "custom-call"):
            candidates += [(y, body) for body in self.module.reached(x) for y in body]
        for y, body in candidates:
            transfer = collective(y, body, self.mesh)
            if transfer is not None:
                yield channel(y), transfer

    def _finished(self, x: Instruction) -> Iterator[str]:
        """Channels that end in a fusion."""
        if x.opcode == "fusion":
            for body in self.module.reached(x):
                if "AsyncCollectiveDone" in body.root.attributes:
                    yield from {channel(y) for y in body if channel(y)}

    # The clock

    def _play(self, name: str, account: Account) -> None:
        for event in self.events(name):
            if event.action == "call":
                for _ in range(event.times):
                    self._play(event.name, account)
            elif event.action == "run":
                self._count(event.cost, account)
                self._run(event.cost, account)
            elif event.action == "start":
                if event.name in self._ends and event.name.startswith("channel"):
                    continue  # it is under way
                self._count(event.cost, account)
                self._start(event, account)
            elif event.name in self._ends:
                self._end(event.name, account)

    def _count(self, cost: Cost, account: Account) -> None:
        account.flops += cost.flops
        account.read += cost.read
        account.written += cost.written

    def _run(self, cost: Cost, account: Account) -> None:
        compute = cost.compute_seconds(self.chip)
        memory = cost.bytes / self.chip.hbm_rate
        seconds = max(compute, memory)
        self._clock += seconds
        if cost.flops:
            self._products += seconds
        # While a product is bound by the matrix unit, HBM has time for prefetches.
        self._moved = min(self._asked, self._moved + max(0.0, compute - memory))
        if compute >= memory:
            account.by_kind[cost.kind] += seconds
        else:
            account.by_kind[cost.kind] += compute
            slow = "HBM of matmuls" if cost.flops else cost.kind
            account.by_kind[slow] += memory - compute

    def _start(self, event: Event, account: Account) -> None:
        transfer = event.transfer
        if transfer is None:
            self._asked += event.background
            self._ends[event.name] = (self._asked, "hbm", event)
            return
        network = "dcn" if transfer.outside else "ici"
        if transfer.kind == "host":
            network = "host"
            account.host += transfer.wire
        elif transfer.outside:
            account.outside += transfer.wire
        else:
            axes = " x ".join(transfer.axes) or "none"
            account.wire[axes, transfer.kind] += transfer.wire
        if network != "host":
            account.sources[transfer.source] += transfer.wire
        account.links[network] += event.seconds
        # A network carries one transfer after another.
        self._free[network] = max(self._clock, self._free[network]) + event.seconds
        self._ends[event.name] = (self._free[network], network, event)
        self._begun[event.name] = self._products

    def _end(self, name: str, account: Account) -> None:
        when, network, event = self._ends.pop(name)
        if network == "hbm":
            wait = max(0.0, when - self._moved)
            self._moved = max(self._moved, when)
        else:
            wait = max(0.0, when - self._clock)
            self._moved = min(self._asked, self._moved + wait)
            products = self._products - self._begun.pop(name)
            # Product seconds between start and end, over the transfer's own time.
            share = min(1.0, products / event.seconds) if event.seconds else 1.0
            if network == "host":
                share = 0.0
            account.beside += share * event.transfer.wire
            if event.seconds and network != "host":
                account.hidden += max(0.0, 1 - wait / event.seconds) * (
                    event.transfer.wire
                )
        self._clock += wait
        account.by_kind[WAITS[network]] += wait


def usual_branch(x: Instruction, lengths: dict[str, int]) -> str:
    """The branch that most steps take, by the number of instructions of each: the
    shorter one for the EMA, which is updated only now and then, else the longer one:
    the shorter skips a non-finite step."""
    choose = min if "/ema/" in x.source else max
    return choose(lengths, key=lengths.get)


def _first(x: Instruction, home: Computation) -> str:
    """The name of the start that an end belongs to."""
    name = x.operands[0]
    while name in home.by_name and not operation_costs.is_start(home.by_name[name]):
        if not home.by_name[name].operands:
            return name
        name = home.by_name[name].operands[0]
    return name
