/*
 * hagroup-interposer: a PKCS#11 module that wraps a real one and misbehaves on request.
 *
 *     application -> wrap_C_Sign() -> the real module's C_Sign()
 *                         |
 *                    control file (shared memory; written by faultctl and by tests, from any process)
 *
 * The control file is mapped into every process that uses the module. It holds rules ("the third C_UnwrapKey hangs"),
 * a model of a network HSM's service time, counters, the calls now in progress and a trace of the last calls. So a
 * change from outside takes effect at once, in all processes, and a call that no rule concerns pays a few atomic
 * operations. No lock is ever held around the real call. Without a control file the wrapper is transparent.
 *
 * Every wrapper has the same three steps, made by the macro WRAPPER from one table of functions:
 *     begin()   count, trace, faults that come before the call, wait for the device; says whether to execute
 *     the real function
 *     finish()  device time, faults that come after the call, outcome into the trace
 *
 * The layout of the control file is fixed by the structures below and, field by field the same, in faultcontrol.py;
 * which functions a rule or a service time concerns is decided there, and is only a bit or a number here.
 *
 * All state is static: each loaded *copy* of this file is a module of its own, with a private copy of the real one.
 *
 *     HAGROUP_FAULT_MODULE   path of the real module; read when the function list is first asked for
 *     HAGROUP_FAULT_CONTROL  path of the control file; read then and at C_Initialize
 *     HAGROUP_FAULT_COPY     0: load the real module itself rather than a private copy of its file
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- what is needed of PKCS#11: every argument is a number, a flag byte or a pointer, and passes through as it is */

typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;
typedef void (*function)(void);

typedef CK_ULONG U;      /* CK_ULONG, handles, flags */
typedef void *P;         /* any pointer */
typedef unsigned char B; /* CK_BBOOL */

#define CKR_OK 0x000UL
#define CKR_GENERAL_ERROR 0x005UL
#define CKR_FUNCTION_FAILED 0x006UL
#define CKR_ARGUMENTS_BAD 0x007UL
#define CKR_FUNCTION_NOT_SUPPORTED 0x054UL
#define CKR_BUFFER_TOO_SMALL 0x150UL

/*
 * Every function in the order of the function lists: W(name, number of arguments, their types, output buffer, its
 * length), or OWN(name) for those that this file answers itself. A NULL buffer with a length is a question for the
 * length; it neither costs service time nor meets a rule.
 */
#define FUNCTIONS_2_40(W, OWN)                                                  \
    W(C_Initialize, 1, (P), NULL, NULL)                                         \
    W(C_Finalize, 1, (P), NULL, NULL)                                           \
    W(C_GetInfo, 1, (P), NULL, NULL)                                            \
    OWN(C_GetFunctionList)                                                      \
    W(C_GetSlotList, 3, (B, P, P), NULL, NULL)                                  \
    W(C_GetSlotInfo, 2, (U, P), NULL, NULL)                                     \
    W(C_GetTokenInfo, 2, (U, P), a2, NULL)                                      \
    W(C_GetMechanismList, 3, (U, P, P), NULL, NULL)                             \
    W(C_GetMechanismInfo, 3, (U, U, P), NULL, NULL)                             \
    W(C_InitToken, 4, (U, P, U, P), NULL, NULL)                                 \
    W(C_InitPIN, 3, (U, P, U), NULL, NULL)                                      \
    W(C_SetPIN, 5, (U, P, U, P, U), NULL, NULL)                                 \
    W(C_OpenSession, 5, (U, U, P, P, P), NULL, NULL)                            \
    W(C_CloseSession, 1, (U), NULL, NULL)                                       \
    W(C_CloseAllSessions, 1, (U), NULL, NULL)                                   \
    W(C_GetSessionInfo, 2, (U, P), NULL, NULL)                                  \
    W(C_GetOperationState, 3, (U, P, P), a2, a3)                                \
    W(C_SetOperationState, 5, (U, P, U, U, U), NULL, NULL)                      \
    W(C_Login, 4, (U, U, P, U), NULL, NULL)                                     \
    W(C_Logout, 1, (U), NULL, NULL)                                             \
    W(C_CreateObject, 4, (U, P, U, P), NULL, NULL)                              \
    W(C_CopyObject, 5, (U, U, P, U, P), NULL, NULL)                             \
    W(C_DestroyObject, 2, (U, U), NULL, NULL)                                   \
    W(C_GetObjectSize, 3, (U, U, P), NULL, NULL)                                \
    W(C_GetAttributeValue, 4, (U, U, P, U), NULL, NULL)                         \
    W(C_SetAttributeValue, 4, (U, U, P, U), NULL, NULL)                         \
    W(C_FindObjectsInit, 3, (U, P, U), NULL, NULL)                              \
    W(C_FindObjects, 4, (U, P, U, P), NULL, NULL)                               \
    W(C_FindObjectsFinal, 1, (U), NULL, NULL)                                   \
    W(C_EncryptInit, 3, (U, P, U), NULL, NULL)                                  \
    W(C_Encrypt, 5, (U, P, U, P, P), a4, a5)                                    \
    W(C_EncryptUpdate, 5, (U, P, U, P, P), a4, a5)                              \
    W(C_EncryptFinal, 3, (U, P, P), a2, a3)                                     \
    W(C_DecryptInit, 3, (U, P, U), NULL, NULL)                                  \
    W(C_Decrypt, 5, (U, P, U, P, P), a4, a5)                                    \
    W(C_DecryptUpdate, 5, (U, P, U, P, P), a4, a5)                              \
    W(C_DecryptFinal, 3, (U, P, P), a2, a3)                                     \
    W(C_DigestInit, 2, (U, P), NULL, NULL)                                      \
    W(C_Digest, 5, (U, P, U, P, P), a4, a5)                                     \
    W(C_DigestUpdate, 3, (U, P, U), NULL, NULL)                                 \
    W(C_DigestKey, 2, (U, U), NULL, NULL)                                       \
    W(C_DigestFinal, 3, (U, P, P), a2, a3)                                      \
    W(C_SignInit, 3, (U, P, U), NULL, NULL)                                     \
    W(C_Sign, 5, (U, P, U, P, P), a4, a5)                                       \
    W(C_SignUpdate, 3, (U, P, U), NULL, NULL)                                   \
    W(C_SignFinal, 3, (U, P, P), a2, a3)                                        \
    W(C_SignRecoverInit, 3, (U, P, U), NULL, NULL)                              \
    W(C_SignRecover, 5, (U, P, U, P, P), a4, a5)                                \
    W(C_VerifyInit, 3, (U, P, U), NULL, NULL)                                   \
    W(C_Verify, 5, (U, P, U, P, U), NULL, NULL)                                 \
    W(C_VerifyUpdate, 3, (U, P, U), NULL, NULL)                                 \
    W(C_VerifyFinal, 3, (U, P, U), NULL, NULL)                                  \
    W(C_VerifyRecoverInit, 3, (U, P, U), NULL, NULL)                            \
    W(C_VerifyRecover, 5, (U, P, U, P, P), a4, a5)                              \
    W(C_DigestEncryptUpdate, 5, (U, P, U, P, P), a4, a5)                        \
    W(C_DecryptDigestUpdate, 5, (U, P, U, P, P), a4, a5)                        \
    W(C_SignEncryptUpdate, 5, (U, P, U, P, P), a4, a5)                          \
    W(C_DecryptVerifyUpdate, 5, (U, P, U, P, P), a4, a5)                        \
    W(C_GenerateKey, 5, (U, P, P, U, P), NULL, NULL)                            \
    W(C_GenerateKeyPair, 8, (U, P, P, U, P, U, P, P), NULL, NULL)               \
    W(C_WrapKey, 6, (U, P, U, U, P, P), a5, a6)                                 \
    W(C_UnwrapKey, 8, (U, P, U, P, U, P, U, P), NULL, NULL)                     \
    W(C_DeriveKey, 6, (U, P, U, P, U, P), NULL, NULL)                           \
    W(C_SeedRandom, 3, (U, P, U), NULL, NULL)                                   \
    W(C_GenerateRandom, 3, (U, P, U), a2, &a3)                                  \
    W(C_GetFunctionStatus, 1, (U), NULL, NULL)                                  \
    W(C_CancelFunction, 1, (U), NULL, NULL)                                     \
    W(C_WaitForSlotEvent, 3, (U, P, P), NULL, NULL)

#define FUNCTIONS_3_0(W, OWN)                                                   \
    OWN(C_GetInterfaceList)                                                     \
    OWN(C_GetInterface)                                                         \
    W(C_LoginUser, 6, (U, U, P, U, P, U), NULL, NULL)                           \
    W(C_SessionCancel, 2, (U, U), NULL, NULL)                                   \
    W(C_MessageEncryptInit, 3, (U, P, U), NULL, NULL)                           \
    W(C_EncryptMessage, 9, (U, P, U, P, U, P, U, P, P), a8, a9)                 \
    W(C_EncryptMessageBegin, 5, (U, P, U, P, U), NULL, NULL)                    \
    W(C_EncryptMessageNext, 8, (U, P, U, P, U, P, P, U), a6, a7)                \
    W(C_MessageEncryptFinal, 1, (U), NULL, NULL)                                \
    W(C_MessageDecryptInit, 3, (U, P, U), NULL, NULL)                           \
    W(C_DecryptMessage, 9, (U, P, U, P, U, P, U, P, P), a8, a9)                 \
    W(C_DecryptMessageBegin, 5, (U, P, U, P, U), NULL, NULL)                    \
    W(C_DecryptMessageNext, 8, (U, P, U, P, U, P, P, U), a6, a7)                \
    W(C_MessageDecryptFinal, 1, (U), NULL, NULL)                                \
    W(C_MessageSignInit, 3, (U, P, U), NULL, NULL)                              \
    W(C_SignMessage, 7, (U, P, U, P, U, P, P), a6, a7)                          \
    W(C_SignMessageBegin, 3, (U, P, U), NULL, NULL)                             \
    W(C_SignMessageNext, 7, (U, P, U, P, U, P, P), a6, a7)                      \
    W(C_MessageSignFinal, 1, (U), NULL, NULL)                                   \
    W(C_MessageVerifyInit, 3, (U, P, U), NULL, NULL)                            \
    W(C_VerifyMessage, 7, (U, P, U, P, U, P, U), NULL, NULL)                    \
    W(C_VerifyMessageBegin, 3, (U, P, U), NULL, NULL)                           \
    W(C_VerifyMessageNext, 7, (U, P, U, P, U, P, U), NULL, NULL)                \
    W(C_MessageVerifyFinal, 1, (U), NULL, NULL)

#define FUNCTIONS_3_2(W, OWN)                                                   \
    W(C_EncapsulateKey, 8, (U, P, U, P, U, P, P, P), a6, a7)                    \
    W(C_DecapsulateKey, 8, (U, P, U, P, U, P, U, P), NULL, NULL)                \
    W(C_VerifySignatureInit, 5, (U, P, U, P, U), NULL, NULL)                    \
    W(C_VerifySignature, 3, (U, P, U), NULL, NULL)                              \
    W(C_VerifySignatureUpdate, 3, (U, P, U), NULL, NULL)                        \
    W(C_VerifySignatureFinal, 1, (U), NULL, NULL)                               \
    W(C_GetSessionValidationFlags, 3, (U, U, P), NULL, NULL)                    \
    W(C_AsyncComplete, 3, (U, P, P), NULL, NULL)                                \
    W(C_AsyncGetID, 3, (U, P, P), NULL, NULL)                                   \
    W(C_AsyncJoin, 5, (U, P, U, P, U), NULL, NULL)                              \
    W(C_WrapKeyAuthenticated, 8, (U, P, U, U, P, U, P, P), a7, a8)              \
    W(C_UnwrapKeyAuthenticated, 10, (U, P, U, P, U, P, U, P, U, P), NULL, NULL)

#define NUMBER(name, ...) FUNCTION_##name,
enum {
    FUNCTIONS_2_40(NUMBER, NUMBER) COUNT_2_40,
    BEFORE_3_0 = COUNT_2_40 - 1,
    FUNCTIONS_3_0(NUMBER, NUMBER) COUNT_3_0,
    BEFORE_3_2 = COUNT_3_0 - 1,
    FUNCTIONS_3_2(NUMBER, NUMBER) COUNT_3_2
};

/* ---- the control file; faultcontrol.py has the same structures */

#define MAGIC "HAGFAULT"
#define LAYOUT_VERSION 1
#define RULES 32
#define COUNTED_FUNCTIONS 128
#define SERVERS 64
#define RUNNING 256
#define TRACED 4096

enum action {
    ACTION_DELAY = 1,   /* parameter: milliseconds */
    ACTION_DELAY_AFTER, /* parameter: milliseconds */
    ACTION_HANG,        /* parameter: return value once released; never executed */
    ACTION_HANG_AFTER,
    ACTION_LATE,        /* executes once released */
    ACTION_ERROR,       /* parameter: return value */
    ACTION_ERROR_AFTER, /* parameter: return value */
    ACTION_CRASH,       /* parameter: signal */
    ACTION_CRASH_AFTER, /* parameter: signal */
    ACTION_CORRUPT,
    ACTION_FULL,
};

struct rule {
    uint32_t id; /* never used twice in one file */
    uint32_t action;
    uint32_t pid;         /* 0: any process */
    uint32_t probability; /* parts per million */
    uint64_t functions[2]; /* one bit each */
    uint64_t parameter;
    uint64_t skip;    /* so many matching calls pass first */
    uint64_t times;   /* then it fires so often; 0: for ever */
    uint64_t matched; /* counted here */
    uint64_t fired;   /* counted here */
    uint32_t released; /* moved by "release": what is held goes on */
    uint32_t unused[13];
};

struct counters {
    uint64_t calls;    /* entered, questions for a length aside */
    uint64_t executed; /* the real function was entered */
    uint64_t injected; /* at least one rule fired */
    uint64_t failed;   /* returned something other than CKR_OK */
    uint64_t queries;  /* questions for the length of an output */
    uint64_t unused[3];
};

struct running {
    uint64_t owner; /* process id << 32 | thread id; 0: free */
    uint64_t since; /* CLOCK_MONOTONIC, ns */
    uint64_t sequence;
    uint32_t function;
    uint32_t held_by; /* rule that holds the call now, or 0 */
    uint64_t unused[4];
};

struct traced {
    uint64_t sequence; /* from 1; 0: being written */
    uint64_t outcome;  /* sequence's low 24 bits | 8 bits of flags | return value (all ones: not returned) */
    uint64_t time;     /* of the call, CLOCK_MONOTONIC, ns */
    uint32_t pid;
    uint32_t tid;
    uint32_t function;
    uint32_t unused;
};

struct control {
    char magic[8];
    uint32_t version;
    uint32_t size;
    uint32_t active; /* one bit for each rule in force */
    uint32_t next_id;
    uint32_t concurrency; /* service model: how many calls the device does at the same time; 0: off */
    uint32_t unused0;
    uint64_t trace_next;
    uint64_t unused1[59];
    uint32_t service_us[COUNTED_FUNCTIONS]; /* service model: device time of a call */
    uint64_t free_at[SERVERS];              /* service model: when each of the device's servers is free, ns */
    uint64_t unused2[320];
    struct rule rules[RULES];
    struct counters counters[COUNTED_FUNCTIONS];
    struct running running[RUNNING];
    struct traced trace[TRACED];
};

_Static_assert(sizeof(struct rule) == 128 && sizeof(struct counters) == 64 && sizeof(struct running) == 64 &&
                   sizeof(struct traced) == 40 && sizeof(struct control) == 0x30000,
               "the layout of faultcontrol.py");
_Static_assert(COUNT_3_2 <= COUNTED_FUNCTIONS, "room for a counter and a bit each");

#define FLAG_QUERY 1U
#define FLAG_INJECTED 2U
#define FLAG_EXECUTED 4U
#define NOT_RETURNED 0xffffffffUL

#define load_relaxed(address) __atomic_load_n(address, __ATOMIC_RELAXED)
#define load_acquire(address) __atomic_load_n(address, __ATOMIC_ACQUIRE)
#define store_relaxed(address, value) __atomic_store_n(address, value, __ATOMIC_RELAXED)
#define store_release(address, value) __atomic_store_n(address, value, __ATOMIC_RELEASE)
#define count_one(address) __atomic_fetch_add(address, 1, __ATOMIC_RELAXED)
#define swap_if(address, expected, value) \
    __atomic_compare_exchange_n(address, expected, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)

/* ---- time, threads, processes */

#define MILLISECOND 1000000ULL
#define POLL (2 * MILLISECOND)               /* how soon a held call sees its release */
#define CONTROL_FILE_CHECK (50 * MILLISECOND) /* how soon a control file that comes, goes or is replaced is seen */

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static uint64_t now(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

static void sleep_until(uint64_t when)
{
    struct timespec time = {(time_t)(when / 1000000000ULL), (long)(when % 1000000000ULL)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR)
        ;
}

static pthread_mutex_t setting_up = PTHREAD_MUTEX_INITIALIZER; /* loading and mapping; never around a real call */
static uint32_t process_id;
static __thread uint32_t thread_id; /* gettid and getpid are system calls */

static void after_fork_in_child(void)
{
    setting_up = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* another thread of the parent may have held it */
    store_relaxed(&process_id, (uint32_t)getpid());
    thread_id = 0;
}

__attribute__((constructor)) static void prepare(void)
{
    process_id = (uint32_t)getpid();
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static uint32_t own_thread(void)
{
    if (!thread_id)
        thread_id = (uint32_t)syscall(SYS_gettid);
    return thread_id;
}

/* False for a killed process that nobody has waited for yet, too. */
static int is_alive(uint64_t owner)
{
    char path[64], status[512];
    snprintf(path, sizeof path, "/proc/%u/task/%u/stat", (unsigned)(owner >> 32), (unsigned)owner);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return 0;
    ssize_t length = read(descriptor, status, sizeof status - 1);
    close(descriptor);
    status[length > 0 ? length : 0] = 0;
    const char *state = strrchr(status, ')'); /* the program's name in front may hold anything */
    return state && state[1] && state[2] != 'Z' && state[2] != 'X';
}

/* ---- the control file: mapped when it is there, looked for now and then */

static char control_path[4096];
static struct control *current; /* NULL: transparent */
static dev_t current_device;
static ino_t current_inode;
static uint64_t next_look;

static struct control *map_control(const char *path, struct stat *status)
{
    struct control *control = NULL;
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return NULL;
    if (!fstat(descriptor, status) && status->st_size == (off_t)sizeof *control) {
        control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        if (control == MAP_FAILED)
            control = NULL;
        else if (memcmp(control->magic, MAGIC, sizeof control->magic) || control->version != LAYOUT_VERSION) {
            munmap(control, sizeof *control);
            control = NULL;
        }
    }
    close(descriptor);
    return control;
}

/* Follows the path. A file that was replaced stays mapped: another thread may be in it, and it keeps its inode number
 * from being used again, so that comparing inodes is enough. */
static void look_for_control(void)
{
    struct stat status;
    struct control *control = current;
    if (!control_path[0] || stat(control_path, &status) || status.st_size != (off_t)sizeof *control)
        control = NULL;
    else if (!control || status.st_dev != current_device || status.st_ino != current_inode) {
        control = map_control(control_path, &status);
        current_device = status.st_dev;
        current_inode = status.st_ino;
    }
    store_release(&current, control);
    store_relaxed(&next_look, clock_ns(CLOCK_MONOTONIC_COARSE) + CONTROL_FILE_CHECK);
}

static struct control *current_control(int look)
{
    if (look)
        pthread_mutex_lock(&setting_up);
    else if (clock_ns(CLOCK_MONOTONIC_COARSE) < load_relaxed(&next_look) || pthread_mutex_trylock(&setting_up))
        return load_acquire(&current);
    look_for_control();
    pthread_mutex_unlock(&setting_up);
    return load_acquire(&current);
}

static void take_control_path(void)
{
    const char *path = getenv("HAGROUP_FAULT_CONTROL");
    if (path && strlen(path) < sizeof control_path)
        strcpy(control_path, path);
}

/* ---- one call */

struct firing { /* a rule as it was when it fired */
    const struct rule *rule;
    uint64_t parameter;
    uint32_t bit, id, action, released;
};

struct call {
    struct control *control;
    unsigned function;
    CK_RV rv;
    unsigned flags;
    struct running *running;
    struct running unregistered; /* where more threads than slots are busy */
    struct traced *traced;
    uint64_t sequence;
    uint64_t *server; /* of the service model, or NULL */
    uint64_t service_end, service_ns, cpu_before;
    unsigned after_count;
    struct firing after[RULES];
};

static uint64_t outcome(const struct call *call, CK_RV rv)
{
    return call->sequence << 40 | (uint64_t)call->flags << 32 | (rv & 0xffffffffUL);
}

/* The call takes a slot among those in progress: a free one nearby, else that of a dead thread anywhere. */
static void enter_running(struct call *call)
{
    uint64_t owner = (uint64_t)load_relaxed(&process_id) << 32 | own_thread();
    unsigned first = own_thread() * 2654435761U >> 24;
    call->running = &call->unregistered;
    for (unsigned pass = 0; pass < 2 && call->running == &call->unregistered; pass++)
        for (unsigned probe = 0; probe < (pass ? RUNNING : 16); probe++) {
            struct running *slot = &call->control->running[(first + probe) % RUNNING];
            uint64_t before = load_relaxed(&slot->owner);
            if ((!before || (pass && !is_alive(before))) && swap_if(&slot->owner, &before, owner)) {
                call->running = slot;
                break;
            }
        }
    call->running->function = call->function;
    call->running->since = now();
    call->running->sequence = call->sequence;
    store_relaxed(&call->running->held_by, 0);
}

static void enter_trace(struct call *call)
{
    struct control *control = call->control;
    call->sequence = count_one(&control->trace_next) + 1;
    struct traced *entry = call->traced = &control->trace[(call->sequence - 1) % TRACED];
    store_relaxed(&entry->sequence, 0);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    entry->time = now();
    entry->pid = load_relaxed(&process_id);
    entry->tid = own_thread();
    entry->function = call->function;
    store_relaxed(&entry->outcome, outcome(call, NOT_RETURNED));
    store_release(&entry->sequence, call->sequence);
}

/* Unless 4096 later calls took the entry over meanwhile. */
static void trace_outcome(const struct call *call, CK_RV rv)
{
    uint64_t before = load_relaxed(&call->traced->outcome);
    if (before >> 40 == (call->sequence & 0xffffff))
        swap_if(&call->traced->outcome, &before, outcome(call, rv));
}

/* ---- rules */

static uint64_t mixed(uint64_t number) /* splitmix64 */
{
    number += 0x9e3779b97f4a7c15ULL;
    number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9ULL;
    number = (number ^ number >> 27) * 0x94d049bb133111ebULL;
    return number ^ number >> 31;
}

/* Counts a matching call; true if the rule fires for it. The same calls in the same order fire the same way. */
static int fires(struct rule *rule, unsigned number)
{
    if (!(load_relaxed(&rule->functions[number / 64]) >> number % 64 & 1))
        return 0;
    if (load_relaxed(&rule->pid) && load_relaxed(&rule->pid) != load_relaxed(&process_id))
        return 0;
    uint64_t place = count_one(&rule->matched);
    if (place < load_relaxed(&rule->skip))
        return 0;
    if (mixed((uint64_t)load_relaxed(&rule->id) << 40 ^ place) % 1000000 >= load_relaxed(&rule->probability))
        return 0;
    uint64_t times = load_relaxed(&rule->times), fired = load_relaxed(&rule->fired);
    do {
        if (times && fired >= times)
            return 0;
    } while (!swap_if(&rule->fired, &fired, fired + 1));
    return 1;
}

/* Rules apply in the order in which they were added. */
static unsigned oldest(const struct control *control, uint32_t places)
{
    unsigned first = (unsigned)__builtin_ctz(places);
    for (places &= places - 1; places; places &= places - 1) {
        unsigned place = (unsigned)__builtin_ctz(places);
        if (load_relaxed(&control->rules[place].id) < load_relaxed(&control->rules[first].id))
            first = place;
    }
    return first;
}

static int in_force(const struct call *call, const struct firing *firing)
{
    return current_control(0) == call->control && load_acquire(&call->control->active) & firing->bit &&
           load_relaxed(&firing->rule->id) == firing->id && load_relaxed(&firing->rule->released) == firing->released;
}

/* Until the rule is released, removed or replaced, its control file is removed, or the time has come. */
static void hold(struct call *call, const struct firing *firing, uint64_t until)
{
    store_release(&call->running->held_by, firing->id);
    for (uint64_t time = now(); time < until && in_force(call, firing); time = now())
        sleep_until(until - time < POLL ? until : time + POLL);
    store_release(&call->running->held_by, 0);
}

static void hold_for(struct call *call, const struct firing *firing)
{
    hold(call, firing, now() + firing->parameter * MILLISECOND);
}

static void crash(struct call *call, const struct firing *firing)
{
    trace_outcome(call, NOT_RETURNED); /* with the flags: somebody may ask whether it was executed */
    kill(getpid(), (int)firing->parameter); /* SIGSTOP comes back, with SIGCONT */
}

/* What comes before the call; false if it must not be executed. What comes after it is put by for finish(). */
static int apply_rules(struct call *call)
{
    struct control *control = call->control;
    for (uint32_t left = load_acquire(&control->active), bit; left; left &= ~bit) {
        unsigned place = oldest(control, left);
        struct rule *rule = &control->rules[place];
        bit = 1U << place;
        struct firing firing = {rule, load_relaxed(&rule->parameter), bit, load_relaxed(&rule->id),
                                load_relaxed(&rule->action), load_relaxed(&rule->released)};
        if (!fires(rule, call->function))
            continue;
        if (!(call->flags & FLAG_INJECTED))
            count_one(&control->counters[call->function].injected);
        call->flags |= FLAG_INJECTED;
        switch (firing.action) {
        case ACTION_DELAY:
            hold_for(call, &firing);
            break;
        case ACTION_LATE:
            hold(call, &firing, UINT64_MAX);
            break;
        case ACTION_HANG:
            hold(call, &firing, UINT64_MAX);
            call->rv = firing.parameter;
            return 0;
        case ACTION_ERROR:
            call->rv = firing.parameter;
            return 0;
        case ACTION_CRASH:
            crash(call, &firing);
            break;
        default:
            call->after[call->after_count++] = firing;
        }
    }
    return 1;
}

/* CK_TOKEN_INFO: 96 bytes of text, flags, six numbers of sessions and PIN lengths, then total and free memory, twice. */
static void nearly_full(unsigned char *token_info)
{
    static const CK_ULONG memory[] = {1000000, 10000, 1000000, 10000};
    memcpy(token_info + 96 + 7 * sizeof(CK_ULONG), memory, sizeof memory);
}

static void apply_rules_after(struct call *call, unsigned char *buffer, const CK_ULONG *length)
{
    for (unsigned place = 0; place < call->after_count; place++) {
        const struct firing *firing = &call->after[place];
        switch (firing->action) {
        case ACTION_DELAY_AFTER:
            hold_for(call, firing);
            break;
        case ACTION_HANG_AFTER:
            hold(call, firing, UINT64_MAX);
            break;
        case ACTION_ERROR_AFTER:
            call->rv = firing->parameter;
            break;
        case ACTION_CRASH_AFTER:
            crash(call, firing);
            break;
        case ACTION_CORRUPT:
            if (call->rv == CKR_OK && buffer && length && *length)
                buffer[*length / 2] ^= 1;
            break;
        case ACTION_FULL:
            if (call->rv == CKR_OK && buffer && call->function == FUNCTION_C_GetTokenInfo)
                nearly_full(buffer);
        }
    }
}

/* ---- the service model: a device with so many servers, each call on one of them for its service time
 *
 * A call reserves the server that is free first, from then on for its service time: two numbers and a compare-and-swap
 * in shared memory. So the queue is served in the order of arrival, by all processes, with no hand-over between them,
 * and a process that is killed in the queue leaves nothing behind that could block it: its time passes, as it would on
 * a device that had received the request. A call that used more processor time than its service time makes the server
 * free so much later for those who come next. */

static void wait_in_service(const struct call *call, uint64_t until)
{
    for (uint64_t time = now(); time < until; time = now()) {
        sleep_until(until - time < 10 * POLL ? until : time + 10 * POLL);
        if (current_control(0) != call->control || !load_relaxed(&call->control->concurrency))
            return; /* switched off: nobody goes on waiting */
    }
}

static void enter_service(struct call *call)
{
    uint64_t *free_at = call->control->free_at;
    uint32_t servers = load_relaxed(&call->control->concurrency);
    call->service_ns = load_relaxed(&call->control->service_us[call->function]) * 1000ULL;
    if (!servers || !call->service_ns)
        return;
    uint64_t before, start;
    do {
        unsigned first = 0;
        before = load_relaxed(&free_at[0]);
        for (unsigned place = 1; place < servers && place < SERVERS; place++) {
            uint64_t other = load_relaxed(&free_at[place]);
            if (other < before) {
                before = other;
                first = place;
            }
        }
        call->server = &free_at[first];
        start = now();
        if (start < before)
            start = before;
    } while (!swap_if(call->server, &before, start + call->service_ns));
    call->service_end = start + call->service_ns;
    wait_in_service(call, start);
    call->cpu_before = clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

static void leave_service(struct call *call)
{
    uint64_t used = clock_ns(CLOCK_THREAD_CPUTIME_ID) - call->cpu_before;
    if (used > call->service_ns)
        __atomic_fetch_add(call->server, used - call->service_ns, __ATOMIC_RELAXED);
    wait_in_service(call, call->service_end);
}

/* ---- the wrappers */

static function real[COUNT_3_2]; /* NULL: the real module does not have it */

static int begin(struct call *call, unsigned number, const void *buffer, const CK_ULONG *length)
{
    int query = length && !buffer;
    if (number == FUNCTION_C_Initialize) {
        pthread_mutex_lock(&setting_up);
        take_control_path();
        pthread_mutex_unlock(&setting_up);
    }
    call->function = number;
    call->flags = query ? FLAG_QUERY : 0;
    call->after_count = 0;
    call->server = NULL;
    call->control = current_control(number == FUNCTION_C_Initialize || number == FUNCTION_C_OpenSession);
    if (call->control) {
        struct counters *counters = &call->control->counters[number];
        count_one(query ? &counters->queries : &counters->calls);
        enter_trace(call);
        enter_running(call);
        if (!query && !apply_rules(call))
            return 0;
    }
    if (!real[number]) {
        call->rv = CKR_FUNCTION_NOT_SUPPORTED;
        return 0;
    }
    if (call->control) {
        if (!query) {
            enter_service(call);
            count_one(&call->control->counters[number].executed);
        }
        call->flags |= FLAG_EXECUTED;
    }
    return 1;
}

static CK_RV finish(struct call *call, void *buffer, const CK_ULONG *length)
{
    if (call->control) {
        if (call->server)
            leave_service(call);
        apply_rules_after(call, buffer, length);
        if (call->rv != CKR_OK)
            count_one(&call->control->counters[call->function].failed);
        trace_outcome(call, call->rv);
        store_release(&call->running->owner, 0);
    }
    return call->rv;
}

#define PARAMETERS_1(A) A a1
#define PARAMETERS_2(A, B) PARAMETERS_1(A), B a2
#define PARAMETERS_3(A, B, C) PARAMETERS_2(A, B), C a3
#define PARAMETERS_4(A, B, C, D) PARAMETERS_3(A, B, C), D a4
#define PARAMETERS_5(A, B, C, D, E) PARAMETERS_4(A, B, C, D), E a5
#define PARAMETERS_6(A, B, C, D, E, F) PARAMETERS_5(A, B, C, D, E), F a6
#define PARAMETERS_7(A, B, C, D, E, F, G) PARAMETERS_6(A, B, C, D, E, F), G a7
#define PARAMETERS_8(A, B, C, D, E, F, G, H) PARAMETERS_7(A, B, C, D, E, F, G), H a8
#define PARAMETERS_9(A, B, C, D, E, F, G, H, I) PARAMETERS_8(A, B, C, D, E, F, G, H), I a9
#define PARAMETERS_10(A, B, C, D, E, F, G, H, I, J) PARAMETERS_9(A, B, C, D, E, F, G, H, I), J a10
#define ARGUMENTS_1 a1
#define ARGUMENTS_2 ARGUMENTS_1, a2
#define ARGUMENTS_3 ARGUMENTS_2, a3
#define ARGUMENTS_4 ARGUMENTS_3, a4
#define ARGUMENTS_5 ARGUMENTS_4, a5
#define ARGUMENTS_6 ARGUMENTS_5, a6
#define ARGUMENTS_7 ARGUMENTS_6, a7
#define ARGUMENTS_8 ARGUMENTS_7, a8
#define ARGUMENTS_9 ARGUMENTS_8, a9
#define ARGUMENTS_10 ARGUMENTS_9, a10

#define WRAPPER(name, count, types, buffer, length)                                    \
    static CK_RV wrap_##name(PARAMETERS_##count types)                                 \
    {                                                                                  \
        struct call call;                                                              \
        if (begin(&call, FUNCTION_##name, buffer, length))                             \
            call.rv = ((CK_RV(*) types)real[FUNCTION_##name])(ARGUMENTS_##count);      \
        return finish(&call, buffer, length);                                          \
    }
#define NO_WRAPPER(name)
FUNCTIONS_2_40(WRAPPER, NO_WRAPPER)
FUNCTIONS_3_0(WRAPPER, NO_WRAPPER)
FUNCTIONS_3_2(WRAPPER, NO_WRAPPER)

/* ---- loading the real module, and the lists of functions that the application gets */

struct function_list {
    unsigned char major, minor;
    function functions[COUNT_3_2]; /* as many as the version has */
};

struct interface {
    char *name;
    void *functions;
    CK_ULONG flags;
};

#define EXPORTED __attribute__((visibility("default")))
EXPORTED extern const char hagroup_interposer[]; /* by which one interposer knows another */
const char hagroup_interposer[] = "1";
EXPORTED CK_RV C_GetFunctionList(struct function_list **list);
EXPORTED CK_RV C_GetInterfaceList(struct interface *interfaces, CK_ULONG *count);
EXPORTED CK_RV C_GetInterface(char *name, unsigned char *version, struct interface **found, CK_ULONG flags);

#define WRAPPED(name, ...) (function)wrap_##name,
#define ITSELF(name) (function)name,
static const function wrappers[COUNT_3_2] = {FUNCTIONS_2_40(WRAPPED, ITSELF) FUNCTIONS_3_0(WRAPPED, ITSELF)
                                                 FUNCTIONS_3_2(WRAPPED, ITSELF)};

static char real_path[4096]; /* empty: not loaded yet */
static CK_RV (*real_get_interface_list)(struct interface *, CK_ULONG *);
static CK_RV (*real_get_interface)(char *, unsigned char *, struct interface **, CK_ULONG);
static struct function_list lists[3]; /* 2.x, 3.0 and 3.1, 3.2 */
static struct interface interfaces[3];

static CK_RV complain(const char *what, const char *about)
{
    fprintf(stderr, "hagroup-interposer: %s%s\n", what, about);
    return CKR_GENERAL_ERROR;
}

static int copy_file(const char *path, int target)
{
    char buffer[65536];
    ssize_t length = -1;
    int source = open(path, O_RDONLY | O_CLOEXEC);
    while (source >= 0 && (length = read(source, buffer, sizeof buffer)) > 0)
        if (write(target, buffer, (size_t)length) != length) {
            length = -1;
            break;
        }
    if (source >= 0)
        close(source);
    return length == 0;
}

/* A library is loaded once per file and process: a private copy keeps two members on one file apart. */
static void *open_copy(const char *path)
{
    /* where programs may be mapped from differs: /tmp is often mounted noexec, /dev/shm sometimes */
    const char *folders[] = {getenv("TMPDIR"), "/tmp", "/dev/shm"};
    void *library = NULL;
    for (unsigned place = 0; place < sizeof folders / sizeof *folders && !library; place++) {
        char copy[4096];
        if (!folders[place] || !folders[place][0])
            continue;
        snprintf(copy, sizeof copy, "%s/hagroup-interposed-XXXXXX", folders[place]);
        int descriptor = mkostemp(copy, O_CLOEXEC);
        if (descriptor < 0)
            continue;
        if (copy_file(path, descriptor))
            library = dlopen(copy, RTLD_NOW | RTLD_LOCAL);
        close(descriptor);
        unlink(copy);
    }
    return library;
}

/* Fills the list of one version, and takes from the real list what is not known yet. */
static struct function_list *wrapped_list(const struct function_list *from)
{
    unsigned which = from->major < 3 ? 0 : from->minor < 2 ? 1 : 2;
    unsigned count = which == 0 ? COUNT_2_40 : which == 1 ? COUNT_3_0 : COUNT_3_2;
    struct function_list *list = &lists[which];
    list->major = from->major;
    list->minor = from->minor;
    memcpy(list->functions, wrappers, count * sizeof *wrappers);
    for (unsigned number = 0; number < count; number++)
        if (!real[number])
            real[number] = from->functions[number];
    return list;
}

static CK_RV load_real(void)
{
    const char *path = getenv("HAGROUP_FAULT_MODULE");
    const char *copy = getenv("HAGROUP_FAULT_COPY");
    if (real_path[0]) {
        if (path && strcmp(path, real_path))
            return complain("this copy already wraps another module; load a copy of the interposer's file for ", path);
        return CKR_OK;
    }
    if (!path || !path[0])
        return complain("set HAGROUP_FAULT_MODULE to the path of the real PKCS#11 module", "");
    if (strlen(path) >= sizeof real_path)
        return complain("this path is too long: ", path);
    if (access(path, R_OK))
        return complain("HAGROUP_FAULT_MODULE cannot be read: ", path);
    void *library = copy && !strcmp(copy, "0") ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : open_copy(path);
    if (!library) {
        const char *problem = dlerror();
        return complain("the real module cannot be loaded: ", problem ? problem : "no folder for a copy of its file");
    }
    if (dlsym(library, "hagroup_interposer"))
        return complain("HAGROUP_FAULT_MODULE names the interposer itself: ", path);
    CK_RV (*get_function_list)(struct function_list **) = NULL;
    struct function_list *list = NULL;
    *(void **)&get_function_list = dlsym(library, "C_GetFunctionList");
    if (!get_function_list || get_function_list(&list) != CKR_OK || !list)
        return complain("no C_GetFunctionList that works in ", path);
    interfaces[0] = (struct interface){"PKCS 11", wrapped_list(list), 0};
    *(void **)&real_get_interface_list = dlsym(library, "C_GetInterfaceList");
    *(void **)&real_get_interface = dlsym(library, "C_GetInterface");
    strcpy(real_path, path);
    return CKR_OK;
}

static CK_RV load(void)
{
    pthread_mutex_lock(&setting_up);
    CK_RV rv = load_real();
    if (rv == CKR_OK) {
        take_control_path();
        look_for_control();
    }
    pthread_mutex_unlock(&setting_up);
    return rv;
}

/* "PKCS 11" of a version whose functions are known, wrapped; any other interface as the real module gives it. */
static struct interface *wrapped_interface(struct interface *from)
{
    const struct function_list *list = from->functions;
    if (!list || !from->name || strcmp(from->name, "PKCS 11") || list->major < 2 || list->major > 3)
        return from;
    unsigned which = list->major < 3 ? 0 : list->minor < 2 ? 1 : 2;
    pthread_mutex_lock(&setting_up);
    interfaces[which] = (struct interface){from->name, wrapped_list(list), from->flags};
    pthread_mutex_unlock(&setting_up);
    return &interfaces[which];
}

CK_RV C_GetFunctionList(struct function_list **list)
{
    if (!list)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = load();
    if (rv == CKR_OK)
        *list = &lists[0];
    return rv;
}

/* A module of version 2.x gets the two functions of 3.0 here, with its one interface. */
CK_RV C_GetInterfaceList(struct interface *found, CK_ULONG *count)
{
    if (!count)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = load();
    if (rv != CKR_OK)
        return rv;
    if (real_get_interface_list) {
        rv = real_get_interface_list(found, count);
        for (CK_ULONG place = 0; rv == CKR_OK && found && place < *count; place++)
            found[place] = *wrapped_interface(&found[place]);
        return rv;
    }
    if (found && *count < 1)
        rv = CKR_BUFFER_TOO_SMALL;
    else if (found)
        found[0] = interfaces[0];
    *count = 1;
    return rv;
}

CK_RV C_GetInterface(char *name, unsigned char *version, struct interface **found, CK_ULONG flags)
{
    if (!found)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = load();
    if (rv != CKR_OK)
        return rv;
    if (real_get_interface) {
        rv = real_get_interface(name, version, found, flags);
        if (rv == CKR_OK && *found)
            *found = wrapped_interface(*found);
        return rv;
    }
    if ((name && strcmp(name, "PKCS 11")) || flags ||
        (version && (version[0] != lists[0].major || version[1] != lists[0].minor)))
        return CKR_FUNCTION_FAILED;
    *found = &interfaces[0];
    return CKR_OK;
}
