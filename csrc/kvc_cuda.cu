// libkvc_cuda: gather and scatter as one kernel per path on a stream of its own, and batched
// memcpy. Loads without a driver: kvc_cuda_device_count says what there is.
//
// A context has one stream (greatest priority, never the default one) and slots, each a pinned
// buffer, its twin in device memory and an event. A launch takes a slot: tables and zeroed sums go
// up in one copy, kernels run, sums come back, the event is recorded. The slot is free again once
// the launch was released and its event has passed.
#include <cuda_runtime.h>
#include <string.h>

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kvc/grid_plan.h"

namespace {

using namespace kvc::grid;
using kvc::Part;

constexpr uint32_t THREADS = 512;

template <Path PATH, bool GATHER>
__global__ void __launch_bounds__(THREADS)
    kvc_kernel(const GridPart* __restrict__ parts, const Piece* __restrict__ pieces,
               uint32_t items, unsigned long long* __restrict__ sums) {
  const uint32_t lane = threadIdx.x % LANES;
  const uint32_t warps = gridDim.x * (THREADS / LANES);
  Cursor cursor = {parts, pieces};
  for (uint32_t i = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES; i < items; i += warps) {
    const Item item = cursor.decode(i);
    uint64_t sum = work<PATH, GATHER>(parts[cursor.part], item, lane, sums != nullptr);
    if (sums) {
      for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) atomicAdd(sums + item.unit, (unsigned long long)sum);
    }
  }
}

using Kernel = void (*)(const GridPart*, const Piece*, uint32_t, unsigned long long*);

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

// Without CUDA's headers of 12.8 or later: CUmemcpyAttributes and both signatures of
// cuMemcpyBatchAsync; 13.0 dropped the place of a failure.
struct CopyAttributes {
  int source_order;  // 1: in stream order
  int source_place[2], destination_place[2];
  unsigned flags;
};
using BatchV1 = int (*)(uint64_t*, uint64_t*, size_t*, size_t, CopyAttributes*, size_t*, size_t,
                        size_t*, cudaStream_t);
using BatchV2 = int (*)(uint64_t*, uint64_t*, size_t*, size_t, CopyAttributes*, size_t*, size_t,
                        cudaStream_t);

struct Slot {
  uint8_t *host = nullptr, *device = nullptr;
  size_t bytes = 0;
  uint64_t* sums = nullptr;  // in host
  cudaEvent_t end = nullptr;
  bool taken = false;

  bool reserve(size_t needed) {
    if (needed <= bytes) return true;
    needed = (needed + needed / 2 + 4095) / 4096 * 4096;
    cudaFreeHost(host), cudaFree(device);
    host = device = nullptr, bytes = 0;
    if (cudaMallocHost(&host, needed) != cudaSuccess) return false;
    if (cudaMalloc(&device, needed) != cudaSuccess) return false;
    bytes = needed;
    return true;
  }
};

struct Context {
  int device = 0, max_ctas = 0, multiprocessors = 0;
  cudaStream_t stream = nullptr;
  cudaEvent_t after = nullptr;
  BatchV1 batch_v1 = nullptr;
  BatchV2 batch_v2 = nullptr;
  std::mutex mutex;
  std::vector<std::unique_ptr<Slot>> slots;

  Slot* take() {
    for (auto& slot : slots)
      if (!slot->taken && cudaEventQuery(slot->end) == cudaSuccess) return slot->taken = true, slot.get();
    std::unique_ptr<Slot> slot(new Slot);
    if (cudaEventCreateWithFlags(&slot->end, cudaEventDisableTiming) != cudaSuccess) return nullptr;
    slot->taken = true;
    slots.push_back(std::move(slot));
    return slots.back().get();
  }

  bool wait_for(const uint64_t* stream_handle) {
    if (!stream_handle) return true;
    return cudaEventRecord(after, (cudaStream_t)*stream_handle) == cudaSuccess &&
           cudaStreamWaitEvent(stream, after, 0) == cudaSuccess;
  }
};

void find_batch(Context* context) {
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult found;
  void* entry = nullptr;
  const char* name = "cuMemcpyBatchAsync";
  if (cudaGetDriverEntryPointByVersion(name, &entry, 13000, cudaEnableDefault, &found) ==
          cudaSuccess &&
      found == cudaDriverEntryPointSuccess) {
    context->batch_v2 = (BatchV2)entry;
  } else if (cudaGetDriverEntryPointByVersion(name, &entry, 12080, cudaEnableDefault, &found) ==
                 cudaSuccess &&
             found == cudaDriverEntryPointSuccess) {
    context->batch_v1 = (BatchV1)entry;
  }
  cudaGetLastError();
#endif
}

int open_context(Context* context) {
  int least, greatest;
  if (cudaSetDevice(context->device) != cudaSuccess) return KVC_NO_DEVICE;
  if (cudaDeviceGetStreamPriorityRange(&least, &greatest) != cudaSuccess ||
      cudaStreamCreateWithPriority(&context->stream, cudaStreamNonBlocking, greatest) !=
          cudaSuccess ||
      cudaEventCreateWithFlags(&context->after, cudaEventDisableTiming) != cudaSuccess ||
      cudaDeviceGetAttribute(&context->multiprocessors, cudaDevAttrMultiProcessorCount,
                             context->device) != cudaSuccess)
    return KVC_DEVICE_FAILED;
  find_batch(context);
  return KVC_OK;
}

bool launch_group(const Context* context, const Group& group, const GridPart* parts,
                  const Piece* pieces, uint64_t* sums, bool gather) {
  const Kernel kernel = gather ? kernel_of<true>(group.path) : kernel_of<false>(group.path);
  int per_multiprocessor = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, THREADS, 0);
  uint32_t ctas = context->multiprocessors * (per_multiprocessor > 0 ? per_multiprocessor : 1);
  if (context->max_ctas > 0 && uint32_t(context->max_ctas) < ctas) ctas = context->max_ctas;
  const uint32_t useful = (group.items + THREADS / LANES - 1) / (THREADS / LANES);
  kernel<<<ctas < useful ? ctas : useful, THREADS, 0, context->stream>>>(
      parts + group.first_part, pieces, group.items, (unsigned long long*)sums);
  return cudaGetLastError() == cudaSuccess;
}

// Tables, then sums; both rounded up to 16 bytes.
int launch_plan(Context* context, const Plan& plan, uint32_t units, bool checksum, bool gather,
                Slot* slot) {
  const auto rounded = [](size_t n) { return (n + 15) / 16 * 16; };
  const size_t parts = rounded(plan.parts.size() * sizeof(GridPart));
  const size_t pieces = rounded(plan.pieces.size() * sizeof(Piece));
  const size_t sums = checksum ? rounded(units * sizeof(uint64_t)) : 0;
  if (!slot->reserve(parts + pieces + sums)) return KVC_NO_MEMORY;
  memcpy(slot->host, plan.parts.data(), plan.parts.size() * sizeof(GridPart));
  memcpy(slot->host + parts, plan.pieces.data(), plan.pieces.size() * sizeof(Piece));
  memset(slot->host + parts + pieces, 0, sums);
  slot->sums = (uint64_t*)(slot->host + parts + pieces);
  uint64_t* device_sums = checksum ? (uint64_t*)(slot->device + parts + pieces) : nullptr;
  if (plan.groups.empty()) return KVC_OK;
  if (cudaMemcpyAsync(slot->device, slot->host, parts + pieces + sums, cudaMemcpyHostToDevice,
                      context->stream) != cudaSuccess)
    return KVC_DEVICE_FAILED;
  for (const Group& group : plan.groups)
    if (!launch_group(context, group, (const GridPart*)slot->device,
                      (const Piece*)(slot->device + parts), device_sums, gather))
      return KVC_DEVICE_FAILED;
  if (sums && cudaMemcpyAsync(slot->sums, device_sums, sums, cudaMemcpyDeviceToHost,
                              context->stream) != cudaSuccess)
    return KVC_DEVICE_FAILED;
  return KVC_OK;
}

// Records the slot's end also after an error: work before it may still run.
int finish(Context* context, Slot* slot, int error, void** launch) {
  if (cudaEventRecord(slot->end, context->stream) != cudaSuccess && !error)
    error = KVC_DEVICE_FAILED;
  if (error) {
    slot->taken = false;
    return error;
  }
  *launch = slot;
  return KVC_OK;
}

struct Run {
  uint64_t dst, src;
  size_t bytes;
};

int copy_runs(Context* context, std::vector<Run>& runs) {
  const size_t n = runs.size();
  if (n == 0) return KVC_OK;
  if (context->batch_v1 || context->batch_v2) {
    std::vector<uint64_t> dst(n), src(n);
    std::vector<size_t> bytes(n);
    for (size_t i = 0; i < n; ++i) dst[i] = runs[i].dst, src[i] = runs[i].src, bytes[i] = runs[i].bytes;
    CopyAttributes attributes = {1, {0, 0}, {0, 0}, 0};
    size_t first = 0, failed = 0;
    const int error = context->batch_v2
                          ? context->batch_v2(dst.data(), src.data(), bytes.data(), n, &attributes,
                                              &first, 1, context->stream)
                          : context->batch_v1(dst.data(), src.data(), bytes.data(), n, &attributes,
                                              &first, 1, &failed, context->stream);
    return error ? KVC_DEVICE_FAILED : KVC_OK;
  }
  for (const Run& run : runs)
    if (cudaMemcpyAsync((void*)run.dst, (const void*)run.src, run.bytes, cudaMemcpyDefault,
                        context->stream) != cudaSuccess)
      return KVC_DEVICE_FAILED;
  return KVC_OK;
}

}  // namespace

KVC_EXPORT int kvc_abi_version(void) { return KVC_ABI_VERSION; }
KVC_EXPORT const char* kvc_strerror(int error) { return kvc::describe(error); }

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
  std::unique_ptr<Context> made(new (std::nothrow) Context);
  if (!made) return KVC_NO_MEMORY;
  made->device = device, made->max_ctas = max_ctas;
  if (int error = open_context(made.get())) return error;
  *context = made.release();
  return KVC_OK;
}

// Waits for all launches.
KVC_EXPORT void kvc_cuda_close(void* handle) {
  std::unique_ptr<Context> context((Context*)handle);
  if (!context || cudaSetDevice(context->device) != cudaSuccess) return;
  cudaStreamSynchronize(context->stream);
  for (auto& slot : context->slots) {
    cudaFreeHost(slot->host), cudaFree(slot->device);
    cudaEventDestroy(slot->end);
  }
  cudaEventDestroy(context->after);
  cudaStreamDestroy(context->stream);
}

KVC_EXPORT uint64_t kvc_cuda_stream(void* context) { return (uint64_t)((Context*)context)->stream; }

// Cache -> wire if `gather`, else wire -> cache. `after`, if not null, points to the handle of a
// stream whose work so far comes first. *launch is for kvc_cuda_done, _sums and _release.
KVC_EXPORT int kvc_cuda_launch(void* handle, int gather, const kvc_copy* copies, uint32_t n_copies,
                               const kvc_segment* segments, uint32_t n_segments, void* wire,
                               uint64_t wire_bytes, uint32_t units, int checksum,
                               const uint64_t* after, void** launch) {
  Context* context = (Context*)handle;
  try {
    std::vector<Part> parts(n_copies);
    uint64_t tokens = 0;
    if (int error = kvc::make_plan(copies, n_copies, segments, n_segments, wire_bytes, units,
                                   parts.data(), &tokens))
      return error;
    Plan plan;
    if (tokens && n_copies)
      if (int error = make_grid(parts, segments, n_segments, tokens, (uint64_t)wire, &plan))
        return error;
    const std::lock_guard<std::mutex> lock(context->mutex);
    if (cudaSetDevice(context->device) != cudaSuccess) return KVC_DEVICE_FAILED;
    Slot* slot = context->take();
    if (!slot) return KVC_NO_MEMORY;
    int error = context->wait_for(after) ? KVC_OK : KVC_DEVICE_FAILED;
    if (!error) error = launch_plan(context, plan, units, checksum != 0, gather != 0, slot);
    return finish(context, slot, error, launch);
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

// n copies of sizes[i] bytes between any device and pinned memory, by the copy engines where the
// driver has cuMemcpyBatchAsync. Neighbours on both sides become one.
KVC_EXPORT int kvc_cuda_copy_batch(void* handle, const uint64_t* dst, const uint64_t* src,
                                   const uint64_t* sizes, uint64_t n, const uint64_t* after,
                                   void** launch) {
  Context* context = (Context*)handle;
  try {
    std::vector<Run> runs;
    for (uint64_t i = 0; i < n; ++i) {
      if (sizes[i] == 0) continue;
      if (!runs.empty() && runs.back().dst + runs.back().bytes == dst[i] &&
          runs.back().src + runs.back().bytes == src[i])
        runs.back().bytes += sizes[i];
      else
        runs.push_back({dst[i], src[i], size_t(sizes[i])});
    }
    const std::lock_guard<std::mutex> lock(context->mutex);
    if (cudaSetDevice(context->device) != cudaSuccess) return KVC_DEVICE_FAILED;
    Slot* slot = context->take();
    if (!slot) return KVC_NO_MEMORY;
    int error = context->wait_for(after) ? KVC_OK : KVC_DEVICE_FAILED;
    if (!error) error = copy_runs(context, runs);
    return finish(context, slot, error, launch);
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

KVC_EXPORT int kvc_cuda_has_batch(void* handle) {
  const Context* context = (const Context*)handle;
  return context->batch_v1 || context->batch_v2;
}

// 1 once all is written, 0 before, negative if the device failed.
KVC_EXPORT int kvc_cuda_done(void* launch) {
  const cudaError_t state = cudaEventQuery(((Slot*)launch)->end);
  return state == cudaSuccess ? 1 : state == cudaErrorNotReady ? 0 : KVC_DEVICE_FAILED;
}

// Valid from done until release.
KVC_EXPORT const uint64_t* kvc_cuda_sums(void* launch) { return ((Slot*)launch)->sums; }

KVC_EXPORT void kvc_cuda_release(void* handle, void* launch) {
  const std::lock_guard<std::mutex> lock(((Context*)handle)->mutex);
  ((Slot*)launch)->taken = false;
}
