/* Preloaded into a member's worker: kills it inside a write of SoftHSM's to the token's folder.
 *
 * SoftHSM writes objects with stdio; Python does not. Each write, truncation and removal of a file counts. The control
 * file (HAGROUP_KILLPOINT) holds two 64-bit numbers: how many there were, and at which one to die (0: at none). What was
 * written before is on the disk by then, as it is when the kernel ends a process between two system calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct control {
    uint64_t count, die_at;
};

static struct control *control;

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("HAGROUP_KILLPOINT");
    int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    control = mapped == MAP_FAILED ? NULL : mapped;
}

static void point(FILE *stream)
{
    if (control == NULL)
        return;
    uint64_t count = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (__atomic_compare_exchange_n(&control->die_at, &count, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        if (stream != NULL)
            fflush(stream);
        kill(getpid(), SIGKILL);
    }
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *stream)
{
    static size_t (*real)(const void *, size_t, size_t, FILE *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "fwrite");
    size_t written = real(data, size, number, stream);
    point(stream);
    return written;
}

int ftruncate(int fd, off_t length)
{
    static int (*real)(int, off_t);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "ftruncate");
    int result = real(fd, length);
    point(NULL);
    return result;
}

int remove(const char *path)
{
    static int (*real)(const char *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "remove");
    int result = real(path);
    point(NULL);
    return result;
}
