/* cuBLAS, NVRTC and NCCL without kernels. A collective of several ranks sees only this one: the others are assumed to
hold the same values. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int cudaMalloc(void **, size_t);
int cudaFree(void *);
void nullgpu_product(void);
static void *handle(void) { return calloc(1, 64); }
static int product(void) { nullgpu_product(); return 0; }

/* --- cuBLAS: each matrix product counts as one launch */

int cublasCreate_v2(void **h) { *h = handle(); return 0; }
int cublasGetVersion_v2(void *h, int *version) { *version = 130000; return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void) { return product(); }
int cublasGemmStridedBatchedEx(void) { return product(); }
int cublasSgemm_v2(void) { return product(); }
int cublasSgemmStridedBatched(void) { return product(); }
int cublasLtMatmul(void) { return product(); }
int cublasLtCreate(void **h) { *h = handle(); return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
size_t cublasLtGetCudartVersion(void) { return 13000; }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **d, int type, uint64_t rows, uint64_t columns, int64_t stride) { *d = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = handle(); return 0; }
struct heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *preference, int asked,
                                   struct heuristic *found, int *count) {
    *found = (struct heuristic){.waves = 1};
    *count = 1;
    return 0;
}

/* --- NVRTC: compiles to nothing */

int nvrtcVersion(int *major, int *minor) { *major = 13, *minor = 0; return 0; }
int nvrtcCreateProgram(void **p) { *p = handle(); return 0; }
int nvrtcGetCUBINSize(void *p, size_t *n) { *n = 16; return 0; }
int nvrtcGetCUBIN(void *p, char *out) { memset(out, 0, 16); return 0; }
int nvrtcGetPTXSize(void *p, size_t *n) { *n = 16; return 0; }
int nvrtcGetPTX(void *p, char *out) { memset(out, 0, 16); return 0; }
int nvrtcGetLoweredName(void *p, const char *name, const char **lowered) { *lowered = "kernel"; return 0; }
int nvrtcGetNumSupportedArchs(int *n) { *n = 1; return 0; }
int nvrtcGetSupportedArchs(int *archs) { *archs = 90; return 0; }
int nvrtcGetProgramLogSize(void *p, size_t *n) { *n = 1; return 0; }
int nvrtcGetProgramLog(void *p, char *log) { *log = 0; return 0; }
const char *nvrtcGetErrorString(int e) { return "an error of the null GPU"; }

/* --- NCCL */

struct communicator { int size, rank; };
enum { LARGEST = 4 << 20 }; /* bytes up to which values are copied */
static const int dtype_bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
typedef struct { char bytes[128]; } Id;

static int begin(void **c, int size, int rank) {
    struct communicator *made = handle();
    made->size = size, made->rank = rank;
    *c = made;
    return 0;
}
static int move(const void *from, void *to, size_t count, int dtype, int times) {
    size_t bytes = count * dtype_bytes[dtype];
    for (int i = 0; from && to && bytes * times <= LARGEST && i < times; i++) memmove((char *)to + i * bytes, from, bytes);
    return 0;
}
int ncclGetVersion(int *version) { *version = 22907; return 0; }
int ncclGetUniqueId(Id *id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(void **c, int n, Id id, int rank) { return begin(c, n, rank); }
int ncclCommInitRankConfig(void **c, int n, Id id, int rank, void *config) { return begin(c, n, rank); }
int ncclCommInitRankScalable(void **c, int n, int rank, int ids, void *id, void *config) { return begin(c, n, rank); }
int ncclCommSplit(void *c, int color, int key, void **made, void *config) { return begin(made, 1, 0); }
int ncclCommCount(struct communicator *c, int *n) { *n = c->size; return 0; }
int ncclCommUserRank(struct communicator *c, int *rank) { *rank = c->rank; return 0; }
int ncclCommGetAsyncError(void *c, int *e) { *e = 0; return 0; }
const char *ncclGetErrorString(int e) { return "an error of the null GPU"; }
const char *ncclGetLastError(void *c) { return ""; }
int ncclAllReduce(const void *a, void *b, size_t n, int dtype, int op, void *c, void *s) { return move(a, b, n, dtype, 1); }
int ncclAllGather(const void *a, void *b, size_t n, int dtype, struct communicator *c, void *s) {
    return move(a, b, n, dtype, c->size);
}
int ncclReduceScatter(const char *a, void *b, size_t n, int dtype, int op, struct communicator *c, void *s) {
    return move(a + n * dtype_bytes[dtype] * c->rank, b, n, dtype, 1);
}
int ncclBroadcast(const void *a, void *b, size_t n, int dtype, int root, struct communicator *c, void *s) {
    return c->rank == root ? move(a, b, n, dtype, 1) : 0;
}
int ncclMemAlloc(void **p, size_t n) { return cudaMalloc(p, n); }
int ncclMemFree(void *p) { return cudaFree(p); }
int ncclCommRegister(void *c, void *p, size_t n, void **h) { *h = handle(); return 0; }
