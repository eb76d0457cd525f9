"""Agreement between processes: they start alike, wait with bounds, and end together.

Messages go through jax's coordination service, not the devices. It works before the
first program, beside a running one, and when a peer is stuck.
"""

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from sd3_jax.distributed.jax_internals import coordination_client
from sd3_jax.errors import RetryableError, UserError

ENDED = "sd3_jax/ended"
ANNOUNCED = "sd3_jax/announced"
LOOK = 2.0  # seconds between two looks for a SIGTERM that a peer got
# Numbers the exchanges, for their keys: every process makes the same calls in the same
# order, and a key can be set only once.
_turn = itertools.count()
_sigterm = threading.Event()  # it came to this process, where Python handles it


def first(function: Callable[[], Any], *, seconds: float = 600) -> Any:
    """function() of process 0; its answer (JSON), or UserError, is everyone's.

    One process looks at the storage: several could see different things there.
    """
    if jax.process_count() == 1:
        return function()
    client, key = coordination_client(), f"sd3_jax/first/{next(_turn)}"
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except UserError as error:
            # Sent before it is raised: the peers wait for an answer, and get this one.
            client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        client.key_value_set(key, json.dumps(answer))
        return answer["value"]
    answer = json.loads(_get(key, seconds, "process 0's answer"))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def agree(subject: str, statement: Mapping[str, Any], *, seconds: float = 600) -> None:
    """UserError in every process if one states something else than process 0.

    `statement` is flat JSON. Two hosts that run different programs compute nonsense,
    silently as long as their collectives match.
    """
    # As sorted JSON: tuples and lists, or orders of keys, are no difference.
    mine = json.dumps(statement, sort_keys=True, default=str)
    ours, *others = map(json.loads, _everyones(mine, seconds))
    for index, other in enumerate(others, 1):
        if differences := list(differing(ours, other)):
            raise UserError(
                f"processes 0 and {index} have different {subject}: "
                + "; ".join(differences[:5])
                + (f"; and {len(differences) - 5} more" if differences[5:] else "")
            )


def differing(a: Mapping[str, Any], b: Mapping[str, Any]):
    """`key: x and y`, for each key that is not in both with the same value."""
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key, "nothing"), b.get(key, "nothing")
        if x != y:
            yield f"{key}: {x} and {y}"


def shared(
    function: Callable[[list[int]], list], count: int, *, seconds: float = 3_600
) -> list:
    """One answer (JSON) for each of `count` rows, from every process for its share.

    function(rows) gets the rows of this process; it is not called without any.
    """
    index, step = jax.process_index(), jax.process_count()
    rows = list(range(index, count, step))
    mine = json.dumps(function(rows) if rows else [])
    answers = [None] * count
    for i, text in enumerate(_everyones(mine, seconds)):
        answers[i::step] = json.loads(text)
    return answers


def all_well(well: bool, *, seconds: float = 600) -> bool:
    """Whether `well` is true in every process."""
    return "no" not in _everyones("yes" if well else "no", seconds)


def meet(place: str, *, minutes: float = 30) -> None:
    """Wait until every process is here.

    Hosts do not compile equally fast, and the first collective of the one that is ahead
    gives up after half a minute on CPUs.
    """
    if jax.process_count() > 1:  # jax's public barriers are collectives themselves
        client = coordination_client()
        client.wait_at_barrier(place, timeout_in_ms=int(60_000 * minutes))


def told_to_stop(step: int) -> bool:
    """Whether SIGTERM came to some process and all are to stop after this very step.

    Ask at every step: jax answers for one step only. It is the same step in every
    process, a few steps after the signal.
    """
    if coordination_client() is None:
        return _sigterm.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def ask_to_stop() -> None:
    """Stop the run as a SIGTERM to this process would: all agree on a later step.

    A run of one process stops after the step that it is in.
    """
    if coordination_client() is None:
        _sigterm.set()
    else:
        # jax's handler has no other door: it notes the signal, and tells the others.
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Note SIGTERM in a run of one process.

    In a run of several, jax's handler in C++ tells the others. A handler of Python
    would replace it, and the step at which all stop would never come.
    """
    _sigterm.clear()
    alone = coordination_client() is None
    with _noting_sigterm() if alone else contextlib.nullcontext():
        yield


def claim(name: str) -> bool:
    """Whether this process is the first of all to ask for it."""
    client = coordination_client()
    if client is None:
        return True
    try:
        client.key_value_set(f"sd3_jax/claim/{name}", str(jax.process_index()))
    except jax.errors.JaxRuntimeError as error:
        # Setting a key is atomic in the service: one process alone succeeds.
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """`stop()` says whether SIGTERM came to any process, for jobs without common steps.

    Python's handler takes the place of jax's, which waits for a step of all to save.
    """
    _sigterm.clear()
    client = coordination_client()
    # The time is in a list so that stop() can set it.
    key, looked = "sd3_jax/stop", [time.monotonic()]

    def stop() -> bool:
        if client is None or _sigterm.is_set():
            if client is not None:
                client.key_value_set(f"{key}/told", "now", allow_overwrite=True)
            return _sigterm.is_set()
        # Rarely: stop() is called often, and each look is a request to the service.
        if time.monotonic() - looked[0] > LOOK:
            looked[0] = time.monotonic()
            if client.key_value_dir_get(key):
                _sigterm.set()
        return _sigterm.is_set()

    with _noting_sigterm():
        yield stop


@contextlib.contextmanager
def _noting_sigterm() -> Iterator[None]:
    """Note SIGTERM inside the block; in another thread than the main one do nothing.

    Python lets only the main thread set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _sigterm.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def announce(turn: int, number: int) -> None:
    """Tell all processes a number in this turn; process 0 counts the turns from 0."""
    client = coordination_client()
    client.key_value_set(f"{ANNOUNCED}/{turn}", str(number))
    # A server announces for months. Who takes part in this turn has read the last one.
    if turn > 1:
        client.key_value_delete(f"{ANNOUNCED}/{turn - 2}")


def announced(turn: int, seconds: float) -> int | None:
    """The number of a turn; None if it has not been announced within so long."""
    client = coordination_client()
    try:
        number = client.blocking_key_value_get(
            f"{ANNOUNCED}/{turn}", int(1000 * seconds)
        )
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
    return int(number)


def tell_end(reason: str, code: int) -> None:
    """Tell the other processes that this one ends, and why; they end as well."""
    client = coordination_client()
    if client is not None:
        note = json.dumps([jax.process_index(), reason, code])
        try:
            client.key_value_set(f"{ENDED}/{jax.process_index()}", note)
        except Exception:  # the service is gone: its process has ended before
            pass


def ended() -> tuple[int, str, int] | None:
    """(process, reason, exit code) of another process that reported its end."""
    client = coordination_client()
    if client is None:
        return None
    try:
        notes = [json.loads(text) for _, text in client.key_value_dir_get(ENDED)]
    except Exception:  # jax itself ends this process if the service is gone
        return None
    # The first by process is enough: its reason is printed, and its code is taken.
    others = [note for note in notes if note[0] != jax.process_index()]
    return tuple(others[0]) if others else None


def leads_others() -> bool:
    """Whether this is process 0 of several: it runs the coordination service."""
    return coordination_client() is not None and jax.process_index() == 0


def _everyones(text: str, seconds: float) -> list[str]:
    """Each process's text, by its index."""
    count, turn = jax.process_count(), f"sd3_jax/all/{next(_turn)}"
    if count == 1:
        return [text]
    client = coordination_client()
    client.key_value_set(f"{turn}/{jax.process_index()}", text)
    return [_get(f"{turn}/{i}", seconds, f"process {i}") for i in range(count)]


def _get(key: str, seconds: float, who: str) -> str:
    client = coordination_client()
    try:
        return client.blocking_key_value_get(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise RetryableError(
            f"{who} did not answer within {seconds:g} s ({key})"
        ) from error
