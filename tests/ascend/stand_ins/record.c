#include "record.h"

#include <string.h>
#include <sys/mman.h>

/* aclDataType, by its numbers. */
static const char *const TYPES[] = {
    [0] = "f32", [1] = "f16", [2] = "i8",  [3] = "i32", [4] = "u8",   [6] = "i16",
    [7] = "u16", [8] = "u32", [9] = "i64", [10] = "u64", [11] = "f64", [12] = "bool",
    [16] = "c64", [17] = "c128", [27] = "bf16",
};
enum { TYPE_COUNT = sizeof TYPES / sizeof *TYPES };

FILE *record_file(void) {
  static FILE *file;
  static int opened;
  if (!opened) {
    opened = 1;
    const char *path = getenv("ASCEND_RECORD");
    if (path) file = fopen(path, "a");
    if (file) setvbuf(file, NULL, _IOLBF, 1 << 14);
  }
  return file;
}

int append_tensor(char *text, int end, const struct tensor *tensor) {
  const char *type = tensor->type >= 0 && tensor->type < TYPE_COUNT ? TYPES[tensor->type] : NULL;
  end += snprintf(text + end, LINE - end, " %s[", type ? type : "?");
  for (int i = 0; i < tensor->rank && end < LINE - 32; i++)
    end += snprintf(text + end, LINE - end, i ? ",%ld" : "%ld", (long)tensor->dims[i]);
  if (end < LINE - 2) end += snprintf(text + end, LINE - end, "]");
  return end;
}

/* Nothing is freed, because simulations are short. One reservation holds all of it, so that any address within the part
 * in use can be read: the arguments of operators are looked at without knowing what they are. */
static char *pool;
static uint64_t used;
enum { ALIGNMENT = 16 };
#define POOL_SIZE ((size_t)256 << 30)

__attribute__((constructor)) static void reserve_pool(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  pool = mmap(NULL, POOL_SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (pool == MAP_FAILED) abort();
}

void *keep(size_t size) {
  uint64_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return pool + __atomic_fetch_add(&used, rounded, __ATOMIC_RELAXED);
}

int is_kept(const void *pointer) {
  uintptr_t address = (uintptr_t)pointer, start = (uintptr_t)pool;
  return address >= start && address < start + used && address % ALIGNMENT == 0;
}

struct tensor *new_tensor(int type, uint64_t rank, const int64_t *dims) {
  struct tensor *tensor = keep(sizeof *tensor);
  tensor->magic = TENSOR_MAGIC;
  tensor->type = type;
  tensor->rank = rank > MAX_RANK ? MAX_RANK : (int)rank;
  memcpy(tensor->dims, dims, sizeof *dims * tensor->rank);
  return tensor;
}

void *aclCreateTensorList(struct tensor *const *items, uint64_t count) {
  struct list *list = keep(sizeof *list);
  list->magic = LIST_MAGIC;
  list->count = count > MAX_ITEMS ? MAX_ITEMS : count;
  memcpy(list->items, items, sizeof *items * list->count);
  return list;
}

/* Writes a line of the caller's. */
void record_mark(const char *text) {
  FILE *file = record_file();
  if (file) fprintf(file, "%s\n", text);
}
