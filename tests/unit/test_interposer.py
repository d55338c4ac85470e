"""The fault interposer does what its rules say, and nothing else (every later test relies on it)."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import (
    CKF_OS_LOCKING_OK,
    CKF_RW_SESSION,
    CKF_SERIAL_SESSION,
    CkAttribute,
    CkInitializeArgs,
    CkInterface,
    CkMechanism,
    CkTokenInfo,
    Cryptoki,
)
from tests.support.faults import FIXTURES, FaultControl, FaultControlError, build_interposer, fault_env
from tests.support.softhsm import SOFTHSM, TokenFixture, make_token, token_folder

CKA_CLASS, CKA_LABEL, CKO_DATA = 0x0, 0x3, 0
CKM_SHA256 = 0x250
FAULTCTL = str(FIXTURES / "faultctl")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with token_folder() as path:
        yield path


@pytest.fixture(scope="module")
def token(folder: Path) -> TokenFixture:
    return make_token(folder / "one", "one")


@pytest.fixture
def control(tmp_path: Path) -> FaultControl:
    return FaultControl(tmp_path / "faults").init()


class Wrapped:
    """A copy of the interposer in this process, over a private SoftHSM, with one session that is logged in."""

    def __init__(self, folder: Path, token: TokenFixture, control: FaultControl) -> None:
        copy = folder / f"{token.label}.so"
        shutil.copy(build_interposer(), copy)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (token.env | fault_env(control, SOFTHSM)).items():
                patch.setenv(name, value)
            self.library = ctypes.CDLL(str(copy))
            self.c = Cryptoki(self.library)
            self.c.C_Initialize(ctypes.byref(CkInitializeArgs(flags=CKF_OS_LOCKING_OK)))
        slots, count = (ctypes.c_ulong * 8)(), ctypes.c_ulong(8)
        self.c.C_GetSlotList(1, slots, ctypes.byref(count))
        self.slot = slots[0]
        self.session = self.open_session()
        self.c.C_Login(self.session, 1, token.user_pin.encode(), len(token.user_pin))

    def open_session(self) -> int:
        session = ctypes.c_ulong()
        self.c.C_OpenSession(self.slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, None, None, ctypes.byref(session))
        return session.value

    def random(self, session: int | None = None) -> bytes:
        buffer = ctypes.create_string_buffer(16)
        self.c.C_GenerateRandom(session or self.session, buffer, 16)
        return buffer.raw

    def digest(self, data: bytes = b"data") -> bytes:
        buffer, length = ctypes.create_string_buffer(32), ctypes.c_ulong(32)
        self.c.C_DigestInit(self.session, ctypes.byref(CkMechanism(CKM_SHA256)))
        self.c.C_Digest(self.session, data, len(data), buffer, ctypes.byref(length))
        return buffer.raw

    def create(self, label: bytes) -> int:
        """A session object with this label."""
        handle = ctypes.c_ulong()
        self.c.C_CreateObject(self.session, self._template(label), 2, ctypes.byref(handle))
        return handle.value

    def count(self, label: bytes) -> int:
        found, count = (ctypes.c_ulong * 16)(), ctypes.c_ulong()
        self.c.C_FindObjectsInit(self.session, self._template(label), 2)
        self.c.C_FindObjects(self.session, found, 16, ctypes.byref(count))
        self.c.C_FindObjectsFinal(self.session)
        return count.value

    def token_info(self) -> CkTokenInfo:
        info = CkTokenInfo()
        self.c.C_GetTokenInfo(self.slot, ctypes.byref(info))
        return info

    @staticmethod
    def _template(label: bytes) -> ctypes.Array[CkAttribute]:
        kind, text = ctypes.c_ulong(CKO_DATA), ctypes.create_string_buffer(label, len(label))
        template = (CkAttribute * 2)(
            CkAttribute(CKA_CLASS, ctypes.addressof(kind), ctypes.sizeof(kind)),
            CkAttribute(CKA_LABEL, ctypes.addressof(text), len(label)),
        )
        template.kept = kind, text  # type: ignore[attr-defined]
        return template


@pytest.fixture
def wrapped(tmp_path: Path, token: TokenFixture, control: FaultControl) -> Iterator[Wrapped]:
    module = Wrapped(tmp_path, token, control)
    control.reset()
    yield module
    control.init()
    module.c.C_Finalize(None)


@pytest.fixture
def pool(control: FaultControl) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor
        Path(control.path).unlink(missing_ok=True)  # frees what a failed test left held


def refused(call: Callable[[], Any]) -> int:
    with pytest.raises(Ckr) as caught:
        call()
    return caught.value.rv


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.002)


def seconds(call: Callable[[], Any]) -> float:
    before = time.monotonic()
    call()
    return time.monotonic() - before


# -- transparency


PYTHON_PKCS11 = """
import sys, pkcs11
token = pkcs11.lib(sys.argv[1]).get_token(token_label="one")
with token.open(rw=True, user_pin=sys.stdin.read()) as session:
    public, private = session.generate_keypair(pkcs11.KeyType.RSA, 1024)
    signature = private.sign(b"data", mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS)
    assert public.verify(b"data", signature, mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS)
    key = session.generate_key(pkcs11.KeyType.AES, 256)
    assert key.decrypt(key.encrypt(b"data", mechanism_param=bytes(16)), mechanism_param=bytes(16)) == b"data"
    print(len(token.slot.get_mechanisms()) > 10)
"""


def run_python_pkcs11(token: TokenFixture, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PYTHON_PKCS11, str(build_interposer())],
        input=token.user_pin,
        env=os.environ | token.env | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_python_pkcs11_works_through_it_and_every_call_is_counted(token: TokenFixture, control: FaultControl) -> None:
    ran = run_python_pkcs11(token, fault_env(control, SOFTHSM))
    assert (ran.stdout, ran.stderr, ran.returncode) == ("True\n", "", 0)
    counts = control.counts()
    assert counts["C_GenerateKeyPair"] == counts["C_GenerateKey"] == counts["C_Sign"] == counts["C_Login"] == 1
    stats = control.stats()["C_Sign"]
    assert (stats.executed, stats.injected, stats.failed, stats.in_progress) == (1, 0, 0, 0)
    assert control.in_progress() == []


@pytest.mark.parametrize("content", [None, b"", b"x" * 196608])
def test_without_a_proper_control_file_it_is_transparent(
    token: TokenFixture, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "control"
    if content is not None:
        path.write_bytes(content)
    ran = run_python_pkcs11(token, fault_env(path, SOFTHSM))
    assert (ran.stdout, ran.returncode) == ("True\n", 0)
    assert content is None or path.read_bytes() == content


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (None, "set HAGROUP_FAULT_MODULE"),
        ("/nowhere/module.so", "cannot be read: /nowhere/module.so"),
        (__file__, "cannot be loaded"),
        ("ITSELF", "names the interposer itself"),
        ("OTHER LIBRARY", "no C_GetFunctionList"),
    ],
)
def test_a_real_module_that_cannot_be_used_is_named_in_one_sentence(
    token: TokenFixture, tmp_path: Path, module: str | None, text: str
) -> None:
    if module == "ITSELF":
        module = str(build_interposer())
    elif module == "OTHER LIBRARY":
        module = str(tmp_path / "other.so")
        subprocess.run(["cc", "-shared", "-xc", "-o", module, "-"], stdin=subprocess.DEVNULL, check=True)
    ran = run_python_pkcs11(token, {} if module is None else {"HAGROUP_FAULT_MODULE": module})
    assert ran.returncode == 1
    assert text in ran.stderr
    assert "hagroup-interposer: " in ran.stderr


def test_the_tables_in_c_and_in_python_agree() -> None:
    import faultcontrol

    source = (FIXTURES / "interposer.c").read_text()
    rows = re.findall(r"^    (?:W|OWN)\((C_\w+)(?:, \d+, \([^)]*\), (\S+), [^)]*)?\)", source, re.MULTILINE)
    assert tuple(name for name, _ in rows) == faultcontrol.FUNCTIONS
    buffers = {name for name, output in rows if output not in ("", "NULL")}
    assert buffers - {"C_GetTokenInfo"} == faultcontrol.OUTPUTS, "that one has no length"
    actions = re.findall(r"^    ACTION_(\w+)", source, re.MULTILINE)
    assert tuple(name.lower().replace("_", "-") for name in actions) == faultcontrol.ACTIONS[:-1]


MODULE_OF_3_2 = """
#include <string.h>
typedef unsigned long U;
struct list { unsigned char version[2]; U (*functions[104])(); } v2 = {{2, 40}}, v3 = {{3, 2}};
struct interface { char *name; void *list; U flags; } all[] = {{"PKCS 11", &v3, 0}, {"Vendor", &v2, 0}}, *two = all;
U ok() { return 0; }
U C_EncapsulateKey(U s, U *m, U k, void *t, U n, unsigned char *text, U *length, U *key)
{
    if (text) memset(text, 7, *length = 8), *key = s + k;
    return (*length = 8, 0);
}
U C_GetFunctionList(struct list **list) { return (v2.functions[0] = ok, *list = &v2, 0); }
U C_GetInterfaceList(struct interface *list, U *count)
{
    if (list) memcpy(list, all, sizeof all);
    return (*count = 2, 0);
}
U C_GetInterface(char *name, unsigned char *version, struct interface **found, U flags)
{
    v3.functions[0] = ok;
    v3.functions[92] = (U (*)())C_EncapsulateKey;
    return (*found = name && !strcmp(name, "Vendor") ? two + 1 : two, 0);
}
"""


def test_functions_of_3_x_are_wrapped_too(tmp_path: Path, control: FaultControl) -> None:
    module = tmp_path / "three.so"
    command = ["cc", "-std=gnu11", "-w", "-shared", "-fPIC", "-xc", "-o", str(module), "-"]
    subprocess.run(command, input=MODULE_OF_3_2, text=True, check=True)
    shutil.copy(build_interposer(), tmp_path / "copy.so")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fault_env(control, module).items():
            patch.setenv(name, value)
        c = Cryptoki(ctypes.CDLL(str(tmp_path / "copy.so")))
    assert c.has_v32
    found, count = (CkInterface * 2)(), ctypes.c_ulong(2)
    library = ctypes.CDLL(str(tmp_path / "copy.so"))
    assert library.C_GetInterfaceList(found, ctypes.byref(count)) == 0
    assert [interface.pInterfaceName for interface in found] == [b"PKCS 11", b"Vendor"]
    single = ctypes.POINTER(CkInterface)()
    assert library.C_GetInterface(b"PKCS 11", None, ctypes.byref(single), ctypes.c_ulong(0)) == 0
    assert found[0].pFunctionList == single.contents.pFunctionList  # the wrapped list, both ways
    control.add("C_EncapsulateKey", "corrupt")
    text, length, key = ctypes.create_string_buffer(8), ctypes.c_ulong(8), ctypes.c_ulong()
    c.C_EncapsulateKey(1, None, 2, None, 0, None, ctypes.byref(length), ctypes.byref(key))
    c.C_EncapsulateKey(1, None, 2, None, 0, text, ctypes.byref(length), ctypes.byref(key))
    assert (text.raw, key.value) == (bytes([7, 7, 7, 7, 6, 7, 7, 7]), 3)
    assert control.counts() == {"C_EncapsulateKey": 1}
    assert refused(lambda: c.C_SessionCancel(1, 0)) == CKR.FUNCTION_NOT_SUPPORTED  # NULL in the real list
    assert refused(lambda: c.C_GetSlotList(1, None, None)) == CKR.FUNCTION_NOT_SUPPORTED


def test_a_module_of_2_40_offers_one_interface_and_no_3_x_functions(wrapped: Wrapped) -> None:
    assert not wrapped.c.has_v30
    assert not wrapped.c.has_v32
    count = ctypes.c_ulong()
    assert wrapped.library.C_GetInterfaceList(None, ctypes.byref(count)) == 0
    assert count.value == 1


def test_functions_that_the_real_module_refuses_are_refused_alike(wrapped: Wrapped) -> None:
    assert refused(lambda: wrapped.c.C_CloseSession(999999)) == CKR.SESSION_HANDLE_INVALID


# -- faults


def test_error_is_returned_without_executing(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_CreateObject", "error", rv="CKR_DEVICE_MEMORY")
    assert refused(lambda: wrapped.create(b"x")) == CKR.DEVICE_MEMORY
    assert wrapped.count(b"x") == 0
    stats = control.stats()["C_CreateObject"]
    assert (stats.calls, stats.executed, stats.injected, stats.failed) == (1, 0, 1, 1)


def test_error_after_executes_and_loses_the_reply(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_CreateObject", "error-after", times=1)
    assert refused(lambda: wrapped.create(b"x")) == CKR.DEVICE_ERROR
    assert wrapped.count(b"x") == 1
    wrapped.create(b"x")
    assert wrapped.count(b"x") == 2


def test_an_acknowledged_call_that_never_executed(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_CreateObject", "error", rv="CKR_OK")
    wrapped.create(b"x")
    assert wrapped.count(b"x") == 0


def test_skip_and_times_choose_the_calls(wrapped: Wrapped, control: FaultControl) -> None:
    rule = control.add("C_GenerateRandom", "error", skip=2, times=3)
    outcomes = []
    for _ in range(8):
        try:
            wrapped.random()
            outcomes.append(True)
        except Ckr:
            outcomes.append(False)
    assert outcomes == [True] * 2 + [False] * 3 + [True] * 3
    (found,) = control.rules()
    assert (found.id, found.matched, found.fired, found.held) == (rule, 8, 3, 0)


def test_times_is_exact_with_many_threads(wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor) -> None:
    control.add("C_GenerateRandom", "error", times=50)

    def calls() -> int:
        session, failed = wrapped.open_session(), 0
        for _ in range(200):
            try:
                wrapped.random(session)
            except Ckr:
                failed += 1
        return failed

    assert sum(job.result() for job in [pool.submit(calls) for _ in range(8)]) == 50
    assert control.counts()["C_GenerateRandom"] == 1600
    trace = [call for call in control.trace() if call.function == "C_GenerateRandom"]
    assert len(trace) == 1600
    assert sum(call.rv == CKR.DEVICE_ERROR for call in trace) == 50


def test_probability_fires_now_and_then(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_GenerateRandom", "error", probability=0.5)
    for _ in range(200):
        try:
            wrapped.random()
        except Ckr:
            pass
    assert 60 < control.stats()["C_GenerateRandom"].injected < 140


def test_a_rule_for_another_process_does_nothing_here(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_GenerateRandom", "error", pid=os.getppid())
    wrapped.random()
    control.add("C_GenerateRandom", "error", pid=os.getpid())
    assert refused(wrapped.random) == CKR.DEVICE_ERROR


@pytest.mark.parametrize("action", ["delay", "delay-after"])
def test_delay(wrapped: Wrapped, control: FaultControl, action: str) -> None:
    control.add("C_GenerateRandom", action, ms=60, times=1)
    assert seconds(wrapped.random) >= 0.06
    wrapped.random()
    assert control.stats()["C_GenerateRandom"].injected == 1


def test_a_delay_ends_with_its_rule(wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor) -> None:
    rule = control.add("C_GenerateRandom", "delay", ms=1_000_000)
    job = pool.submit(wrapped.random)
    control.wait_held(rule)
    control.clear(rule)
    assert job.result(10)


def start_held(
    pool: ThreadPoolExecutor, wrapped: Wrapped, control: FaultControl, action: str, times: int = 1
) -> tuple[int, Future[int]]:
    """A C_CreateObject of "x" that the rule holds."""
    rule = control.add("C_CreateObject", action, times=times)
    job = pool.submit(wrapped.create, b"x")
    (call,) = control.wait_held(rule)
    assert (call.function, call.pid, job.done()) == ("C_CreateObject", os.getpid(), False)
    return rule, job


def test_late_executes_when_it_is_released(wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor) -> None:
    rule, job = start_held(pool, wrapped, control, "late")
    assert wrapped.count(b"x") == 0
    control.release(rule)
    assert job.result(10) > 0
    assert wrapped.count(b"x") == 1


def test_hang_never_executes(wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor) -> None:
    rule, job = start_held(pool, wrapped, control, "hang")
    control.clear(rule)
    with pytest.raises(Ckr) as caught:
        job.result(10)
    assert caught.value.rv == CKR.DEVICE_ERROR
    assert wrapped.count(b"x") == 0


def test_hang_after_executes_and_withholds_the_reply(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor
) -> None:
    rule, job = start_held(pool, wrapped, control, "hang-after")
    assert wrapped.count(b"x") == 1
    control.release(rule)
    assert job.result(10) > 0


def test_release_lets_go_what_is_held_and_holds_what_comes(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor
) -> None:
    rule, job = start_held(pool, wrapped, control, "late", times=0)
    control.release(rule)
    job.result(10)
    again = pool.submit(wrapped.create, b"x")
    control.wait_held(rule)
    assert not again.done()
    control.clear()
    again.result(10)


@pytest.mark.parametrize("how", ["init", "remove"])
def test_init_and_removing_the_file_free_what_is_held(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor, how: str
) -> None:
    _, job = start_held(pool, wrapped, control, "late", times=0)
    if how == "init":
        control.init()
    else:
        os.unlink(control.path)
    assert job.result(10) > 0
    wrapped.random()


def test_a_control_file_that_comes_later_is_found(tmp_path: Path, token: TokenFixture) -> None:
    control = FaultControl(tmp_path / "later")
    wrapped = Wrapped(tmp_path, token, control)
    wrapped.random()
    control.init().add("C_GenerateRandom", "error")
    wrapped.open_session()  # looks for the file at once
    assert refused(wrapped.random) == CKR.DEVICE_ERROR
    os.unlink(control.path)
    wrapped.open_session()
    wrapped.random()
    wrapped.c.C_Finalize(None)


def test_corrupt_flips_one_bit_of_the_output(wrapped: Wrapped, control: FaultControl) -> None:
    right = wrapped.digest()
    control.add("C_Digest", "corrupt")
    wrong = wrapped.digest()
    assert sum((a ^ b).bit_count() for a, b in zip(right, wrong, strict=True)) == 1


def test_full_changes_what_the_token_says_of_its_memory_alone(wrapped: Wrapped, control: FaultControl) -> None:
    before = bytes(wrapped.token_info())
    control.add("all", "full")
    after = bytes(wrapped.token_info())
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert changed and min(changed) >= 96 + 7 * 8 and max(changed) < 96 + 11 * 8
    wrapped.random()


def test_absent_hides_the_token_but_not_the_library(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("all", "absent")
    assert refused(wrapped.token_info) == CKR.TOKEN_NOT_PRESENT
    assert refused(wrapped.open_session) == CKR.TOKEN_NOT_PRESENT
    assert refused(wrapped.random) == CKR.TOKEN_NOT_PRESENT
    count = ctypes.c_ulong()
    wrapped.c.C_GetSlotList(1, None, ctypes.byref(count))
    assert count.value > 0
    control.clear()
    wrapped.random()


def test_several_rules_add_up(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_Create*", "delay", ms=20)
    control.add("C_CreateObject", "error-after", rv="CKR_GENERAL_ERROR")
    control.add("device", "delay-after", ms=20)
    assert seconds(lambda: refused(lambda: wrapped.create(b"x"))) >= 0.04
    assert control.stats()["C_CreateObject"].injected == 1


def test_rules_apply_in_the_order_in_which_they_were_added(wrapped: Wrapped, control: FaultControl) -> None:
    for _ in range(30):  # the first of the next two gets the last place in the file, the other the first one
        control.clear(control.add("C_Sign", "hang"))
    control.add("C_GenerateRandom", "error", rv="CKR_GENERAL_ERROR")
    control.add("C_GenerateRandom", "error", rv="CKR_DEVICE_ERROR")
    assert refused(wrapped.random) == CKR.GENERAL_ERROR
    assert [rule.matched for rule in control.rules()] == [1, 0]


CRASH = """
import ctypes, sys
from hagroup.members.cryptoki import Cryptoki
c = Cryptoki(ctypes.CDLL(sys.argv[1]))
c.C_Initialize(None)
print("initialized", flush=True)
c.C_GetSlotList(1, None, ctypes.byref(ctypes.c_ulong()))
print("listed", flush=True)
"""


def start_crash(token: TokenFixture, control: FaultControl) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CRASH, str(build_interposer())],
        env=os.environ | token.env | fault_env(control, SOFTHSM) | {"PYTHONPATH": str(FIXTURES.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("action", "executed"), [("crash", 0), ("crash-after", 1)])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_crash_kills_the_process(
    token: TokenFixture, control: FaultControl, action: str, executed: int, name: str
) -> None:
    control.add("C_GetSlotList", action, signal=name)
    process = start_crash(token, control)
    assert process.communicate(timeout=60)[0] == "initialized\n"
    assert process.returncode == -signal.Signals[name]
    assert control.stats()["C_GetSlotList"].executed == executed
    last = control.trace()[-1]
    assert (last.function, last.rv, last.executed) == ("C_GetSlotList", None, bool(executed))
    assert control.in_progress() == []


def test_a_stopped_process_goes_on_later(token: TokenFixture, control: FaultControl) -> None:
    control.add("C_GetSlotList", "crash", signal="SIGSTOP")
    process = start_crash(token, control)
    assert process.stdout is not None
    assert process.stdout.readline() == "initialized\n"
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert [call.function for call in control.in_progress()] == ["C_GetSlotList"]
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "listed\n"
    assert process.returncode == 0


def test_a_killed_process_leaves_no_call_in_progress(token: TokenFixture, control: FaultControl) -> None:
    rule = control.add("C_GetSlotList", "hang")
    process = start_crash(token, control)
    (call,) = control.wait_held(rule, timeout=30)
    assert call.pid == process.pid
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert control.in_progress() == []
    process.communicate(timeout=60)


def test_slots_of_dead_processes_are_used_again(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor
) -> None:
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    with control._changing() as shared:
        for slot in shared.running:
            slot.owner = dead.pid << 32 | dead.pid
    assert control.in_progress() == []
    start_held(pool, wrapped, control, "hang")
    dead.wait()


# -- what is recorded


def test_the_trace_has_the_calls_in_order(wrapped: Wrapped, control: FaultControl) -> None:
    mark = control.last_sequence()
    wrapped.digest()
    control.add("C_Digest", "error", rv=0x80000001)
    refused(wrapped.digest)
    seen = [(call.function, call.rv, call.injected, call.executed) for call in control.trace(mark)]
    assert seen == [
        ("C_DigestInit", 0, False, True),
        ("C_Digest", 0, False, True),
        ("C_DigestInit", 0, False, True),
        ("C_Digest", 0x80000001, True, False),
    ]
    assert {(call.pid, call.tid) for call in control.trace(mark)} == {(os.getpid(), threading.get_native_id())}


def test_the_trace_keeps_the_last_4096(wrapped: Wrapped, control: FaultControl) -> None:
    for _ in range(4100):
        wrapped.random()
    trace = control.trace()
    assert [call.sequence for call in trace] == list(range(control.last_sequence() - 4095, control.last_sequence() + 1))


def test_asking_for_a_length_is_no_call(wrapped: Wrapped, control: FaultControl) -> None:
    control.add("C_Digest", "error")
    length = ctypes.c_ulong()
    wrapped.c.C_DigestInit(wrapped.session, ctypes.byref(CkMechanism(CKM_SHA256)))
    wrapped.c.C_Digest(wrapped.session, b"data", 4, None, ctypes.byref(length))
    assert length.value == 32
    stats = control.stats()["C_Digest"]
    assert (stats.calls, stats.queries, stats.injected) == (0, 1, 0)


def test_reset_sets_the_counters_to_zero(wrapped: Wrapped, control: FaultControl) -> None:
    wrapped.random()
    control.reset()
    assert control.counts() == {}
    wrapped.random()
    assert control.counts() == {"C_GenerateRandom": 1}


# -- the service model


def timed(wrapped: Wrapped, pool: ThreadPoolExecutor, threads: int, calls: int) -> float:
    sessions = [wrapped.open_session() for _ in range(threads)]

    def work(session: int) -> None:
        for _ in range(calls):
            wrapped.random(session)

    def together() -> None:
        for job in [pool.submit(work, session) for session in sessions]:
            job.result(60)

    return seconds(together)


def test_service_time_and_concurrency_bound_the_throughput(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor
) -> None:
    control.service(2, 1)
    assert timed(wrapped, pool, threads=4, calls=5) >= 0.04
    control.service(200, 4)
    assert 0.6 <= timed(wrapped, pool, threads=4, calls=3) < 2.4  # not one after the other


def test_the_device_is_one_for_all_processes(tmp_path: Path, token: TokenFixture, control: FaultControl) -> None:
    again = "for _ in range(10): c.C_GetSlotList(1, None, ctypes.byref(ctypes.c_ulong()))"
    script = CRASH.replace('print("initialized", flush=True)', again)
    control.service(5, 1, scope=["C_GetSlotList"])
    env = os.environ | token.env | fault_env(control, SOFTHSM) | {"PYTHONPATH": str(FIXTURES.parent)}
    running = [subprocess.Popen([sys.executable, "-c", script, str(build_interposer())], env=env) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    calls = [call.monotonic for call in control.trace() if call.function == "C_GetSlotList"]
    assert len(calls) == 33
    assert max(calls) - min(calls) >= 0.005 * (33 - 3)


def test_only_the_calls_in_scope_cost_and_single_ones_may_cost_more(wrapped: Wrapped, control: FaultControl) -> None:
    control.service(30_000, 1)
    assert seconds(wrapped.token_info) < 30
    control.service(30, 1, functions={"C_Digest": 90})
    assert seconds(wrapped.random) >= 0.03
    assert seconds(wrapped.digest) >= 0.09
    control.service(30, 1, scope="device")
    assert seconds(wrapped.token_info) >= 0.03


def test_who_waits_for_the_device_goes_on_when_the_model_is_switched_off(
    wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor
) -> None:
    control.service(1_000_000, 1)
    jobs = [pool.submit(wrapped.random, wrapped.open_session()) for _ in range(3)]
    until(lambda: len(control.in_progress()) == 3 and control.stats()["C_GenerateRandom"].executed > 0)
    assert control.stats()["C_GenerateRandom"].executed == 1  # the others wait for their turn
    control.service_off()
    assert all(job.result(10) for job in jobs)


# -- several modules in one process


def test_two_copies_in_one_process_are_two_members(folder: Path, tmp_path: Path, token: TokenFixture) -> None:
    other = make_token(folder / "two", "two")
    controls = [FaultControl(tmp_path / name).init() for name in ("a", "b")]
    one, two = (Wrapped(tmp_path, each, control) for each, control in zip((token, other), controls, strict=True))
    serials = [bytes(each.token_info().serialNumber).decode().strip() for each in (one, two)]
    assert serials == [token.serial, other.serial]
    controls[0].add("all", "error")
    assert refused(one.random) == CKR.DEVICE_ERROR
    two.random()
    controls[0].clear()
    one.c.C_Finalize(None)
    two.random()
    two.c.C_Finalize(None)


def test_one_copy_wraps_one_module(wrapped: Wrapped, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.so"
    shutil.copy(SOFTHSM, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAGROUP_FAULT_MODULE", str(other))
        assert wrapped.library.C_GetFunctionList(ctypes.byref(ctypes.c_void_p())) == CKR.GENERAL_ERROR
    assert "already wraps another module" in capfd.readouterr().err


def test_a_forked_child_shows_with_its_own_process_id(wrapped: Wrapped, control: FaultControl) -> None:
    mark = control.last_sequence()
    child = os.fork()
    if child == 0:
        try:
            wrapped.c.C_GetSlotList(1, None, ctypes.byref(ctypes.c_ulong()))
        except Ckr:
            pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert [(call.function, call.pid) for call in control.trace(mark)] == [("C_GetSlotList", child)]


# -- the command


def faultctl(control: FaultControl, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FAULTCTL, control.path, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_faultctl_does_all_of_it(wrapped: Wrapped, control: FaultControl, pool: ThreadPoolExecutor) -> None:
    assert faultctl(control, "init").returncode == 0
    rule = faultctl(control, "add", "C_GenerateRandom", "late", "--skip", "1", "--times", "1").stdout.strip()
    wrapped.random()
    job = pool.submit(wrapped.random)
    control.wait_held(int(rule))
    assert (
        f"{rule}  C_GenerateRandom  late skip 1 times 1  (matched 2, fired 1, holds 1)"
        in faultctl(control, "list").stdout
    )
    assert f"held by rule {rule}" in faultctl(control, "stats").stdout
    assert faultctl(control, "release", rule).returncode == 0
    job.result(10)
    assert faultctl(control, "clear", rule).returncode == 0
    assert faultctl(control, "list").stdout == ""
    faultctl(control, "add", "all", "error", "--rv", "CKR_DEVICE_REMOVED")
    assert refused(wrapped.random) == CKR.DEVICE_REMOVED
    faultctl(control, "clear")
    trace = faultctl(control, "trace").stdout.splitlines()
    assert [line.split(maxsplit=2)[2] for line in trace] == [
        "C_GenerateRandom          CKR_OK",
        "C_GenerateRandom          CKR_OK  (injected)",
        "C_GenerateRandom          CKR_DEVICE_REMOVED  (injected, not executed)",
    ]
    faultctl(control, "service", "--time-ms", "40", "--concurrency", "2")
    assert seconds(wrapped.random) >= 0.04
    faultctl(control, "service", "--off")
    assert "C_GenerateRandom" in faultctl(control, "stats", "--reset").stdout
    assert "C_GenerateRandom" not in faultctl(control, "stats").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["add", "C_Sing", "hang"], '"C_Sing" names no PKCS#11 function; did you mean C_Sign?'),
        (["add", "C_Sign", "explode"], '"explode" is not an action; there are: delay, '),
        (["add", "C_Sign", "delay"], "delay needs a time in whole milliseconds"),
        (["add", "C_Sign", "error", "--ms", "5"], "error takes no ms"),
        (["add", "C_Sign", "error", "--rv", "CKR_DEVICE_EROR"], "did you mean CKR_DEVICE_ERROR?"),
        (["add", "C_Verify", "corrupt"], "this action can do nothing with C_Verify"),
        (["add", "C_Sign", "crash", "--signal", "SIGNAL"], "SIGNAL is not a signal"),
        (["add", "C_Sign", "hang", "--skip", "-1"], "skip must not be -1"),
        (["add", "C_Sign", "hang", "--times", "many"], "invalid int value: 'many'"),
        (["add", "C_Sign", "hang", "--probability", "2"], "the probability must be above 0 and at most 1"),
        (["add", "C_GetFunctionList", "hang"], "cannot be faulted"),
        (["release", "77"], "there is no rule 77"),
        (["service", "--time-ms", "5"], "service needs --time-ms and --concurrency, or --off"),
        (["service", "--time-ms", "5", "--concurrency", "65"], "the concurrency must be 1 to 64, not 65"),
    ],
)
def test_faultctl_says_in_one_sentence_what_is_wrong(control: FaultControl, arguments: list[str], text: str) -> None:
    ran = faultctl(control, *arguments)
    assert ran.returncode == 2
    assert text in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_faultctl_needs_a_control_file(tmp_path: Path) -> None:
    ran = faultctl(FaultControl(tmp_path / "none"), "list")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "make it with init" in ran.stderr
    (tmp_path / "other").write_text("something else")
    with pytest.raises(FaultControlError, match="not a control file"):
        FaultControl(tmp_path / "other").init()
    assert (tmp_path / "other").read_text() == "something else"


def test_there_is_room_for_32_rules(control: FaultControl) -> None:
    rules = [control.add("C_Sign", "hang") for _ in range(32)]
    with pytest.raises(FaultControlError, match="all 32 rules are taken"):
        control.add("C_Sign", "hang")
    control.clear(rules[5])
    assert control.add("C_Sign", "hang") not in rules


# -- building


def test_build_interposer_says_when_there_is_no_compiler(tmp_path: Path) -> None:
    build = [str(FIXTURES / "build-interposer"), str(tmp_path / "made.so")]
    ran = subprocess.run(build, env=os.environ | {"CC": "no-such-cc"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "No C compiler (no-such-cc): please install one" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_build_interposer_into_a_given_path(tmp_path: Path) -> None:
    build = [str(FIXTURES / "build-interposer"), str(tmp_path / "new" / "made.so")]
    assert subprocess.run(build, capture_output=True, text=True, check=True).stdout == f"{build[1]}\n"
    before = os.stat(build[1]).st_ino
    subprocess.run(build, capture_output=True, check=True)
    assert os.stat(build[1]).st_ino == before  # made once
