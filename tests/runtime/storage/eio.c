/* Preloaded into a process: once the file EDGEKV_EIO exists, every read of the files whose path holds EDGEKV_EIO_FILES fails with
   EIO, as a dying medium does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
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

/* A plain read is also how weights are loaded: only these files die. */
static int is_dying_file(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, getenv("EDGEKV_EIO_FILES")) != NULL;
}

#define READ_ONE(name, offset)                                       \
  ssize_t name(int fd, void *into, size_t count, offset at) {        \
    static __typeof__(name) *next;                                   \
    if (!next) next = dlsym(RTLD_NEXT, #name);                       \
    if (dying() && is_dying_file(fd)) return errno = EIO, -1;         \
    return next(fd, into, count, at);                                \
  }
READ_ONE(pread, off_t)
READ_ONE(pread64, off64_t)

/* What is read through io_uring passes no function that could fail here: as on a system that forbids it, there is none. */
long syscall(long number, ...) {
  static __typeof__(syscall) *next;
  long args[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; ++i) args[i] = va_arg(list, long);
  va_end(list);
#ifdef SYS_io_uring_setup
  if (number == SYS_io_uring_setup) return errno = EPERM, -1;
#endif
  if (!next) next = dlsym(RTLD_NEXT, "syscall");
  return next(number, args[0], args[1], args[2], args[3], args[4], args[5]);
}
