/* Preloaded into a process: once the file EDGEKV_EIO exists, every vectored read at an offset fails with EIO, as a dying medium does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int dying(void) {
  const char *sign = getenv("EDGEKV_EIO");
  return sign && access(sign, F_OK) == 0;
}

#define READ(name, offset, more, args)                               \
  ssize_t name(int fd, const struct iovec *parts, int count, offset more) { \
    static __typeof__(name) *next;                                   \
    if (!next) next = dlsym(RTLD_NEXT, #name);                       \
    if (dying()) return errno = EIO, -1;                             \
    return next args;                                                \
  }
#define FLAGS , int flags
#define NONE
READ(preadv, off_t at, NONE, (fd, parts, count, at))
READ(preadv64, off64_t at, NONE, (fd, parts, count, at))
READ(preadv2, off_t at, FLAGS, (fd, parts, count, at, flags))
READ(preadv64v2, off64_t at, FLAGS, (fd, parts, count, at, flags))
