/* Preloaded into a process: logs every change to files below EDGEKV_LOG_ROOT, and every sync, in order.
 * Record: op (1 byte), lengths of path, second path and data (3 x uint32), offset (int64), then path, second path, data. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int out = -1;
static const char *root;

__attribute__((constructor)) static void start(void) {
  root = getenv("EDGEKV_LOG_ROOT");
  const char *path = getenv("EDGEKV_LOG");
  if (root && path) out = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int inside(const char *path) { return out >= 0 && path && strncmp(path, root, strlen(root)) == 0; }

static const char *path_of(int fd, char *buffer, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, size - 1);
  if (n < 0) return NULL;
  buffer[n] = 0;
  char *gone = strstr(buffer, " (deleted)");
  return gone || !inside(buffer) ? NULL : buffer;
}

static void note(char op, const char *path, const char *second, int64_t offset, const void *data, uint32_t size) {
  uint32_t lengths[3] = {(uint32_t)strlen(path), second ? (uint32_t)strlen(second) : 0, data ? size : 0};
  struct iovec parts[6] = {{&op, 1}, {lengths, sizeof lengths}, {&offset, 8}, {(void *)path, lengths[0]},
                           {(void *)second, lengths[1]}, {(void *)data, lengths[2]}};
  pthread_mutex_lock(&lock);
  syscall(SYS_writev, out, parts, 6);
  pthread_mutex_unlock(&lock);
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define WITH_PATH(fd, action) do { char b[4096]; const char *path = path_of(fd, b, sizeof b); if (path) action; } while (0)

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  NEXT(pwrite);
  ssize_t n = next(fd, data, size, offset);
  if (n > 0) WITH_PATH(fd, note('w', path, NULL, offset, data, (uint32_t)n));
  return n;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  NEXT(pwrite64);
  ssize_t n = next(fd, data, size, offset);
  if (n > 0) WITH_PATH(fd, note('w', path, NULL, offset, data, (uint32_t)n));
  return n;
}
ssize_t write(int fd, const void *data, size_t size) {
  NEXT(write);
  off_t at = lseek(fd, 0, SEEK_CUR);
  ssize_t n = next(fd, data, size);
  if (n > 0 && at >= 0) WITH_PATH(fd, note('w', path, NULL, at, data, (uint32_t)n));
  return n;
}
int ftruncate(int fd, off_t size) {
  NEXT(ftruncate);
  int r = next(fd, size);
  if (!r) WITH_PATH(fd, note('t', path, NULL, size, NULL, 0));
  return r;
}
int ftruncate64(int fd, off64_t size) {
  NEXT(ftruncate64);
  int r = next(fd, size);
  if (!r) WITH_PATH(fd, note('t', path, NULL, size, NULL, 0));
  return r;
}
int fsync(int fd) {
  NEXT(fsync);
  int r = next(fd);
  if (!r) WITH_PATH(fd, note('s', path, NULL, 0, NULL, 0));
  return r;
}
int fdatasync(int fd) {
  NEXT(fdatasync);
  int r = next(fd);
  if (!r) WITH_PATH(fd, note('s', path, NULL, 0, NULL, 0));
  return r;
}
int unlink(const char *path) {
  NEXT(unlink);
  int r = next(path);
  if (!r && inside(path)) note('u', path, NULL, 0, NULL, 0);
  return r;
}
int rename(const char *from, const char *to) {
  NEXT(rename);
  int r = next(from, to);
  if (!r && inside(from)) note('r', from, to, 0, NULL, 0);
  return r;
}
