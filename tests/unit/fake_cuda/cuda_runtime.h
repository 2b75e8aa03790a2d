// As much of CUDA's runtime as csrc/kvc_cuda.cu uses, on a CPU, so that a C++ compiler can build the
// whole library and the tests can run it where there is no GPU.
//
// Kernels run thread after thread. A stream is a queue that nothing works off by itself: work is
// done late, when an event is asked for the second time (kvc_fake_late), so that memory which is
// reused or freed too early shows. Device memory starts as garbage. kvc_fake_fail(n) makes the n-th call fail.
//
// It refuses what CUDA refuses: work on a stream of another device than the thread's current one, what
// may not be done while a graph is captured, registering twice, and unregistering what is not. It
// keeps book of the devices on which a context was made, as nearly every call does on the current one.
#ifndef KVC_FAKE_CUDA_RUNTIME_H
#define KVC_FAKE_CUDA_RUNTIME_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <functional>
#include <map>
#include <set>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __launch_bounds__(threads)

enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEnableDefault = 0 };
enum { cudaHostRegisterDefault = 0, cudaHostRegisterReadOnly = 8 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct FakeStream {
  int device = 0;
  std::deque<std::function<void()>> work;
  bool stuck = false;  // set by work that cannot go on yet: it stays the first
  bool run_one() {
    stuck = false;
    work.front()();
    if (!stuck) work.pop_front();
    return !stuck;
  }
};

struct FakeEvent {
  int device = 0;
  FakeStream* stream = nullptr;
  uint64_t recorded = 0, passed = 0;
  unsigned asked = 0;
  void finish() {
    while (passed < recorded && !stream->work.empty() && stream->run_one()) {
    }
  }
};

using cudaStream_t = FakeStream*;
using cudaEvent_t = FakeEvent*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct Fake {
  int fail_in = 0;      // calls from now; 0: never
  unsigned late = 1;    // how often an event is asked for in vain
  unsigned most_ctas = 0, launches = 0, copies = 0, frees = 0;
  bool capturing = false, spoilt = false;  // a graph, by another thread in the global mode
  bool has_code = true;                    // for the device
  std::set<int> contexts;
  std::set<void*> memory;
  std::map<char*, size_t> registered;
};

struct FakeThread {
  int device = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};

inline Fake& fake() {
  static Fake one;
  return one;
}

inline FakeThread& fake_thread() {
  static thread_local FakeThread one;
  return one;
}

inline dim3 threadIdx, blockIdx, gridDim;

inline bool fake_fails() { return fake().fail_in && --fake().fail_in == 0; }
// Nearly every call makes a context on the current device.
#define KVC_FAKE_CALL                             \
  fake().contexts.insert(fake_thread().device);   \
  if (fake_fails()) return cudaErrorMemoryAllocation

// What fails, and spoils the capture, while another thread captures in the global mode.
inline bool fake_forbidden() {
  if (!fake().capturing || fake_thread().mode == cudaStreamCaptureModeRelaxed) return false;
  return fake().spoilt = true;
}
#define KVC_FAKE_UNSAFE_CALL \
  KVC_FAKE_CALL;             \
  if (fake_forbidden()) return cudaErrorStreamCaptureUnsupported

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  if (fake_fails()) return cudaErrorMemoryAllocation;
  return *device = fake_thread().device, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {  // never fails: also puts the last one back
  fake().contexts.insert(device);
  return fake_thread().device = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  if (fake_fails()) return cudaErrorMemoryAllocation;
  return *value = 3, cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake_thread().mode);
  return cudaSuccess;
}
inline int fake_primary_context_state(int device, unsigned* flags, int* active) {
  return *flags = 0, *active = int(fake().contexts.count(device)), 0;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned,
                                                    cudaDriverEntryPointQueryResult* how) {
  const bool there = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *how = there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *entry = (void*)fake_primary_context_state, cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  KVC_FAKE_CALL;
  return fake().has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  KVC_FAKE_CALL;
  return *least = 0, *greatest = -5, cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  KVC_FAKE_CALL;
  *stream = new FakeStream;
  return (*stream)->device = fake_thread().device, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  KVC_FAKE_UNSAFE_CALL;
  while (!stream->work.empty()) stream->run_one();
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  KVC_FAKE_CALL;
  *event = new FakeEvent;
  return (*event)->device = fake_thread().device, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  KVC_FAKE_CALL;
  if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
  const uint64_t mine = ++event->recorded;
  event->stream = stream, event->asked = 0;
  stream->work.push_back([event, mine] { event->passed = mine; });
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  KVC_FAKE_UNSAFE_CALL;
  if (event->passed == event->recorded) return cudaSuccess;
  if (event->asked++ < fake().late) return cudaErrorNotReady;
  event->finish();
  return event->passed == event->recorded ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t fake_allocate(void** memory, size_t bytes) {
  KVC_FAKE_UNSAFE_CALL;
  *memory = malloc(bytes);
  memset(*memory, 0xCD, bytes);
  fake().memory.insert(*memory);
  return cudaSuccess;
}
inline cudaError_t fake_free(void* memory) {
  fake().contexts.insert(fake_thread().device);
  if (fake_forbidden()) return cudaErrorStreamCaptureUnsupported;
  ++fake().frees;
  if (memory) fake().memory.erase(memory), free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return fake_allocate(memory, bytes); }
inline cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  return fake_allocate(memory, bytes);
}
inline cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  KVC_FAKE_UNSAFE_CALL;
  char* first = (char*)memory;
  auto after = fake().registered.lower_bound(first + bytes);
  if (after != fake().registered.begin()) {
    const auto& before = *--after;
    if (before.first + before.second > first) return cudaErrorHostMemoryAlreadyRegistered;
  }
  return fake().registered[first] = bytes, cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* memory) {
  KVC_FAKE_UNSAFE_CALL;
  return fake().registered.erase((char*)memory) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
inline cudaError_t cudaFree(void* memory) { return fake_free(memory); }
inline cudaError_t cudaFreeHost(void* memory) { return fake_free(memory); }
inline cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  KVC_FAKE_CALL;
  ++fake().copies;
  stream->work.push_back([=] { memcpy(dst, src, bytes); });
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* fit, Kernel, int, size_t) {
  KVC_FAKE_CALL;
  return *fit = 2, cudaSuccess;
}

template <class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(A...), A... a) {
  KVC_FAKE_CALL;
  if (config->stream->device != fake_thread().device) return cudaErrorInvalidResourceHandle;
  const dim3 grid = config->gridDim, block = config->blockDim;
  ++fake().launches;
  if (grid.x > fake().most_ctas) fake().most_ctas = grid.x;
  config->stream->work.push_back([=] {
    gridDim = grid;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(a...);
  });
  return cudaSuccess;
}

// What tests turn and read.
#define KVC_FAKE_EXPORT extern "C" __attribute__((visibility("default"), used))
KVC_FAKE_EXPORT inline void kvc_fake_reset() {
  fake().fail_in = 0, fake().late = 1;
  fake().most_ctas = fake().launches = fake().copies = fake().frees = 0;
  fake().capturing = fake().spoilt = false, fake().has_code = true;
  fake().contexts.clear(), fake().registered.clear();
}
KVC_FAKE_EXPORT inline void kvc_fake_fail(int calls) { fake().fail_in = calls; }
KVC_FAKE_EXPORT inline void kvc_fake_late(unsigned times) { fake().late = times; }
KVC_FAKE_EXPORT inline void kvc_fake_set_device(int device) { cudaSetDevice(device); }
KVC_FAKE_EXPORT inline int kvc_fake_malloc(void** memory, size_t bytes) {
  return cudaMalloc(memory, bytes);
}
KVC_FAKE_EXPORT inline void kvc_fake_capture(int on) { fake().capturing = on; }
KVC_FAKE_EXPORT inline void kvc_fake_has_code(int yes) { fake().has_code = yes; }
KVC_FAKE_EXPORT inline unsigned kvc_fake_count(const char* what) {
  if (!strcmp(what, "most_ctas")) return fake().most_ctas;
  if (!strcmp(what, "launches")) return fake().launches;
  if (!strcmp(what, "copies")) return fake().copies;
  if (!strcmp(what, "device")) return fake_thread().device;
  if (!strcmp(what, "spoilt")) return fake().spoilt;
  if (!strcmp(what, "frees")) return fake().frees;
  if (!strcmp(what, "registered")) return unsigned(fake().registered.size());
  if (!strcmp(what, "contexts")) {  // a bit for each device
    unsigned found = 0;
    for (int device : fake().contexts) found |= 1u << device;
    return found;
  }
  return unsigned(fake().memory.size());
}

#endif
