"""What follows from where the ranks are: a table for people, and whether a sum can still come about."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.errors import MismatchError

from . import _verdict
from ._whereabouts import Whereabouts, fate

_LINES = 32  # of a table


def describe(told: list[Whereabouts], silent: list[bool], ranks: Sequence[int]) -> list[str]:
    """Return a line for each of the `ranks`, those that wait in the same sum together.

    Args:
        told: what each rank of the world wrote.
        silent: whether it has stopped to.
        ranks: which to describe.
    """
    waiting: dict[str, list[int]] = {}
    lines = []
    for rank in ranks:
        where = told[rank]
        if state := _state(where, silent[rank]):
            lines.append(f"rank {_name(rank, where)} {state}")
        else:
            what = "waiting in" if where["open"] else "gave up waiting in"
            waiting.setdefault(f"{what} {_verdict.line(where['row'])} ({where['line']})", []).append(rank)
    lines += [f"{_verdict.named(together)}: {line}" for line, together in waiting.items()]
    return lines[:_LINES] + [f"... ({len(lines)} lines in all)"] * (len(lines) > _LINES)


def _name(rank: int, where: Whereabouts) -> str:
    return f"{rank} ({where['host']}, pid {where['pid']})" if where else str(rank)


def _state(where: Whereabouts, silent: bool) -> str:
    """Say what a rank does; "" if it waits."""
    if not where:
        return "has not started its watchdog: it did not call syncbn.init"
    if where["row"] and not where["open"]:
        return ""  # it has waited
    if "ended" in where:
        return str(where["ended"])
    known = fate(where)
    if known == "gone":
        return f"is gone: killed, or ended by os._exit; last seen {_doing(where)}"
    if known == "stopped":
        return f"is stopped (SIGSTOP, a debugger); last seen {_doing(where)}"
    if silent and known == "alive":
        return f"runs, but its Python does not: native code holds the interpreter's lock; last seen {_doing(where)}"
    if silent:
        return f"does not answer: gone, stopped, or cut off; last seen {_doing(where)}"
    return "" if where["row"] else f"is {_doing(where)}"


def is_lost(where: Whereabouts) -> bool:
    """Tell whether a rank, that had not given up, has ended, or is stopped."""
    return bool(not where["row"] or where["open"]) and ("ended" in where or fate(where) in ("gone", "stopped"))


def _doing(where: Whereabouts) -> str:
    if where["row"]:
        return f"in {_verdict.line(where['row'])}"
    return f"in other code: {where['line']}; its last sum: {where['last'] or 'none'}"


def judge(told: list[Whereabouts], before: list[Whereabouts]) -> Exception | None:
    """Return why the sum that these ranks were to make cannot come about, if that is so.

    Args:
        told: what each of them wrote.
        before: what it had written at the look before.
    """
    for rank, where in enumerate(told):
        if where and ("ended" in where or fate(where) == "gone"):
            return RuntimeError(f"rank {_name(rank, where)} will not call any more")
    rows = [where.get("row") or [] for where in told]
    same = all(
        now.get("row") == then.get("row") and now.get("members") == then.get("members") == told[0].get("members")
        for now, then in zip(told, before, strict=True)
    )
    alive = all(now.get("beat") != then.get("beat") for now, then in zip(told, before, strict=True))
    compared = slice(-1, None) if _verdict.setting() is False else slice(None)  # the vectors alone
    if same and alive and all(rows) and any(row[compared] != rows[0][compared] for row in rows):
        return MismatchError(_verdict.table(rows))
    return None
