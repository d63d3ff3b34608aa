"""What a storm and the failure table are told as: every call in the second of its end, every trouble in words."""

from deploy.chaos.faults import CELLS, Fault, Kind, Target
from deploy.chaos.history import NO_ANSWER, Call
from deploy.chaos.play import Occurred, Played, Seen, Storm
from deploy.chaos.report import draw, summary
from deploy.chaos.table import entry, rows


def read(begun: float, ended: float, status: int) -> Call:
    return Call("read", "ada", "profile", begun, ended, status)


def test_a_call_counts_in_the_second_of_its_end_and_a_conflict_is_no_failure() -> None:
    storm = Storm([Occurred(Fault(Target.REDIS, Kind.CUT), 100.5, 102.0)], 100.0, 103.0, 4.2, ["something"])
    calls = [read(100.1, 100.2, 200), read(100.9, 101.1, 412), read(101.0, 101.6, 503), read(101, 103.5, NO_ANSWER)]
    told = summary(storm, calls, seed=7)
    assert told["failed"] == {"503": 1, "0": 1}
    assert [(second["answered"], second["failed"]) for second in told["by_second"]] == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert told["faults"] == [{"target": "Redis", "kind": "cut", "begun": 0.5, "ended": 2.0}]
    drawn = draw(told)
    assert "1 promises broken" in drawn
    assert drawn.count("Redis") == 1


def test_the_table_says_what_clients_saw_in_words() -> None:
    reads = Seen.of([read(0, 0.5, 200), read(0, 1.25, NO_ANSWER)])
    played = Played(Fault(Target.INSTANCE, Kind.CUT), 0.0, 3.0, reads, Seen.of([]), served=0.0, settled=4.44)
    line = rows([entry(played)]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[:2] == ["an instance", "cut"]
    assert cells[2:4] == ["1 times no answer of 2; slowest 1.2 s", "0, all answered; slowest 0.0 s"]
    assert cells[4:] == ["at once", "4.4 s"]


def test_every_target_breaks_in_every_way_that_it_can() -> None:
    assert len(CELLS) == len(set(CELLS)) == len(Target) * len(Kind) - 4
