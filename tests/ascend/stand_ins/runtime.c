/* CANN's runtime: memory that the system provides when it is touched, streams and events that are always done. */
#include <string.h>
#include <sys/mman.h>

#include "record.h"

#define GB ((size_t)1 << 30)

static char room[1 << 16];

static void *reserve(size_t size) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *pointer = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  return pointer == MAP_FAILED ? NULL : pointer;
}

/* ---- the device and its memory ---- */

int aclrtGetDeviceCount(unsigned *count) { *count = 8; return 0; }
int aclrtGetDevice(int *device) { *device = 0; return 0; }
int aclrtGetRunMode(int *mode) { *mode = 1; return 0; }
int aclrtDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return 0; }

int aclrtGetMemInfo(int kind, size_t *free_size, size_t *total) {
  const char *size = getenv("ASCEND_GB"); /* 64 GB, as an Ascend 910B3 has */
  *free_size = *total = (size ? strtoul(size, NULL, 10) : 64) * GB;
  return 0;
}

int aclrtMalloc(void **pointer, size_t size, int policy) {
  *pointer = reserve(size);
  return *pointer ? 0 : 207001; /* ACL_ERROR_RT_MEMORY_ALLOCATION */
}

int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }
int aclrtMallocHost(void **pointer, size_t size) { *pointer = malloc(size); return 0; }
int aclrtFreeHost(void *pointer) { free(pointer); return 0; }
int aclrtMallocPhysical(void **handle, size_t size, const void *properties, uint64_t flags) { *handle = room; return 0; }

int aclrtReserveMemAddress(void **pointer, size_t size, size_t alignment, void *expected, uint64_t flags) {
  *pointer = reserve(size);
  return 0;
}

/* ---- copies: counted by kind (1 host to device, 2 device to host, 3 device to device) ---- */

static uint64_t copied[4];

uint64_t copied_bytes(int kind) { return copied[kind & 3]; }

static int copy(void *to, const void *from, size_t size, int kind) {
  FILE *file = record_file();
  __atomic_fetch_add(&copied[kind & 3], size, __ATOMIC_RELAXED);
  if (file) fprintf(file, "copy%d u8[%zu]\n", kind, size);
  memcpy(to, from, size);
  return 0;
}

int aclrtMemcpy(void *to, size_t room_there, const void *from, size_t size, int kind) {
  return copy(to, from, size, kind);
}

int aclrtMemcpyAsync(void *to, size_t room_there, const void *from, size_t size, int kind, void *stream) {
  return copy(to, from, size, kind);
}

int aclrtMemset(void *to, size_t room_there, int value, size_t size) { memset(to, value, size); return 0; }

int aclrtMemsetAsync(void *to, size_t room_there, int value, size_t size, void *stream) {
  memset(to, value, size);
  return 0;
}

/* ---- contexts, streams, events ---- */

int aclrtCreateContext(void **context, int device) { *context = room; return 0; }
int aclrtGetCurrentContext(void **context) { *context = room; return 0; }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flags) { *stream = malloc(8); return 0; }
int aclrtStreamQuery(void *stream, int *status) { *status = 1; return 0; }
int aclrtCreateEvent(void **event) { *event = malloc(8); return 0; }
int aclrtCreateEventWithFlag(void **event, unsigned flags) { *event = malloc(8); return 0; }
int aclrtCreateEventExWithFlag(void **event, unsigned flags) { *event = malloc(8); return 0; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }
int aclrtEventElapsedTime(float *milliseconds, void *begin, void *end) { *milliseconds = 0; return 0; }
