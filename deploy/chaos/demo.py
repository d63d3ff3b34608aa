"""The demonstration: a cluster with live clients, one thing broken after the other, and which promises were kept.

In a terminal one screen shows what clients see, what the processes say, and the promises; elsewhere there are plain
lines. What is judged is what the failure table judges, so that a demonstration cannot look better than the tests.
"""

import asyncio
import json
import random
import signal
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, strftime
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.chaos.faults import Fault, Kind, Target
from deploy.chaos.history import Call
from deploy.chaos.load import Load
from deploy.chaos.play import Play, Played, failed, opened
from deploy.chaos.stage import Stage, open_stage
from deploy.local import ClusterError
from deploy.local.terminal import Display, console


@dataclass(frozen=True, slots=True)
class Act:
    """What breaks, and what is promised for it."""

    fault: Fault
    promise: str


ACTS = (
    Act(Fault(Target.REPLICA, Kind.KILLED), "reads go on, from the other replica"),
    Act(Fault(Target.REPLICAS, Kind.STOPPED), "reads go to the primary, and wait for no server that hangs"),
    Act(Fault(Target.PRIMARY, Kind.KILLED), "reads go on; writes are refused with 503; no acknowledged one is lost"),
    Act(Fault(Target.REDIS, Kind.KILLED), "nothing fails; nobody is signed out; no order is lost with the broker"),
    Act(Fault(Target.WORKER, Kind.KILLED), "orders are accepted, and finished once it is back"),
    Act(Fault(Target.PAYMENTS, Kind.SILENT), "orders are accepted, wait for their payment, and are charged once"),
    Act(Fault(Target.SMTP, Kind.STOPPED), "orders are confirmed; their mails follow"),
    Act(Fault(Target.INSTANCE, Kind.KILLED), "the balancer asks the other; an order sent again with its key is one"),
)
SECONDS = 4.0  # of each fault
FRAME = 0.25  # seconds between two looks; faster is only flicker
KEPT_LINES = 8  # of what the processes say
HISTORY = 60  # seconds of the pictures of requests
_BARS = " ▁▂▃▄▅▆▇█"
# Who says something that a spectator understands, and what of it.
SPEAKERS = ("api-1", "api-2", "relay-1", "worker-1")
TOLD = {
    "replica leaves",
    "replica joins",
    "primary is not seen",
    "primary is seen",
    "primary changes",
    "breaker opens",
    "breaker closes",
    "relay waits",
    "relay goes on",
    "task waits for a dependency",
}


def run() -> int:
    """Show it; returns 0 if every promise was kept, 1 if not, and 130 when told to end, with nothing left running."""
    try:
        return asyncio.run(_show())
    except ClusterError as error:
        console.print(str(error))
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("\nStopped; nothing is left running.")
        return 128 + signal.SIGINT


async def _show() -> int:
    show = asyncio.current_task()
    if show is None:
        raise RuntimeError("a demonstration is shown in a task")
    for number in (signal.SIGTERM, signal.SIGHUP):  # asyncio itself does the same for Ctrl-C
        asyncio.get_running_loop().add_signal_handler(number, show.cancel)
    chance, begun = random.Random(1), monotonic()
    # Everything is undone whatever happens, also if nobody reads any more what is printed here.
    async with AsyncExitStack() as opened_here:
        folder = opened_here.enter_context(tempfile.TemporaryDirectory(prefix="scaleout-demo-"))
        console.print("Starting a cluster of its own, on free ports and in a temporary folder:")
        with Display() as display:
            cluster = open_stage(Path(folder) / "cluster", chance=chance, bucket=False, progress=display)
            stage = await opened_here.enter_async_context(cluster)
        opened_here.callback(console.print, "Stopping the cluster …")
        play = await opened_here.enter_async_context(opened(stage, Load(stage.cluster.url, chance)))
        with Screen(play, Voices(stage)) as screen:
            for act in ACTS:
                await screen.watch(act)
    console.print(screen.promises())
    broken = [problem for _, played in screen.played for problem in played.problems]
    for problem in broken:
        console.print(f"  {problem}", style="red")
    took = f"It took {monotonic() - begun:.0f} s, the cluster's start and end included."
    console.print(f"{'A promise was broken.' if broken else 'Every promise was kept.'} {took}", style="bold")
    return 1 if broken else 0


class Voices:
    """What the processes say in their logs that a spectator understands, each thing once.

    Args:
        stage: whose processes.
    """

    def __init__(self, stage: Stage) -> None:
        self._logs = {name: Path(stage.cluster.process(name).log) for name in SPEAKERS}
        self._read = {name: log.stat().st_size for name, log in self._logs.items()}

    def hear(self) -> Iterator[str]:
        """Yield what was said since the last time; a log that was begun anew is read from there."""
        for name, log in self._logs.items():
            with log.open("rb") as file:
                if self._read[name] > log.stat().st_size:
                    self._read[name] = 0
                file.seek(self._read[name])
                new = file.read()
            whole, _, _ = new.rpartition(b"\n")
            self._read[name] += len(whole)
            yield from dict.fromkeys(said for line in whole.splitlines() if (said := _told(name, line)))


class Screen:
    """What a spectator sees: moving in a terminal, lines elsewhere.

    Args:
        play: what is played.
        voices: what the processes say.
    """

    def __init__(self, play: Play, voices: Voices) -> None:
        self.played: list[tuple[Act, Played]] = []
        self._play = play
        self._voices = voices
        self._said: deque[str] = deque(maxlen=KEPT_LINES)
        self._act = ACTS[0]
        self._begun = monotonic()
        self._live = Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop")

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            # The promises are shown once more below, where they stay.
            self._live.update(Text(), refresh=True)
            self._live.stop()

    async def watch(self, act: Act) -> None:
        """Play an act and show it until it is over."""
        self._act = act
        if not console.is_terminal:
            console.print(f"{_clock()} {_first_upper(act.fault)}: {act.promise}", style="bold")
        playing = asyncio.create_task(self._play.fault(act.fault, SECONDS))
        try:
            phase = ""
            while not playing.done():
                for said in self._voices.hear():
                    self._hear(said)
                if self._play.phase != phase:
                    phase = self._play.phase
                    self._hear(f"— {phase}")
                if console.is_terminal:
                    self._live.update(self._frame(), refresh=True)
                await asyncio.wait({playing}, timeout=FRAME)
            self.played.append((act, playing.result()))
        finally:
            playing.cancel()
        if not console.is_terminal:
            console.print(f"{_clock()}   {_outcome(self.played[-1][1])}")

    def promises(self) -> Table:
        """Return the table of what was promised and what came of it."""
        table = Table(box=None, pad_edge=False)
        for heading in ("", "broken for 4 s", "promised", "clients saw", "served after", "all done after"):
            table.add_column(heading, overflow="fold")
        for act, played in self.played:
            table.add_row(
                "[red]broken[/]" if played.problems else "[green]kept[/]",
                str(act.fault),
                act.promise,
                _sight(played),
                f"{played.served:.1f} s" if played.served else "at once",
                f"{played.settled:.1f} s",
            )
        return table

    def _hear(self, said: str) -> None:
        self._said.append(f"{_clock()} {said}")
        if not console.is_terminal:
            console.print(f"{_clock()}   {said}")

    def _frame(self) -> Group:
        now = monotonic()
        title = Text.assemble(
            (f"Act {len(self.played) + 1} of {len(ACTS)}: {self._act.fault}. ", "bold yellow"),
            (f"{_first_upper(self._act.promise)}.", "bold"),
            (f"   {self._play.phase}, {now - self._begun:.0f} s", "dim"),
        )
        calls = [call for call in self._play.load.calls if call.ended > now - HISTORY]
        clients = Table.grid(padding=(0, 2))
        for name, kinds in (("reads", {"read", "browse", "look"}), ("changes", {"write"}), ("orders", {"order"})):
            clients.add_row(*_row(name, [call for call in calls if call.what in kinds], now))
        said = Text("\n".join(self._said) or "nothing", style="dim")
        return Group(
            title,
            Text(f"\nWhat clients see, the last {HISTORY} s", style="underline"),
            clients,
            Text("\nWhat the processes say", style="underline"),
            said,
            Text("\nPromises", style="underline"),
            self.promises(),
        )


def _row(name: str, calls: list[Call], now: float) -> tuple[Text, Text, Text]:
    """Return a kind of requests: its name, a bar for each second, red where one failed, and the last second."""
    seconds: list[list[Call]] = [[] for _ in range(HISTORY)]
    for call in calls:
        seconds[max(0, HISTORY - 1 - int(now - call.ended))].append(call)
    most = max(map(len, seconds)) or 1
    bars = Text()
    for second in seconds:
        style = "red" if any(failed(call) for call in second) else "green"
        bars.append(_BARS[-(-len(second) * (len(_BARS) - 1) // most)], style=style)
    last = seconds[-2]
    bad = sum(1 for call in last if failed(call))
    slowest = max(((call.ended - call.begun) * 1000 for call in last), default=0)
    told = Text(f"{len(last) - bad}/s answered, slowest {slowest:.0f} ms")
    if bad:
        told.append(f", {bad} failed", style="red")
    return Text(name), bars, told


def _told(name: str, line: bytes) -> str | None:
    """Return what a line of a log says, if a spectator understands it."""
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError:  # not ours: the last words of a process that died
        return None
    if said.get("event") not in TOLD:
        return None
    about = [str(said[key]) for key in ("node", "dependency", "task") if key in said]
    reason = f" ({said['reason']})" if said.get("reason") else ""
    return f"{name}: {' '.join([said['event'], *about])}{reason}"[:100]


def _sight(played: Played) -> str:
    reads, writes = (sum(seen.troubles.values()) for seen in (played.reads, played.writes))
    if not reads and not writes:
        return f"{played.reads.calls + played.writes.calls} requests, all answered"
    told = [
        f"{bad} of {of.calls} {what}"
        for bad, of, what in ((reads, played.reads, "reads"), (writes, played.writes, "writes"))
        if bad
    ]
    return f"refused: {', '.join(told)}"


def _outcome(played: Played) -> str:
    kept = "Broken" if played.problems else "Kept"
    after = f"served again after {played.served:.1f} s, all work done after {played.settled:.1f} s"
    return f"{kept}. {_sight(played)}; {after}."


def _first_upper(said: object) -> str:
    text = str(said)
    return text[:1].upper() + text[1:]


def _clock() -> str:
    return strftime("%H:%M:%S")
