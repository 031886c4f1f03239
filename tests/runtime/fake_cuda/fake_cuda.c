/* A stand-in for NVIDIA's driver (libcuda.so.1) and runtime (libcudart.so.13): what TVM's CUDA runtime and llmc call.

   - Device memory is host memory that cannot be touched except while an operation of a stream runs: code of the host
     that dereferences a device pointer dies, as it would with a GPU.
   - Operations of a stream run as late as they may, when something waits for the stream. A missing wait shows as old
     data; a host buffer that is changed while a copy from it is under way shows as wrong data.
   - Kernels are handed to a callback, with their arguments as they were at the launch.
   - While a stream is being captured, allocating, freeing and waiting fail, as they do in CUDA's global capture mode.

   Compiled twice: with -DDRIVER to libcuda.so.1, which holds all state, and without to libcudart.so.13. */

#include <stddef.h>
#include <stdint.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_BINARY = 209, UNSUPPORTED_PTX = 222,
       NOT_FOUND = 500, LAUNCH_FAILED = 719,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_IMPLICIT = 906 };
enum { TO_DEVICE = 1, TO_HOST = 2 };

/* order of fake_counts; tests/runtime/fake_cuda/device.py has the names */
enum { ALLOCATIONS, LAUNCHES, GRAPH_LAUNCHES, CAPTURES, WAITS, COPIES_IN, COPIES_OUT, BYTES_OUT, KERNELS, PAGEABLE, COUNTS };

typedef struct Stream Stream;
typedef struct Graph Graph;

int fake_malloc(void **at, size_t size);
int fake_free(void *at);
int fake_malloc_host(void **at, size_t size);
int fake_free_host(void *at);
int fake_memory(size_t *free_bytes, size_t *total);
int fake_copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, int kind,
              Stream *stream);
int fake_stream(Stream **stream, int blocking);
int fake_end_stream(Stream *stream);
int fake_wait(Stream *stream);
int fake_wait_all(void);
int fake_after(Stream *stream, Stream *other);
int fake_begin(Stream *stream);
int fake_end(Stream *stream, Graph **graph);
int fake_replay(Graph *graph, Stream *stream);
int fake_attribute(int *value, int number);
int fake_device_count(int *count);
const char *fake_error(int status);

#ifdef DRIVER
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int (*LoadCallback)(const void *image);
typedef int (*FindCallback)(const char *name, int *sizes); /* kernel number or -1; sizes of its arguments, 0 behind them */
typedef int (*LaunchCallback)(int kernel, const unsigned *dims, const void *arguments);

enum { LAUNCH, COPY, REPLAY, AFTER };
enum { MOST_ARGUMENTS = 128, MOST_BLOCKS = 1 << 14 };

typedef struct Op {
  struct Op *next;
  int kind, kernel;
  unsigned dims[7];
  void *arguments; /* 8 bytes each */
  void *to;
  const void *from;
  size_t to_pitch, from_pitch, width, rows;
  Graph *graph;
  Stream *other;
} Op;

struct Graph { Op *first, *last; };
struct Stream { Op *first, *last; Graph *capture; int blocking, invalid; Stream *next; };
typedef struct Kernel { int number; int sizes[MOST_ARGUMENTS]; } Kernel;
typedef struct Block { char *at; size_t size; } Block;

long fake_counts[COUNTS];
static LoadCallback on_load;
static FindCallback on_find;
static LaunchCallback on_launch;
static char *arena;
static size_t capacity, taken;
int fake_arch = 90, fake_driver = 13000, fake_init, fake_load, fake_capture; /* the last three: errors to give */
int fake_idle; /* for measuring the host: kernels are counted and not run, memory is not protected */
size_t fake_limit; /* of what may be allocated */
static int sticky;
static Block blocks[MOST_BLOCKS], pinned[MOST_BLOCKS];
static int block_count, pinned_count;
static Stream legacy = {0, 0, 0, 1, 0, 0};
static Stream *streams;

__attribute__((constructor)) static void start(void) {
  fake_limit = capacity = 256u << 20;
  arena = mmap(0, capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void fake_callbacks(LoadCallback load, FindCallback find, LaunchCallback launch) {
  on_load = load, on_find = find, on_launch = launch;
}

/* Base and size of the allocation that holds a device address; 0 = none. */
size_t fake_block(const void *address, void **base) {
  for (int i = 0; i < block_count; i++)
    if ((const char *)address >= blocks[i].at && (const char *)address < blocks[i].at + blocks[i].size) {
      *base = blocks[i].at;
      return blocks[i].size;
    }
  return 0;
}

static int capturing(void) {
  for (Stream *s = streams; s; s = s->next)
    if (s->capture) return 1;
  return 0;
}

/* What a capture forbids invalidates it. */
static int forbidden(void) {
  int found = 0;
  for (Stream *s = streams; s; s = s->next)
    if (s->capture) s->invalid = found = 1;
  return found;
}

static int run(Op *op);

static int opened; /* how many operations have device memory open */

static int is_open; /* for times, protection is left off */

static void open_memory(void) {
  if (!opened++ && !is_open) mprotect(arena, capacity, PROT_READ | PROT_WRITE);
  is_open = fake_idle;
}

static void close_memory(void) {
  if (!--opened && !fake_idle) mprotect(arena, capacity, PROT_NONE);
}

static int flush(Stream *s) {
  if (opened) return sticky; /* Python frees a tensor in the middle of a kernel */
  while (s->first) {
    Op *op = s->first;
    s->first = op->next;
    if (!s->first) s->last = 0;
    int status = run(op);
    if (status && !sticky) sticky = status;
    free(op->arguments);
    free(op);
  }
  return sticky;
}

static int flush_all(int blocking_only) {
  for (Stream *s = streams; s; s = s->next)
    if (s->blocking || !blocking_only) flush(s);
  return sticky;
}

static int run(Op *op) {
  if (op->kind == REPLAY) {
    for (Op *o = op->graph->first; o; o = o->next) {
      int status = run(o);
      if (status) return status;
    }
    return OK;
  }
  if (op->kind == AFTER) return flush(op->other);
  if (op->kind == LAUNCH && fake_idle) {
    fake_counts[KERNELS]++;
    return OK;
  }
  open_memory();
  int status = OK;
  if (op->kind == COPY) {
    for (size_t r = 0; r < op->rows; r++)
      memmove((char *)op->to + r * op->to_pitch, (const char *)op->from + r * op->from_pitch, op->width);
  } else {
    fake_counts[KERNELS]++;
    if (on_launch(op->kernel, op->dims, op->arguments)) status = LAUNCH_FAILED;
  }
  close_memory();
  return status;
}

static int enqueue(Stream *s, Op *op) {
  if (s->capture) {
    Graph *g = s->capture;
    if (g->last) g->last->next = op; else g->first = op;
    g->last = op;
    return OK;
  }
  if (s == &legacy && capturing()) {
    forbidden();
    return CAPTURE_IMPLICIT;
  }
  if (s->last) s->last->next = op; else s->first = op;
  s->last = op;
  if (s == &legacy) { flush_all(1); return flush(s); }
  return OK;
}

static Stream *of(Stream *s) { return s ? s : &legacy; }

int fake_malloc(void **at, size_t size) {
  *at = 0;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  size = size ? (size + 255) / 256 * 256 : 256;
  char *place = arena; /* first fit; the blocks are in order of their addresses */
  int i = 0;
  for (; i < block_count && (size_t)(blocks[i].at - place) < size; i++) place = blocks[i].at + blocks[i].size;
  if (place + size > arena + capacity || taken + size > fake_limit || block_count == MOST_BLOCKS) return OUT_OF_MEMORY;
  memmove(blocks + i + 1, blocks + i, (block_count - i) * sizeof(Block));
  blocks[i].at = place, blocks[i].size = size;
  block_count++, taken += size, fake_counts[ALLOCATIONS]++;
  open_memory();
  memset(place, 0xFF, size); /* NaN, as much as anything */
  close_memory();
  *at = place;
  return OK;
}

int fake_free(void *at) {
  if (!at) return OK;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  flush_all(0);
  for (int i = 0; i < block_count; i++)
    if (blocks[i].at == at) {
      taken -= blocks[i].size;
      memmove(blocks + i, blocks + i + 1, (--block_count - i) * sizeof(Block));
      return OK;
    }
  return INVALID;
}

int fake_malloc_host(void **at, size_t size) {
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  size = (size + 4095) / 4096 * 4096;
  *at = aligned_alloc(4096, size);
  pinned[pinned_count].at = *at, pinned[pinned_count++].size = size;
  return OK;
}

int fake_free_host(void *at) {
  flush_all(0);
  for (int i = 0; i < pinned_count; i++)
    if (pinned[i].at == at) {
      free(at);
      pinned[i] = pinned[--pinned_count];
      return OK;
    }
  return INVALID;
}

static int is_pinned(const void *at) {
  for (int i = 0; i < pinned_count; i++)
    if ((const char *)at >= pinned[i].at && (const char *)at < pinned[i].at + pinned[i].size) return 1;
  return 0;
}

int fake_memory(size_t *free_bytes, size_t *total) {
  *free_bytes = fake_limit > taken ? fake_limit - taken : 0, *total = fake_limit;
  return OK;
}

int fake_copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, int kind,
              Stream *stream) {
  Stream *s = of(stream);
  const void *host = kind == TO_DEVICE ? from : kind == TO_HOST ? to : 0;
  if (host && !is_pinned(host)) { /* the driver goes through a buffer of its own, and waits */
    fake_counts[PAGEABLE]++;
    if (s->capture) { s->invalid = 1; return CAPTURE_UNSUPPORTED; }
  }
  Op *op = calloc(1, sizeof(Op));
  op->kind = COPY, op->to = to, op->from = from, op->to_pitch = to_pitch, op->from_pitch = from_pitch;
  op->width = width, op->rows = rows;
  if (kind == TO_DEVICE) fake_counts[COPIES_IN]++;
  if (kind == TO_HOST) fake_counts[COPIES_OUT]++, fake_counts[BYTES_OUT] += (long)(width * rows);
  int status = enqueue(s, op);
  if (!status && host && !is_pinned(host)) status = flush(s);
  return status;
}

int fake_stream(Stream **stream, int blocking) {
  *stream = calloc(1, sizeof(Stream));
  (*stream)->blocking = blocking, (*stream)->next = streams;
  streams = *stream;
  return OK;
}

int fake_end_stream(Stream *stream) { return flush(of(stream)); }

int fake_wait(Stream *stream) {
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  fake_counts[WAITS]++;
  return flush(of(stream));
}

int fake_wait_all(void) {
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  fake_counts[WAITS]++;
  flush_all(0);
  return flush(&legacy);
}

int fake_after(Stream *stream, Stream *other) {
  Op *op = calloc(1, sizeof(Op));
  op->kind = AFTER, op->other = of(other);
  return enqueue(of(stream), op);
}

int fake_begin(Stream *stream) {
  if (fake_capture) return fake_capture;
  if (!stream) return CAPTURE_UNSUPPORTED;
  stream->capture = calloc(1, sizeof(Graph)), stream->invalid = 0;
  return OK;
}

int fake_end(Stream *stream, Graph **graph) {
  *graph = 0;
  if (!stream || !stream->capture) return INVALID;
  Graph *found = stream->capture;
  stream->capture = 0;
  if (stream->invalid) return CAPTURE_INVALIDATED;
  *graph = found;
  fake_counts[CAPTURES]++;
  return OK;
}

int fake_replay(Graph *graph, Stream *stream) {
  Op *op = calloc(1, sizeof(Op));
  op->kind = REPLAY, op->graph = graph;
  fake_counts[GRAPH_LAUNCHES]++;
  return enqueue(of(stream), op);
}

int fake_device_count(int *count) {
  *count = fake_init ? 0 : 1;
  return fake_init;
}

/* CUdevice_attribute = cudaDeviceAttr in the numbers used here */
int fake_attribute(int *value, int number) {
  switch (number) {
    case 1: case 2: case 3: *value = 1024; break;      /* threads of a block */
    case 5: case 6: case 7: *value = 65535; break;     /* blocks of a grid */
    case 8: *value = 48 << 10; break;                  /* shared memory of a block */
    case 10: *value = 32; break;                       /* threads of a warp */
    case 12: *value = 65536; break;                    /* registers of a block */
    case 13: *value = 1500000; break;                  /* clock */
    case 16: *value = 4; break;                        /* multiprocessors */
    case 75: *value = fake_arch / 10; break;
    case 76: *value = fake_arch % 10; break;
    case 97: *value = 227 << 10; break;                /* shared memory that a block may ask for */
    default: *value = 0;
  }
  return OK;
}

const char *fake_error(int status) {
  switch (status) {
    case OK: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case NO_BINARY: return "no kernel image is available for execution on the device";
    case UNSUPPORTED_PTX: return "the provided PTX was compiled with an unsupported toolchain";
    case NOT_FOUND: return "named symbol not found";
    case LAUNCH_FAILED: return "unspecified launch failure";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_IMPLICIT: return "dependency created on uncaptured work in another stream";
    default: return "invalid argument";
  }
}

/* -- the driver's interface ----------------------------------------------------------------------------------------- */

typedef struct { unsigned grid[3], block[3], shared; Stream *stream; void *attributes; unsigned count; } LaunchConfig;

int cuInit(unsigned flags) { return fake_init; }
int cuDriverGetVersion(int *version) { *version = fake_driver; return OK; }
int cuDeviceGetCount(int *count) { return fake_device_count(count); }
int cuDeviceGet(int *device, int index) { *device = index; return OK; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Fake GPU", length); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = fake_limit; return OK; }
int cuDeviceGetAttribute(int *value, int number, int device) { return fake_attribute(value, number); }
int cuGetErrorName(int status, const char **text) { *text = fake_error(status); return OK; }
int cuGetErrorString(int status, const char **text) { *text = fake_error(status); return OK; }
int cuFuncSetAttribute(Kernel *f, int attribute, int value) { return OK; }
int cuTensorMapEncodeTiled(void) { return INVALID; }
int cuModuleUnload(void *module) { return OK; }

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)image;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  return fake_load ? fake_load : on_load(image);
}

int cuModuleGetFunction(Kernel **f, void *module, const char *name) {
  *f = calloc(1, sizeof(Kernel));
  (*f)->number = on_find(name, (*f)->sizes);
  return (*f)->number < 0 ? NOT_FOUND : OK;
}

int cuLaunchKernelEx(const LaunchConfig *config, Kernel *f, void **params, void **extra) {
  Op *op = calloc(1, sizeof(Op));
  op->kind = LAUNCH, op->kernel = f->number;
  memcpy(op->dims, config->grid, 7 * sizeof(unsigned));
  for (int i = 0; i < 6; i++)
    if (op->dims[i] == 0) return INVALID;
  char *copied = op->arguments = calloc(MOST_ARGUMENTS, 8);
  for (int i = 0; f->sizes[i]; i++) memcpy(copied + 8 * i, params[i], f->sizes[i]);
  fake_counts[LAUNCHES]++;
  return enqueue(of(config->stream), op);
}

#else /* the runtime's interface */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int last;
static int noted(int status) { if (status) last = status; return status; }

int cudaGetDeviceCount(int *count) { return noted(fake_device_count(count)); }
int cudaGetDevice(int *device) { *device = 0; return OK; }
int cudaSetDevice(int device) { return device ? INVALID : OK; }
int cudaDeviceGetAttribute(int *value, int number, int device) { return fake_attribute(value, number); }
int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 256), strcpy(properties, "Fake GPU"); /* it begins with char name[256] */
  return OK;
}
int cudaGetLastError(void) { int status = last; last = OK; return status; }
int cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(int status) { return fake_error(status); }
const char *cudaGetErrorString(int status) { return fake_error(status); }
int cudaMalloc(void **at, size_t size) { return noted(fake_malloc(at, size)); }
int cudaFree(void *at) { return noted(fake_free(at)); }
int cudaMallocHost(void **at, size_t size) { return noted(fake_malloc_host(at, size)); }
int cudaFreeHost(void *at) { return noted(fake_free_host(at)); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { return fake_memory(free_bytes, total); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *stream) {
  return noted(fake_copy(to, size, from, size, size, 1, kind, stream));
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, int kind,
                      Stream *stream) {
  return noted(fake_copy(to, to_pitch, from, from_pitch, width, rows, kind, stream));
}
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int other, size_t size, Stream *stream) {
  return noted(fake_copy(to, size, from, size, size, 1, 3, stream));
}
int cudaStreamCreate(Stream **stream) { return fake_stream(stream, 1); }
int cudaStreamCreateWithFlags(Stream **stream, unsigned flags) { return fake_stream(stream, !(flags & 1)); }
int cudaStreamDestroy(Stream *stream) { return fake_end_stream(stream); }
int cudaStreamSynchronize(Stream *stream) { return noted(fake_wait(stream)); }
int cudaDeviceSynchronize(void) { return noted(fake_wait_all()); }
int cudaStreamBeginCapture(Stream *stream, int mode) { return noted(fake_begin(stream)); }
int cudaStreamEndCapture(Stream *stream, Graph **graph) { return noted(fake_end(stream, graph)); }
int cudaGraphInstantiate(Graph **executable, Graph *graph, unsigned long long flags) {
  *executable = graph;
  return OK;
}
int cudaGraphLaunch(Graph *executable, Stream *stream) { return noted(fake_replay(executable, stream)); }
int cudaGraphDestroy(Graph *graph) { return OK; }
int cudaGraphExecDestroy(Graph *executable) { return OK; }

typedef struct { Stream *stream; } Event;
int cudaEventCreate(Event **event) { *event = calloc(1, sizeof(Event)); return OK; }
int cudaEventDestroy(Event *event) { free(event); return OK; }
int cudaEventRecord(Event *event, Stream *stream) { event->stream = stream; return OK; }
int cudaEventSynchronize(Event *event) { return noted(fake_wait(event->stream)); }
int cudaEventElapsedTime(float *milliseconds, Event *first, Event *second) { *milliseconds = 0; return OK; }
int cudaStreamWaitEvent(Stream *stream, Event *event, unsigned flags) { return fake_after(stream, event->stream); }

#endif
