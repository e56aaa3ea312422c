/* Operators: they compute nothing, and write down their name, and the dtypes and shapes of their tensors.
 *
 * aclnn operators come in pairs: aclnnXGetWorkspaceSize(inputs and outputs ..., uint64_t *size, executor **) and
 * aclnnX(workspace, size, executor, stream). build_stand_ins.py makes every first function jump to `prepare_aclnn` and every
 * second one to `launch_aclnn`, with the operator's name. MindSpore may launch an executor many times. Older operators
 * go through aclopCompileAndExecute.
 */
#include <string.h>

#include "record.h"

/* What aclnnXGetWorkspaceSize makes: the line to be written at every launch. */
#define EXECUTOR_MAGIC 0x5ec0e7ce5ec0e7ceULL
struct executor {
  uint64_t magic;
  char line[];
};

void *aclCreateTensor(const int64_t *dims, uint64_t rank, int type) { return new_tensor(type, rank, dims); }

static int append_argument(char *text, int end, uint64_t argument) {
  const void *pointer = (const void *)argument;
  if (!is_kept(pointer)) return end;
  if (*(const uint64_t *)pointer == TENSOR_MAGIC) return append_tensor(text, end, pointer);
  if (*(const uint64_t *)pointer != LIST_MAGIC) return end;
  const struct list *list = pointer;
  end += snprintf(text + end, LINE - end, " (");
  for (uint64_t i = 0; i < list->count && end < LINE - 300; i++) end = append_tensor(text, end, list->items[i]);
  return end + snprintf(text + end, LINE - end, ")");
}

/* Whether `argument` points to a zero in a frame of the caller. */
static int points_to_local_zero(uint64_t argument, const uint64_t *stack) {
  return argument % 8 == 0 && argument > (uint64_t)stack && argument < (uint64_t)(stack + (1 << 17)) &&
         *(uint64_t *)argument == 0;
}

/* `registers` holds the first six arguments, `stack` the others. How many there are differs by operator; the last two
 * are the only neighbours that both point to zeros of the caller: the workspace's size, and the executor to be set. */
void prepare_aclnn(const char *name, const uint64_t *registers, const uint64_t *stack) {
  char text[LINE + 64];
  int end = snprintf(text, 256, "%s", name);
  for (int i = 0; i < 26; i++) end = append_argument(text, end, i < 6 ? registers[i] : stack[i - 6]);
  struct executor *executor = keep(sizeof *executor + end + 1);
  executor->magic = EXECUTOR_MAGIC;
  memcpy(executor->line, text, end + 1);
  uint64_t previous = 0;
  for (int i = 0; i < 46; i++) {
    uint64_t argument = i < 6 ? registers[i] : stack[i - 6];
    if (previous != argument && points_to_local_zero(previous, stack) && points_to_local_zero(argument, stack)) {
      *(struct executor **)argument = executor;
      return;
    }
    previous = argument;
  }
}

int launch_aclnn(void *workspace, uint64_t size, const struct executor *executor, void *stream, const char *name) {
  FILE *file = record_file();
  int known = is_kept(executor) && executor->magic == EXECUTOR_MAGIC;
  if (file) fprintf(file, "%s\n", known ? executor->line : name);
  return 0;
}

void *aclCreateTensorDesc(int type, int rank, const int64_t *dims, int format) { return new_tensor(type, rank, dims); }

int aclopCompileAndExecuteV2(const char *name, int inputs, void **input, void **input_data, int outputs, void **output,
                             void **output_data, void *attributes, int engine, int flag, const char *path,
                             void *stream) {
  FILE *file = record_file();
  if (!file) return 0;
  char text[LINE + 64];
  int end = snprintf(text, 256, "aclop%s", name);
  for (int i = 0; i < inputs; i++) end = append_argument(text, end, (uint64_t)input[i]);
  for (int i = 0; i < outputs; i++) end = append_argument(text, end, (uint64_t)output[i]);
  fprintf(file, "%s\n", text);
  return 0;
}

int aclopCompileAndExecute(const char *name, int inputs, void **input, void **input_data, int outputs, void **output,
                           void **output_data, void *attributes, int engine, int flag, const char *path,
                           void *stream) {
  return aclopCompileAndExecuteV2(name, inputs, input, input_data, outputs, output, output_data, attributes, engine,
                                  flag, path, stream);
}
