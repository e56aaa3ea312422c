#include "record.h"

#include <string.h>

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

/* Tensors are never freed, because simulations are short. All lie between `lowest` and `highest`. */
static uintptr_t lowest = UINTPTR_MAX, highest;

static void *allocate(size_t size) {
  void *pointer = calloc(1, size);
  uintptr_t address = (uintptr_t)pointer;
  if (address < lowest) lowest = address;
  if (address > highest) highest = address;
  return pointer;
}

struct tensor *new_tensor(int type, uint64_t rank, const int64_t *dims) {
  struct tensor *tensor = allocate(sizeof *tensor);
  tensor->magic = TENSOR_MAGIC;
  tensor->type = type;
  tensor->rank = rank > MAX_RANK ? MAX_RANK : (int)rank;
  memcpy(tensor->dims, dims, sizeof *dims * tensor->rank);
  return tensor;
}

void *aclCreateTensorList(struct tensor *const *items, uint64_t count) {
  struct list *list = allocate(sizeof *list);
  list->magic = LIST_MAGIC;
  list->count = count > MAX_ITEMS ? MAX_ITEMS : count;
  memcpy(list->items, items, sizeof *items * list->count);
  return list;
}

int is_tensor(const void *pointer) {
  uintptr_t address = (uintptr_t)pointer;
  return address >= lowest && address <= highest && address % 8 == 0;
}

/* Writes a line of the caller's. */
void record_mark(const char *text) {
  FILE *file = record_file();
  if (file) fprintf(file, "%s\n", text);
}
