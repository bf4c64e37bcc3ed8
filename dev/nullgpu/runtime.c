/* A CUDA runtime and driver that do nothing: host code runs as on a GPU, no kernel does.

Device memory is reserved address space, of which a process touches only what is copied in small pieces. Functions that
are not here succeed and do nothing: library.py generates them. Environment: NULLGPU_COUNT, devices (8); NULLGPU_MIB,
memory of each (81,079, an H100's). */

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties
#undef cuGetProcAddress
#undef cuCtxGetDevice

enum { DEVICES = 64, REGIONS = 65536, KERNELS = 1 << 20, DEPTH = 16 };
#define SPACE ((size_t)64 << 40)
#define PAGE ((size_t)2 << 20) /* granularity of cudaMalloc */
#define SMALL ((size_t)64 << 10) /* copies up to this size move bytes */

typedef struct { char *start; size_t size; int device; } Region;
typedef struct { const void *key; const char *name; long launches; } Kernel;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;
static char *space;
static size_t next_offset, used[DEVICES], pinned_bytes;
static Region device_regions[REGIONS], pinned_regions[REGIONS];
static int n_device, n_pinned;
static Kernel *kernels; /* hash table by address */
static long launches, products, copies, waits;
static void (*wait_hook)(const char *);

static long setting(const char *name, long standard) {
    const char *value = getenv(name);
    return value ? atol(value) : standard;
}
static int device_count(void) { return setting("NULLGPU_COUNT", 8); }
static size_t device_memory(void) { return (size_t)setting("NULLGPU_MIB", 81079) << 20; }

/* --- what the lab reads */

void nullgpu_set_wait_hook(void (*hook)(const char *)) { wait_hook = hook; }
long nullgpu_launches(void) { return launches; }
long nullgpu_products(void) { return products; } /* matrix products among the launches */
long nullgpu_copies(void) { return copies; }
long nullgpu_waits(void) { return waits; }
size_t nullgpu_pinned(void) { return pinned_bytes; }

void nullgpu_reset(void) {
    launches = products = copies = waits = 0;
    for (int i = 0; kernels && i < KERNELS; i++) kernels[i].launches = 0;
}

void nullgpu_write_kernels(const char *path) {
    FILE *file = fopen(path, "w");
    for (int i = 0; file && kernels && i < KERNELS; i++)
        if (kernels[i].launches) fprintf(file, "%ld %s\n", kernels[i].launches, kernels[i].name);
    if (file) fclose(file);
}

/* A call that makes the host wait for the device, or stops it otherwise. */
static cudaError_t host_waits(const char *call) {
    __sync_fetch_and_add(&waits, 1);
    if (wait_hook) wait_hook(call);
    return cudaSuccess;
}

/* --- kernels */

static Kernel *kernel_at(const void *key) {
    if (!kernels) kernels = calloc(KERNELS, sizeof *kernels);
    unsigned i = (unsigned)(((uintptr_t)key >> 4) * 2654435761u) % KERNELS;
    while (kernels[i].key && kernels[i].key != key) i = (i + 1) % KERNELS;
    return &kernels[i];
}
static Kernel *name_kernel(const void *key, const char *name) {
    pthread_mutex_lock(&lock);
    Kernel *kernel = kernel_at(key);
    kernel->key = key;
    kernel->name = strdup(name);
    pthread_mutex_unlock(&lock);
    return kernel;
}
void nullgpu_launch(const void *key) {
    __sync_fetch_and_add(&launches, 1);
    Kernel *kernel = kernel_at(key);
    if (kernel->key) __sync_fetch_and_add(&kernel->launches, 1);
}
void nullgpu_product(void) {
    __sync_fetch_and_add(&launches, 1);
    __sync_fetch_and_add(&products, 1);
}

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int threads, void *a,
                            void *b, void *c, void *d, int *e) { name_kernel(host, name); }
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed[DEPTH];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    if (depth == DEPTH) abort();
    pushed[depth].grid = grid, pushed[depth].block = block, pushed[depth].shared = shared;
    pushed[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth) return cudaErrorMissingConfiguration;
    *grid = pushed[--depth].grid, *block = pushed[depth].block, *shared = pushed[depth].shared;
    *(cudaStream_t *)stream = pushed[depth].stream;
    return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel) { nullgpu_launch(kernel); return 0; }
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel) { nullgpu_launch(kernel); return 0; }
cudaError_t cudaLaunchKernel(const void *host, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    nullgpu_launch(host);
    return 0;
}
cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    nullgpu_launch(host);
    return 0;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **a) {
    nullgpu_launch(host);
    return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **a, void **extra) { nullgpu_launch(f); return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **a, void **extra) {
    nullgpu_launch(f);
    return 0;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = calloc(1, 64); return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
    *f = calloc(1, 64);
    name_kernel(*f, name);
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *host) {
    *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64, .binaryVersion = 90,
                                              .ptxVersion = 90, .maxDynamicSharedSizeBytes = 232448};
    return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction f) {
    *value = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) {
    *n = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *f, const cudaLaunchConfig_t *c) { *n = 2; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 2; return 0; }

/* --- devices: an H100 */

cudaError_t cudaGetDeviceCount(int *count) { *count = device_count(); return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current; return 0; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    current = device;
    return 0;
}
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "NVIDIA H100 80GB HBM3", .totalGlobalMem = device_memory(), .major = 9, .multiProcessorCount = 132,
        .sharedMemPerBlock = 49152, .sharedMemPerMultiprocessor = 233472, .sharedMemPerBlockOptin = 232448,
        .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .warpSize = 32, .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048, .maxThreadsDim = {1024, 1024, 64}, .maxBlocksPerMultiProcessor = 32,
        .maxGridSize = {2147483647, 65535, 65535}, .l2CacheSize = 52428800, .memoryBusWidth = 5120,
        .concurrentKernels = 1, .cooperativeLaunch = 1, .unifiedAddressing = 1, .managedMemory = 1,
        .canMapHostMemory = 1, .asyncEngineCount = 3, .memPitch = 2147483647, .textureAlignment = 512,
        .pciBusID = device};
    properties->uuid.bytes[15] = device;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (name) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrClockRate: *value = 1980000; break; /* kHz */
        case cudaDevAttrMemoryClockRate: *value = 2619000; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
        default: *value = 1;
    }
    return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", 0x18 + device * 0x10);
    return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return 0; }
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : e ? "an error of the null GPU" : "no error";
}
const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : e ? "cudaErrorUnknown" : "cudaSuccess";
}
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "null GPU"; return 0; }
CUresult cuGetErrorName(CUresult e, const char **text) { *text = "null GPU"; return 0; }
CUresult cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return 0; }
CUresult cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)name, device);
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return cudaGetDevice(device); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
static int do_nothing(void) { return 0; }
static void *entry(const char *name) { void *found = dlsym(RTLD_DEFAULT, name); return found ? found : do_nothing; }
CUresult cuGetProcAddress(const char *name, void **f, int version, cuuint64_t flags) { *f = entry(name); return 0; }
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    *f = entry(name);
    return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    *f = entry(name);
    if (found) *found = cudaDriverEntryPointSuccess;
    return 0;
}

/* --- memory */

static int inside(const Region *regions, int count, const void *p) {
    for (int i = 0; i < count; i++)
        if ((char *)p >= regions[i].start && (char *)p < regions[i].start + regions[i].size) return 1;
    return 0;
}
static int on_device(const void *p) { return space && (char *)p >= space && (char *)p < space + SPACE; }
static void add(Region *regions, int *count, Region region) {
    if (*count == REGIONS) abort();
    regions[(*count)++] = region;
}
static Region take(Region *regions, int *count, const void *start) {
    for (int i = 0; i < *count; i++)
        if (regions[i].start == start) {
            Region found = regions[i];
            regions[i] = regions[--*count];
            return found;
        }
    return (Region){0};
}
static cudaError_t allocate(void **p, size_t size) {
    size = (size + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    if (!space) space = mmap(0, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int fits = space != MAP_FAILED && next_offset + size <= SPACE && used[current] + size <= device_memory();
    if (fits) {
        *p = space + next_offset;
        next_offset += size;
        used[current] += size;
        add(device_regions, &n_device, (Region){*p, size, current});
    }
    pthread_mutex_unlock(&lock);
    return fits ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMalloc(void **p, size_t size) { return allocate(p, size); }
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream) { return allocate(p, size); }
cudaError_t cudaFree(void *p) {
    if (!p) return 0;
    pthread_mutex_lock(&lock);
    Region freed = take(device_regions, &n_device, p);
    used[freed.device] -= freed.size;
    pthread_mutex_unlock(&lock);
    return host_waits("cudaFree");
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { return cudaFree(p); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return allocate(p, 4096); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = device_memory();
    *available = *total - used[current];
    return 0;
}
static void pin(void *p, size_t size) {
    pthread_mutex_lock(&lock);
    add(pinned_regions, &n_pinned, (Region){p, size, 0});
    pinned_bytes += size;
    pthread_mutex_unlock(&lock);
}
static Region unpin(const void *p) {
    pthread_mutex_lock(&lock);
    Region region = take(pinned_regions, &n_pinned, p);
    pinned_bytes -= region.size;
    pthread_mutex_unlock(&lock);
    return region;
}
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
    *p = mmap(0, size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    pin(*p, size);
    return host_waits("cudaHostAlloc");
}
cudaError_t cudaFreeHost(void *p) { munmap(p, unpin(p).size + 1); return host_waits("cudaFreeHost"); }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { pin(p, size); return host_waits("cudaHostRegister"); }
cudaError_t cudaHostUnregister(void *p) { unpin(p); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    *a = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered};
    if (on_device(p)) *a = (struct cudaPointerAttributes){cudaMemoryTypeDevice, current, (void *)p, 0};
    else if (inside(pinned_regions, n_pinned, p)) *a = (struct cudaPointerAttributes){cudaMemoryTypeHost, 0, (void *)p, (void *)p};
    return 0;
}
static void copy(void *to, const void *from, size_t size) {
    __sync_fetch_and_add(&copies, 1);
    if (size <= SMALL) memmove(to, from, size);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    copy(to, from, size);
    return host_waits("cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy(to, from, size);
    if (!on_device(to) && !inside(pinned_regions, n_pinned, to)) return host_waits("cudaMemcpyAsync to pageable memory");
    if (!on_device(from) && !inside(pinned_regions, n_pinned, from)) return host_waits("cudaMemcpyAsync from pageable memory");
    return 0;
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
    *size = PAGE;
    return 0;
}

/* --- streams and events: all work is done when it is queued */

static void *handle(void) { return calloc(1, 64); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = handle(); return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) { if (c) *c = 0; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return 0; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
cudaError_t cudaDeviceSynchronize(void) { return host_waits("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return host_waits("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return host_waits("cudaEventSynchronize"); }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = handle(); return 0; }
