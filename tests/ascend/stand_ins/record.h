/* What the stand-ins write down: one line per event in the file that ASCEND_RECORD names, or nothing without it. */
#ifndef RECORD_H
#define RECORD_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { LINE = 4096 };

/* A tensor or a list of tensors that MindSpore hands to an operator. `magic` tells them from other pointers. */
#define TENSOR_MAGIC 0x7e4507a11ce5e11dULL
#define LIST_MAGIC (~TENSOR_MAGIC)
enum { MAX_RANK = 8, MAX_ITEMS = 512 };
struct tensor {
  uint64_t magic;
  int type, rank;
  int64_t dims[MAX_RANK];
};
struct list {
  uint64_t magic, count;
  struct tensor *items[MAX_ITEMS];
};

/* The file of events, or NULL. */
FILE *record_file(void);
/* Appends " f32[2,3]" to `text` at `end` and returns the new end. */
int append_tensor(char *text, int end, const struct tensor *tensor);
struct tensor *new_tensor(int type, uint64_t rank, const int64_t *dims);
/* Zeros that are never freed, and whether a pointer leads to something that was made by `keep`. */
void *keep(size_t size);
int is_kept(const void *pointer);
#endif
