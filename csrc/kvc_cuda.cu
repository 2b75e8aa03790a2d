// libkvc_cuda: gather and scatter as one kernel per path on a stream of its own, and copies of
// plain runs. Loads without a driver: kvc_cuda_device_count says what there is.
//
// A context has one stream of the greatest priority and slots, each a pinned buffer, its twin in device memory and an event. A launch takes a slot: tables and zeroed
// sums go up in one copy, kernels run, sums come back, the event is recorded. The slot is free again
// once the launch was released and its event has passed.
//
// Any thread may call at any time. A call works on its context's device and leaves the thread's
// current device as it was, except that it never makes a CUDA context on another device to do so. It
// neither fails nor spoils the capture of a CUDA graph that another thread has under way, and frees
// nothing before the end: cudaFree waits for the device.
#include <cuda_runtime.h>
#include <string.h>

#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kvc/grid_plan.h"

namespace {

using namespace kvc::grid;
using kvc::Part;

constexpr uint32_t THREADS = 512;
constexpr size_t LEAST_SLOT_BYTES = 256 << 10;  // so that hardly any launch needs a larger one

// Adds all lanes' sums. On a CPU (tests) lanes run one after the other.
__device__ inline void add_sum(unsigned long long* to, uint64_t sum, [[maybe_unused]] uint32_t lane) {
#ifdef __CUDA_ARCH__
  for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) atomicAdd(to, (unsigned long long)sum);
#else
  *to += sum;
#endif
}

template <Path PATH, bool GATHER>
__global__ void __launch_bounds__(THREADS)
    kvc_kernel(const GridPart* __restrict__ parts, const Piece* __restrict__ pieces,
               uint32_t items, unsigned long long* __restrict__ sums) {
  const uint32_t lane = threadIdx.x % LANES;
  const uint32_t warps = gridDim.x * (THREADS / LANES);
  Cursor cursor = {parts, pieces};
  for (uint32_t i = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES; i < items; i += warps) {
    const Item item = cursor.decode(i);
    add_sum(sums + item.unit, work<PATH, GATHER>(parts[cursor.part], item, lane), lane);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    kvc_runs_kernel(const Run* __restrict__ pieces, uint32_t items) {
  const uint32_t warps = gridDim.x * (THREADS / LANES);
  for (uint32_t i = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES; i < items; i += warps) {
    const Run run = pieces[i];  // once: the compiler cannot know that no store changes it
    copy_run<T>(run, threadIdx.x % LANES);
  }
}

using Kernel = void (*)(const GridPart*, const Piece*, uint32_t, unsigned long long*);
using RunsKernel = void (*)(const Run*, uint32_t);

template <bool GATHER>
Kernel kernel_of(Path path) {
  switch (path) {
    case Path::PLAIN16: return kvc_kernel<Path::PLAIN16, GATHER>;
    case Path::PLAIN8: return kvc_kernel<Path::PLAIN8, GATHER>;
    case Path::CONVERT_1_2: return kvc_kernel<Path::CONVERT_1_2, GATHER>;
    case Path::CONVERT_1_4: return kvc_kernel<Path::CONVERT_1_4, GATHER>;
    case Path::CONVERT_2_1: return kvc_kernel<Path::CONVERT_2_1, GATHER>;
    case Path::CONVERT_2_4: return kvc_kernel<Path::CONVERT_2_4, GATHER>;
    case Path::CONVERT_4_1: return kvc_kernel<Path::CONVERT_4_1, GATHER>;
    case Path::CONVERT_4_2: return kvc_kernel<Path::CONVERT_4_2, GATHER>;
    default: return kvc_kernel<Path::CELLS, GATHER>;
  }
}

RunsKernel runs_kernel_of(uint32_t width) {
  switch (width) {
    case 16: return kvc_runs_kernel<Words16>;
    case 8: return kvc_runs_kernel<uint64_t>;
    case 4: return kvc_runs_kernel<uint32_t>;
    default: return kvc_runs_kernel<uint8_t>;
  }
}

struct Slot {
  int owner = 0;  // device
  uint8_t *host = nullptr, *device = nullptr;
  size_t bytes = 0;
  std::vector<uint8_t*> outgrown_host, outgrown_device;  // each buffer is 1.5 times the one before
  uint64_t* sums = nullptr;  // in host
  cudaEvent_t end = nullptr;
  bool taken = false;

  void drop() {
    outgrow();
    for (uint8_t* one : outgrown_host) cudaFreeHost(one);
    for (uint8_t* one : outgrown_device) cudaFree(one);
  }

  void outgrow() {
    if (host) outgrown_host.push_back(host);
    if (device) outgrown_device.push_back(device);
    host = device = nullptr, bytes = 0;
  }

  bool reserve(size_t needed) {
    if (needed <= bytes) return true;
    needed = (needed + needed / 2 + 4095) / 4096 * 4096;
    if (needed < LEAST_SLOT_BYTES) needed = LEAST_SLOT_BYTES;
    outgrow();
    if (cudaMallocHost((void**)&host, needed) != cudaSuccess) return false;
    if (cudaMalloc((void**)&device, needed) != cudaSuccess) return false;
    bytes = needed;
    return true;
  }
};

// Whether this process has a CUDA context on a device, which would be made by making it current.
bool has_context(int device) {
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult found;
  void* entry = nullptr;
  if (cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &entry, 7000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return false;
  unsigned flags = 0;
  int active = 0;
  return ((int (*)(int, unsigned*, int*))entry)(device, &flags, &active) == 0 && active;
#else
  return true;
#endif
}

// Makes a device the thread's current one until it goes out of scope, if it is not anyway, and lets
// the thread make calls that a capture under way in another thread would forbid.
// Makes a device the thread's current one until it goes out of scope.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    ok_ = cudaGetDevice(&before_) == cudaSuccess &&
          (before_ == device || cudaSetDevice(device) == cudaSuccess);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (ok_ && before_ != device_ && has_context(before_)) cudaSetDevice(before_);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  bool ok() const { return ok_; }

 private:
  const int device_;
  int before_ = 0;
  bool ok_ = false;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Context {
  int device = 0, max_ctas = 0, multiprocessors = 0;
  cudaStream_t stream = nullptr;
  std::mutex mutex;
  std::vector<std::unique_ptr<Slot>> slots;
  std::map<const void*, uint32_t> ctas;  // of a kernel that fills the device

  ~Context() {
    for (auto& slot : slots) {
      slot->drop();
      if (slot->end) cudaEventDestroy(slot->end);
    }
    if (stream) cudaStreamDestroy(stream);
  }

  Slot* take() {
    for (auto& slot : slots)
      if (!slot->taken && cudaEventQuery(slot->end) == cudaSuccess) return slot->taken = true, slot.get();
    std::unique_ptr<Slot> slot(new Slot);
    slot->owner = device;
    if (cudaEventCreateWithFlags(&slot->end, cudaEventDisableTiming) != cudaSuccess) return nullptr;
    slot->taken = true;
    slots.push_back(std::move(slot));
    return slots.back().get();
  }

  // As many CTAs as fit, as are allowed, and as have work.
  template <class... A, class... B>
  bool launch(void (*kernel)(A...), uint32_t items, B... arguments) {
    uint32_t& most = ctas[(const void*)kernel];
    if (most == 0) {
      int fit = 0;
      if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, THREADS, 0) != cudaSuccess)
        return false;
      most = multiprocessors * (fit > 0 ? fit : 1);
      if (max_ctas > 0 && uint32_t(max_ctas) < most) most = max_ctas;
    }
    const uint32_t useful = (items + THREADS / LANES - 1) / (THREADS / LANES);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(most < useful ? most : useful);
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, A(arguments)...) == cudaSuccess;
  }
};

// Whether the library has machine code for the device, or PTX that the driver can compile for it.
int check_code() {
  cudaFuncAttributes attributes;
  switch (cudaFuncGetAttributes(&attributes, kernel_of<true>(Path::PLAIN16))) {
    case cudaSuccess: return KVC_OK;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: return cudaGetLastError(), KVC_NO_CODE;
    default: return KVC_DEVICE_FAILED;
  }
}

int open_context(Context* context) {
  if (int error = check_code()) return error;
  int least, greatest;
  if (cudaDeviceGetStreamPriorityRange(&least, &greatest) != cudaSuccess ||
      cudaStreamCreateWithPriority(&context->stream, cudaStreamNonBlocking, greatest) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&context->multiprocessors, cudaDevAttrMultiProcessorCount,
                             context->device) != cudaSuccess)
    return KVC_DEVICE_FAILED;
  return KVC_OK;
}

// Tables, then sums; both rounded up to 16 bytes.
int launch_plan(Context* context, const Plan& plan, uint32_t units, bool gather, Slot* slot) {
  const auto rounded = [](size_t n) { return (n + 15) / 16 * 16; };
  const size_t parts = rounded(plan.parts.size() * sizeof(GridPart));
  const size_t pieces = rounded(plan.pieces.size() * sizeof(Piece));
  const size_t sums = rounded(units * sizeof(uint64_t));
  if (!slot->reserve(parts + pieces + sums)) return KVC_NO_MEMORY;
  memcpy(slot->host, plan.parts.data(), plan.parts.size() * sizeof(GridPart));
  memcpy(slot->host + parts, plan.pieces.data(), plan.pieces.size() * sizeof(Piece));
  memset(slot->host + parts + pieces, 0, sums);
  slot->sums = (uint64_t*)(slot->host + parts + pieces);
  auto* device_sums = (unsigned long long*)(slot->device + parts + pieces);
  if (plan.groups.empty()) return KVC_OK;
  if (cudaMemcpyAsync(slot->device, slot->host, parts + pieces + sums, cudaMemcpyHostToDevice,
                      context->stream) != cudaSuccess)
    return KVC_DEVICE_FAILED;
  for (const Group& group : plan.groups) {
    const Kernel kernel = gather ? kernel_of<true>(group.path) : kernel_of<false>(group.path);
    if (!context->launch(kernel, group.items, (const GridPart*)slot->device + group.first_part,
                         (const Piece*)(slot->device + parts), group.items, device_sums))
      return KVC_DEVICE_FAILED;
  }
  if (cudaMemcpyAsync(slot->sums, device_sums, sums, cudaMemcpyDeviceToHost, context->stream) !=
      cudaSuccess)
    return KVC_DEVICE_FAILED;
  return KVC_OK;
}

// Records the slot's end also after an error: work before it may still run.
int finish(Context* context, Slot* slot, int error, void** launch) {
  if (cudaEventRecord(slot->end, context->stream) != cudaSuccess && !error)
    error = KVC_DEVICE_FAILED;
  if (error) {
    cudaGetLastError();  // or the next call would find it
    slot->taken = false;
    return error;
  }
  *launch = slot;
  return KVC_OK;
}

int copy_runs(Context* context, const std::vector<Run>& runs, Slot* slot) {
  if (runs.empty()) return KVC_OK;
  std::vector<Run> pieces;
  const uint32_t width = cut_runs(runs, &pieces);
  const size_t bytes = pieces.size() * sizeof(Run);
  if (pieces.size() >= (1u << 31)) return KVC_BAD_SHAPE;
  if (!slot->reserve(bytes)) return KVC_NO_MEMORY;
  memcpy(slot->host, pieces.data(), bytes);
  if (cudaMemcpyAsync(slot->device, slot->host, bytes, cudaMemcpyHostToDevice, context->stream) !=
      cudaSuccess)
    return KVC_DEVICE_FAILED;
  const uint32_t items = uint32_t(pieces.size());
  return context->launch(runs_kernel_of(width), items, (const Run*)slot->device, items)
             ? KVC_OK
             : KVC_DEVICE_FAILED;
}

// Takes a slot, lets `work` use it and gives the launch to the caller.
template <class Work>
int in_slot(Context* context, void** launch, Work work) {
  const std::lock_guard<std::mutex> lock(context->mutex);
  const OnDevice on(context->device);
  if (!on.ok()) return KVC_DEVICE_FAILED;
  Slot* slot = context->take();
  if (!slot) return KVC_NO_MEMORY;
  return finish(context, slot, work(slot), launch);
}

}  // namespace

KVC_EXPORT int kvc_abi_version(void) { return KVC_ABI_VERSION; }
KVC_EXPORT const char* kvc_strerror(int error) { return kvc::describe(error); }

// Makes a device the thread's current one. Returns which one was, or KVC_NO_DEVICE.
KVC_EXPORT int kvc_cuda_make_current(int device) {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess) return KVC_NO_DEVICE;
  return before == device || cudaSetDevice(device) == cudaSuccess ? before : KVC_NO_DEVICE;
}

// The same for the device that was current before, unless that would make a context there.
KVC_EXPORT void kvc_cuda_restore(int device) {
  if (has_context(device)) cudaSetDevice(device);
}

// 86 for sm_86; 0 if it cannot be told.
KVC_EXPORT int kvc_cuda_architecture(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

// 0 without a GPU or driver.
KVC_EXPORT int kvc_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// `max_ctas` bounds every launch; 0 is as many as fit.
KVC_EXPORT int kvc_cuda_open(int device, int max_ctas, void** context) {
  if (device < 0 || device >= kvc_cuda_device_count()) return KVC_NO_DEVICE;
  try {
    const OnDevice on(device);
    if (!on.ok()) return KVC_NO_DEVICE;
    std::unique_ptr<Context> made(new Context);
    made->device = device, made->max_ctas = max_ctas;
    if (int error = open_context(made.get())) return error;
    *context = made.release();
    return KVC_OK;
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

// Waits for all launches.
KVC_EXPORT void kvc_cuda_close(void* handle) {
  std::unique_ptr<Context> context((Context*)handle);
  if (!context) return;
  const OnDevice on(context->device);
  cudaStreamSynchronize(context->stream);
  context.reset();
}

KVC_EXPORT uint64_t kvc_cuda_stream(void* context) { return (uint64_t)((Context*)context)->stream; }

// Pinned host memory if `pinned`, else device memory; null if there is none.
KVC_EXPORT void* kvc_cuda_alloc(void* context, int pinned, uint64_t bytes) {
  const OnDevice on(((Context*)context)->device);
  void* found = nullptr;
  if (!on.ok()) return nullptr;
  if ((pinned ? cudaMallocHost(&found, bytes) : cudaMalloc(&found, bytes)) == cudaSuccess)
    return found;
  cudaGetLastError();
  return nullptr;
}

KVC_EXPORT void kvc_cuda_free(void* context, int pinned, void* memory) {
  const OnDevice on(((Context*)context)->device);
  if (!on.ok()) return;
  if (pinned)
    cudaFreeHost(memory);
  else
    cudaFree(memory);
}

// Cache -> wire if `gather`, else wire -> cache; a kernel per path, however many chunks. *launch is
// for kvc_cuda_done, _sums and _release.
KVC_EXPORT int kvc_cuda_move(void* handle, int gather, const kvc_copy* copies, uint32_t n_copies,
                             const kvc_segment* segments, uint32_t n_segments,
                             const uint64_t* wires, uint32_t n_wires, uint64_t wire_bytes,
                             uint32_t units, void** launch) {
  Context* context = (Context*)handle;
  try {
    std::vector<Part> parts(n_copies);
    uint64_t tokens = 0;
    const kvc::Wires to = {wires, n_wires, wire_bytes};
    if (int error = kvc::make_plan(copies, n_copies, segments, n_segments, to, units,
                                   parts.data(), &tokens))
      return error;
    Plan plan;
    if (tokens && n_copies)
      if (int error = make_grid(parts, segments, n_segments, tokens, to, &plan))
        return error;
    return in_slot(context, launch, [&](Slot* slot) {
      return launch_plan(context, plan, units, gather != 0, slot);
    });
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

// n copies of sizes[i] bytes between any device and pinned memory, by a kernel. Neighbours on both
// sides become one copy.
KVC_EXPORT int kvc_cuda_copy_runs(void* handle, const uint64_t* dst, const uint64_t* src,
                                  const uint64_t* sizes, uint64_t n, void** launch) {
  Context* context = (Context*)handle;
  try {
    std::vector<Run> runs;
    for (uint64_t i = 0; i < n; ++i) add_run(runs, dst[i], src[i], sizes[i]);
    return in_slot(context, launch, [&](Slot* slot) { return copy_runs(context, runs, slot); });
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

// Makes host memory one that kernels can read and, unless `read_only`, write. Returns CUDA's error.
KVC_EXPORT int kvc_cuda_register(void* context, void* memory, uint64_t bytes, int read_only) {
  const OnDevice on(((Context*)context)->device);
  if (!on.ok()) return cudaErrorInvalidDevice;
  const int error =
      cudaHostRegister(memory, bytes, read_only ? cudaHostRegisterReadOnly : cudaHostRegisterDefault);
  cudaGetLastError();
  return error;
}

// The reverse, before the memory is unmapped.
KVC_EXPORT int kvc_cuda_unregister(void* context, void* memory) {
  const OnDevice on(((Context*)context)->device);
  if (!on.ok()) return cudaErrorInvalidDevice;
  const int error = cudaHostUnregister(memory);
  cudaGetLastError();
  return error;
}

// 1 once all is written, 0 before, negative if the device failed.
KVC_EXPORT int kvc_cuda_done(void* launch) {
  const OnDevice on(((Slot*)launch)->owner);
  const cudaError_t state = cudaEventQuery(((Slot*)launch)->end);
  return state == cudaSuccess ? 1 : state == cudaErrorNotReady ? 0 : KVC_DEVICE_FAILED;
}

// Valid from done until release.
KVC_EXPORT const uint64_t* kvc_cuda_sums(void* launch) { return ((Slot*)launch)->sums; }

KVC_EXPORT void kvc_cuda_release(void* handle, void* launch) {
  const std::lock_guard<std::mutex> lock(((Context*)handle)->mutex);
  ((Slot*)launch)->taken = false;
}
