"""The control file of the fault interposer: its layout, and everything that is done with it from outside.

Used by ``faultctl`` and by the tests; standard library only. The structures are those of ``interposer.c``, field by
field. Whoever changes rules or settings holds a flock on the file; the interposer itself takes no lock, so a rule is
written first and then switched on by its bit in ``active``.
"""

from __future__ import annotations

import ctypes
import difflib
import fcntl
import fnmatch
import importlib.util
import mmap
import os
import signal as signals
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

# In the order of the function lists of PKCS#11 2.40, 3.0 and 3.2: a function's place is its number in the file.
_NAMES = """
    Initialize Finalize GetInfo GetFunctionList GetSlotList GetSlotInfo GetTokenInfo GetMechanismList GetMechanismInfo
    InitToken InitPIN SetPIN OpenSession CloseSession CloseAllSessions GetSessionInfo GetOperationState
    SetOperationState Login Logout CreateObject CopyObject DestroyObject GetObjectSize GetAttributeValue
    SetAttributeValue FindObjectsInit FindObjects FindObjectsFinal EncryptInit Encrypt EncryptUpdate EncryptFinal
    DecryptInit Decrypt DecryptUpdate DecryptFinal DigestInit Digest DigestUpdate DigestKey DigestFinal SignInit Sign
    SignUpdate SignFinal SignRecoverInit SignRecover VerifyInit Verify VerifyUpdate VerifyFinal VerifyRecoverInit
    VerifyRecover DigestEncryptUpdate DecryptDigestUpdate SignEncryptUpdate DecryptVerifyUpdate GenerateKey
    GenerateKeyPair WrapKey UnwrapKey DeriveKey SeedRandom GenerateRandom GetFunctionStatus CancelFunction
    WaitForSlotEvent

    GetInterfaceList GetInterface LoginUser SessionCancel MessageEncryptInit EncryptMessage EncryptMessageBegin
    EncryptMessageNext MessageEncryptFinal MessageDecryptInit DecryptMessage DecryptMessageBegin DecryptMessageNext
    MessageDecryptFinal MessageSignInit SignMessage SignMessageBegin SignMessageNext MessageSignFinal
    MessageVerifyInit VerifyMessage VerifyMessageBegin VerifyMessageNext MessageVerifyFinal

    EncapsulateKey DecapsulateKey VerifySignatureInit VerifySignature VerifySignatureUpdate VerifySignatureFinal
    GetSessionValidationFlags AsyncComplete AsyncGetID AsyncJoin WrapKeyAuthenticated UnwrapKeyAuthenticated
    """
FUNCTIONS = tuple(f"C_{name}" for name in _NAMES.split())
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_UNFAULTED = {"C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface"}  # answered by the interposer itself
FAULTED = tuple(name for name in FUNCTIONS if name not in _UNFAULTED)

# Answered from the library's memory, whatever became of the device.
_LIBRARY = {
    *("C_Initialize", "C_Finalize", "C_GetInfo", "C_GetSlotList", "C_GetSlotInfo"),
    *("C_GetFunctionStatus", "C_CancelFunction", "C_WaitForSlotEvent"),
}
CRYPTO = tuple(
    name
    for name in FAULTED
    if not name.endswith("Init")  # kept by the library, sent with the operation
    and any(word in name for word in ("Encrypt", "Decrypt", "Digest", "Sign", "Verify", "Key", "Random"))
)
"""The service model's class "crypto": everything that calculates with keys, digests or random numbers."""
DEVICE = tuple(
    name for name in FAULTED if name not in _LIBRARY and not name.endswith("Init") and name != "C_FindObjectsFinal"
)
"""The class "device": also logins, sessions, objects, attributes and information about the token."""
_NAMES_WITH_OUTPUT = """
    GetOperationState Encrypt EncryptUpdate EncryptFinal Decrypt DecryptUpdate DecryptFinal Digest DigestFinal Sign
    SignFinal SignRecover VerifyRecover DigestEncryptUpdate DecryptDigestUpdate SignEncryptUpdate DecryptVerifyUpdate
    WrapKey GenerateRandom EncryptMessage EncryptMessageNext DecryptMessage DecryptMessageNext SignMessage
    SignMessageNext EncapsulateKey WrapKeyAuthenticated
    """
OUTPUTS = frozenset(f"C_{name}" for name in _NAMES_WITH_OUTPUT.split())
"""Functions with an output buffer, which ``corrupt`` can change."""

_ACTIONS = (
    *("delay", "delay-after", "hang", "hang-after", "late", "error", "error-after"),
    *("crash", "crash-after", "corrupt", "full"),
)  # in the order of enum action, from 1
ACTIONS = (*_ACTIONS, "absent")  # absent: error with CKR_TOKEN_NOT_PRESENT, for all that needs the token

_RULES, _COUNTED, _SERVERS, _RUNNING, _TRACED = 32, 128, 64, 256, 4096
_MAGIC, _VERSION = b"HAGFAULT", 1
_NOT_RETURNED = 0xFFFFFFFF
_QUERY, _INJECTED, _EXECUTED = 1, 2, 4
_MILLION = 1_000_000

_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64


class FaultControlError(Exception):
    """What was asked cannot be done; the text is one sentence that says why."""


class _Rule(ctypes.Structure):
    _fields_ = [
        *[(name, _u32) for name in ("id", "action", "pid", "probability")],
        ("functions", _u64 * 2),
        *[(name, _u64) for name in ("parameter", "skip", "times", "matched", "fired")],
        ("released", _u32),
        ("unused", _u32 * 13),
    ]


class _Counters(ctypes.Structure):
    _fields_ = [(name, _u64) for name in ("calls", "executed", "injected", "failed", "queries")] + [
        ("unused", _u64 * 3)  # type: ignore[list-item, unused-ignore]
    ]


class _Running(ctypes.Structure):
    _fields_ = [
        *[(name, _u64) for name in ("owner", "since", "sequence")],
        *[(name, _u32) for name in ("function", "held_by")],
        ("unused", _u64 * 4),
    ]


class _Traced(ctypes.Structure):
    _fields_ = [
        *[(name, _u64) for name in ("sequence", "outcome", "time")],
        *[(name, _u32) for name in ("pid", "tid", "function", "unused")],
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("magic", ctypes.c_char * 8),
        *[(name, _u32) for name in ("version", "size", "active", "next_id", "concurrency", "unused0")],
        ("trace_next", _u64),
        ("unused1", _u64 * 59),
        ("service_us", _u32 * _COUNTED),
        ("free_at", _u64 * _SERVERS),
        ("unused2", _u64 * 320),
        ("rules", _Rule * _RULES),
        ("counters", _Counters * _COUNTED),
        ("running", _Running * _RUNNING),
        ("trace", _Traced * _TRACED),
    ]


_SIZE = ctypes.sizeof(_Control)


def _return_values() -> dict[str, int]:
    """The names of return values, from the one list of them; without it (a copied folder) numbers still work."""
    path = Path(__file__).resolve().parents[1] / "hagroup" / "core" / "ckr.py"
    specification = importlib.util.spec_from_file_location("_faultcontrol_ckr", path)
    if not path.exists() or specification is None or specification.loader is None:
        return {}
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return {f"CKR_{name}": int(value) for name, value in module.CKR.__members__.items()}


_CKR = {"CKR_OK": 0, "CKR_DEVICE_ERROR": 0x30, "CKR_TOKEN_NOT_PRESENT": 0xE0} | _return_values()
_CKR_NAMES = {value: name for name, value in _CKR.items()}


def return_value(text: str | int) -> int:
    """A return value by its name (``CKR_DEVICE_ERROR``; ``CKR_`` may be left out) or number."""
    if isinstance(text, int):
        number = int(text)
    else:
        name = text if text.startswith("CKR_") else f"CKR_{text}"
        if name in _CKR:
            return _CKR[name]
        try:
            number = int(text, 0)
        except ValueError:
            near = difflib.get_close_matches(name, _CKR, 1)
            hint = f"; did you mean {near[0]}?" if near else "; a number will do, too"
            raise FaultControlError(f"{text} is not the name of a return value{hint}") from None
    if not 0 <= number < 1 << 64:
        raise FaultControlError(f"{text} is not a return value (0 to 2^64-1)")
    return number


def return_value_name(number: int) -> str:
    return _CKR_NAMES.get(number, f"0x{number:08x}")


def select_functions(what: str | Iterable[str]) -> list[str]:
    """Names, patterns (``C_Generate*``), and the classes ``all``, ``crypto``, ``device``; also with commas between."""
    words = what.split(",") if isinstance(what, str) else list(what)
    classes = {"all": FAULTED, "crypto": CRYPTO, "device": DEVICE}
    chosen: set[str] = set()
    for word in words:
        found = classes.get(word) or fnmatch.filter(FAULTED, word)
        if word in _UNFAULTED:
            raise FaultControlError(f"{word} is answered by the interposer itself and cannot be faulted")
        if not found:
            near = difflib.get_close_matches(word, FAULTED, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise FaultControlError(f'"{word}" names no PKCS#11 function{hint}')
        chosen.update(found)
    return [name for name in FAULTED if name in chosen]


def _is_alive(pid: int, tid: int) -> bool:
    """Whether the thread still runs; not a killed process that nobody has waited for."""
    try:
        status = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


@dataclass(frozen=True)
class Rule:
    """A rule as it is now. An exhausted one stays in the list until it is cleared."""

    id: int
    functions: tuple[str, ...]
    action: str
    parameter: int
    skip: int
    times: int
    pid: int
    probability: float
    matched: int
    fired: int
    held: int
    """Calls that it holds now."""


@dataclass(frozen=True)
class FunctionStats:
    """What became of the calls of one function. Calls with a NULL output (what is its length?) are ``queries`` only."""

    calls: int
    executed: int
    injected: int
    failed: int
    queries: int
    in_progress: int


@dataclass(frozen=True)
class CallInProgress:
    function: str
    pid: int
    tid: int
    seconds: float
    held_by: int | None
    """The rule that holds the call, if one does."""
    sequence: int


@dataclass(frozen=True)
class TracedCall:
    sequence: int
    function: str
    pid: int
    tid: int
    rv: int | None
    """None: has not returned (yet)."""
    monotonic: float
    """When it came, by ``time.monotonic()``."""
    query: bool
    injected: bool
    executed: bool


class FaultControl:
    """Faults, service time and statistics of all processes whose interposers use the control file ``path``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)

    # -- the file

    def init(self) -> FaultControl:
        """Makes the file, or resets one that is in use: no rules, no service model, counters and trace empty."""
        if os.path.exists(self.path):
            with self._changing() as control:
                # What makes the file valid stays, and so do rule numbers: a held call must not meet its rule again.
                control.active = control.concurrency = 0
                for field in (control.service_us, control.free_at, control.counters, control.trace):
                    ctypes.memset(ctypes.addressof(field), 0, ctypes.sizeof(field))
                control.trace_next = 0
            return self
        fresh = _Control(magic=_MAGIC, version=_VERSION, size=_SIZE)
        descriptor, made = tempfile.mkstemp(prefix=".faults-", dir=os.path.dirname(self.path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(bytes(fresh))
            os.link(made, self.path)  # whole at once, and never over somebody else's
        finally:
            os.unlink(made)
        return self

    @contextmanager
    def _opened(self, *, change: bool) -> Iterator[_Control]:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = "; make it with init" if isinstance(error, FileNotFoundError) else ""
            raise FaultControlError(f"{self.path} cannot be opened: {error.strerror}{hint}") from None
        try:
            memory = mmap.mmap(descriptor, _SIZE) if os.fstat(descriptor).st_size == _SIZE else None
            control = None if memory is None else _Control.from_buffer(memory)  # keeps it mapped as long as needed
            if control is None or control.magic != _MAGIC or control.version != _VERSION:
                raise FaultControlError(f"{self.path} is not a control file of this version of the interposer")
            if change:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield control
            finally:
                if change:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _changing(self) -> AbstractContextManager[_Control]:
        return self._opened(change=True)

    def _reading(self) -> AbstractContextManager[_Control]:
        return self._opened(change=False)

    # -- rules

    def add(
        self,
        functions: str | Iterable[str],
        action: str,
        *,
        ms: float | None = None,
        rv: str | int | None = None,
        signal: str | int | None = None,
        skip: int = 0,
        times: int = 0,
        pid: int = 0,
        probability: float = 1.0,
    ) -> int:
        """Adds a rule and returns its id. The first ``skip`` matching calls pass; then it fires ``times`` times
        (0: for ever), each time with ``probability``. ``pid``: only in that process."""
        chosen = select_functions(functions)
        if action not in ACTIONS:
            raise FaultControlError(f'"{action}" is not an action; there are: {", ".join(ACTIONS)}')
        if action == "absent":
            if rv is not None:
                raise FaultControlError("absent takes no return value: it is CKR_TOKEN_NOT_PRESENT")
            action, rv = "error", "CKR_TOKEN_NOT_PRESENT"
            chosen = [name for name in chosen if name not in _LIBRARY]
        if action == "corrupt":
            chosen = [name for name in chosen if name in OUTPUTS]
        if action == "full":
            chosen = [name for name in chosen if name == "C_GetTokenInfo"]
        if not chosen:
            raise FaultControlError(f"this action can do nothing with {functions}")
        parameter = self._parameter(action, ms, rv, signal)
        for name, number, limit in (("skip", skip, 1 << 64), ("times", times, 1 << 64), ("pid", pid, 1 << 32)):
            if not 0 <= number < limit:
                raise FaultControlError(f"{name} must not be {number}")
        if not 0 < probability <= 1:
            raise FaultControlError(f"the probability must be above 0 and at most 1, not {probability}")
        with self._changing() as control:
            number = control.next_id + 1
            # a slot not lately used: a call that is about to look at a cleared rule must not find half a new one
            places = [(number + step) % _RULES for step in range(_RULES)]
            place = next((place for place in places if not control.active >> place & 1), None)
            if place is None:
                raise FaultControlError(f"all {_RULES} rules are taken; clear some")
            control.next_id = number
            rule = control.rules[place]
            rule.matched = rule.fired = rule.released = 0
            rule.id, rule.action, rule.pid = number, _ACTIONS.index(action) + 1, pid
            rule.probability = max(1, round(probability * _MILLION))
            rule.parameter, rule.skip, rule.times = parameter, skip, times
            bits = sum(1 << _NUMBERS[name] for name in chosen)
            rule.functions[0], rule.functions[1] = bits & (1 << 64) - 1, bits >> 64
            control.active |= 1 << place
            return int(number)

    @staticmethod
    def _parameter(action: str, ms: float | None, rv: str | int | None, signal: str | int | None) -> int:
        kind = {"delay": "ms", "delay-after": "ms", "hang": "rv", "error": "rv", "error-after": "rv"}.get(
            action, "signal" if action.startswith("crash") else ""
        )
        for name, given in (("ms", ms), ("rv", rv), ("signal", signal)):
            if given is not None and name != kind:
                raise FaultControlError(f"{action} takes no {name}")
        if kind == "ms":
            if ms is None or not 0 <= ms < 1 << 32 or ms != int(ms):
                raise FaultControlError(f"{action} needs a time in whole milliseconds (ms)")
            return int(ms)
        if kind == "rv":
            return return_value("CKR_DEVICE_ERROR" if rv is None else rv)
        if kind == "signal":
            try:
                return int(signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal or 9))
            except (KeyError, ValueError):
                raise FaultControlError(f"{signal} is not a signal (SIGKILL, SIGSEGV, SIGSTOP, ...)") from None
        return 0

    def _in_force(self, control: _Control, rule: int | None) -> list[int]:
        places = [place for place in range(_RULES) if control.active >> place & 1]
        chosen = [place for place in places if rule is None or control.rules[place].id == rule]
        if rule is not None and not chosen:
            raise FaultControlError(f"there is no rule {rule}")
        return chosen

    def clear(self, rule: int | None = None) -> None:
        """Removes a rule, or all. Calls that it holds go on as after ``release``."""
        with self._changing() as control:
            gone = sum(1 << place for place in self._in_force(control, rule))
            control.active &= ~gone

    def release(self, rule: int | None = None) -> None:
        """Lets the calls go on that a rule (or any) holds now; it stays in force for those to come."""
        with self._changing() as control:
            for place in self._in_force(control, rule):
                control.rules[place].released += 1

    def rules(self) -> list[Rule]:
        held = [call.held_by for call in self.in_progress()]
        with self._reading() as control:
            found = [control.rules[place] for place in self._in_force(control, None)]
            return sorted((self._rule(rule, held.count(rule.id)) for rule in found), key=lambda rule: rule.id)

    @staticmethod
    def _rule(rule: _Rule, held: int) -> Rule:
        bits = rule.functions[0] | rule.functions[1] << 64
        return Rule(
            id=rule.id,
            functions=tuple(name for name in FAULTED if bits >> _NUMBERS[name] & 1),
            action=_ACTIONS[rule.action - 1],
            parameter=rule.parameter,
            skip=rule.skip,
            times=rule.times,
            pid=rule.pid,
            probability=rule.probability / _MILLION,
            matched=rule.matched,
            fired=rule.fired,
            held=held,
        )

    # -- what is going on

    def in_progress(self) -> list[CallInProgress]:
        """The calls that threads alive are inside of, oldest first."""
        with self._reading() as control:
            slots = [_Running.from_buffer_copy(slot) for slot in control.running if slot.owner]
        calls = []
        for slot in sorted(slots, key=lambda slot: int(slot.since)):
            pid, tid = slot.owner >> 32, slot.owner & 0xFFFFFFFF
            if _is_alive(pid, tid):
                name, seconds = FUNCTIONS[slot.function], time.monotonic() - slot.since / 1e9
                calls.append(CallInProgress(name, pid, tid, seconds, slot.held_by or None, slot.sequence))
        return calls

    def wait_held(self, rule: int, count: int = 1, timeout: float = 10.0) -> list[CallInProgress]:
        """Waits until the rule holds at least ``count`` calls, and returns them."""
        deadline = time.monotonic() + timeout
        while True:
            held = [call for call in self.in_progress() if call.held_by == rule]
            if len(held) >= count:
                return held
            if time.monotonic() > deadline:
                raise FaultControlError(f"rule {rule} held {len(held)} calls after {timeout:g} s, not {count}")
            time.sleep(0.002)

    def stats(self) -> dict[str, FunctionStats]:
        """By function, for those that were called since the last reset."""
        running = [call.function for call in self.in_progress()]
        stats = {}
        with self._reading() as control:
            for number, name in enumerate(FUNCTIONS):
                counted = control.counters[number]
                if counted.calls or counted.queries:
                    stats[name] = FunctionStats(
                        calls=counted.calls,
                        executed=counted.executed,
                        injected=counted.injected,
                        failed=counted.failed,
                        queries=counted.queries,
                        in_progress=running.count(name),
                    )
        return stats

    def counts(self) -> dict[str, int]:
        """Calls by function, for those that were called."""
        return {name: stats.calls for name, stats in self.stats().items() if stats.calls}

    def reset(self) -> None:
        """Sets the counters to zero. Not the trace: its numbers go on."""
        with self._changing() as control:
            ctypes.memset(ctypes.addressof(control.counters), 0, ctypes.sizeof(control.counters))

    def last_sequence(self) -> int:
        """The number of the latest call: a mark for ``trace(since)``."""
        with self._reading() as control:
            return int(control.trace_next)

    def trace(self, since: int = 0) -> list[TracedCall]:
        """The last 4096 calls (those after number ``since``) in the order in which they came."""
        with self._reading() as control:
            last = control.trace_next
            wanted = range(max(since, last - _TRACED) + 1, last + 1)
            entries = [(number, _Traced.from_buffer_copy(control.trace[(number - 1) % _TRACED])) for number in wanted]
        return [self._traced(entry) for number, entry in entries if entry.sequence == number]

    @staticmethod
    def _traced(entry: _Traced) -> TracedCall:
        flags, rv = entry.outcome >> 32 & 0xFF, entry.outcome & 0xFFFFFFFF
        return TracedCall(
            sequence=entry.sequence,
            function=FUNCTIONS[entry.function],
            pid=entry.pid,
            tid=entry.tid,
            rv=None if rv == _NOT_RETURNED else rv,
            monotonic=entry.time / 1e9,
            query=bool(flags & _QUERY),
            injected=bool(flags & _INJECTED),
            executed=bool(flags & _EXECUTED),
        )

    # -- the service model

    def service(
        self,
        time_ms: float,
        concurrency: int,
        *,
        scope: str | Iterable[str] = "crypto",
        functions: Mapping[str, float] | None = None,
    ) -> None:
        """Every call of ``scope`` takes the device ``time_ms``, and it does ``concurrency`` at the same time.
        ``functions`` gives single ones (or patterns) another time in milliseconds."""
        if not 1 <= concurrency <= _SERVERS:
            raise FaultControlError(f"the concurrency must be 1 to {_SERVERS}, not {concurrency}")
        times = dict.fromkeys(select_functions(scope), time_ms)
        for pattern, single in (functions or {}).items():
            times.update(dict.fromkeys(select_functions(pattern), single))
        for milliseconds in times.values():
            if not 0 <= milliseconds < 1 << 22:
                raise FaultControlError(f"{milliseconds} is not a service time in milliseconds")
        with self._changing() as control:
            control.concurrency = 0  # frees those who wait by the old settings
            for number, name in enumerate(FUNCTIONS):
                control.service_us[number] = round(times.get(name, 0) * 1000)
            ctypes.memset(ctypes.addressof(control.free_at), 0, ctypes.sizeof(control.free_at))
            control.concurrency = concurrency

    def service_off(self) -> None:
        with self._changing() as control:
            control.concurrency = 0
