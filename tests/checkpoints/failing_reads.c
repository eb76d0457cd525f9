/* LD_PRELOAD: reads of files fail while a counter lasts.

   FAIL_MATCH: a part of the file's path. FAIL_ERRNO: what errno becomes.
   FAIL_COUNT: a file with the number of reads that still fail; it is counted down. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static __thread int inside;

static int fails(int fd) {
  const char *match = getenv("FAIL_MATCH"), *counter = getenv("FAIL_COUNT");
  if (inside || !match || !counter) return 0;
  inside = 1;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  int failing = 0;
  if (length > 0 && (path[length] = 0, strstr(path, match))) {
    FILE *file = fopen(counter, "r+");
    long left = 0;
    if (file && fscanf(file, "%ld", &left) == 1 && left > 0) {
      rewind(file);
      fprintf(file, "%-12ld", left - 1);
      failing = 1;
    }
    if (file) fclose(file);
  }
  inside = 0;
  if (failing) errno = atoi(getenv("FAIL_ERRNO"));
  return failing;
}

#define WRAP(name, declaration, ...)                                  \
  ssize_t name declaration {                                          \
    static ssize_t(*real) declaration;                                \
    if (!real) real = dlsym(RTLD_NEXT, #name);                        \
    return fails(fd) ? -1 : real(__VA_ARGS__);                        \
  }

WRAP(read, (int fd, void *x, size_t n), fd, x, n)
WRAP(pread, (int fd, void *x, size_t n, off_t at), fd, x, n, at)
WRAP(pread64, (int fd, void *x, size_t n, off64_t at), fd, x, n, at)
WRAP(readv, (int fd, const struct iovec *x, int n), fd, x, n)
WRAP(preadv, (int fd, const struct iovec *x, int n, off_t at), fd, x, n, at)
WRAP(preadv64, (int fd, const struct iovec *x, int n, off64_t at), fd, x, n, at)
