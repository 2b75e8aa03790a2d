// libnccl's C API as kvconnect/transport/nccl_library.py uses it, over fake_cuda's streams and a Unix
// socket between the two ranks, which may be in one process or two. tests/gpu holds a real libnccl to
// the same tests.
//
// As strict as NCCL, or stricter: communicators must be non-blocking, their device the current one,
// and they are not to be used before ncclCommGetAsyncError has said ncclSuccess; work reaches its
// stream only then, and the first time not before the peer has begun work, too; sends and receives
// match in order and must match in size; a kernel whose peer is silent stays in its stream until the
// communicator is aborted, and keeps all behind it waiting; an abort waits, and may be long.
//
// kvc_fake_nccl(name, value) turns faults on and reads counters; see the end.
#include <nccl.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// What nccl_library.py believes of ncclConfig_t, of whichever nccl.h this is.
static_assert(offsetof(ncclConfig_t, magic) == 8 && offsetof(ncclConfig_t, blocking) == 16 &&
              offsetof(ncclConfig_t, minCTAs) == 24 && offsetof(ncclConfig_t, netName) == 32);
static_assert(ncclInProgress == 7 && ncclUint8 == 1 && sizeof(ncclUniqueId) == 128);

namespace {

std::atomic<int> fault_version{NCCL_VERSION_CODE};
std::atomic<int> fault_init{0};      // 1: never ends; 2: fails at once; 3: fails later
std::atomic<int> fault_silent{0};    // bytes never move
std::atomic<int> fault_deaf{0};      // nobody notices that the peer has gone, as over NVLink
std::atomic<int> fault_async{0};     // the next question for errors of a communicator finds one
std::atomic<int> fault_abort_ms{0};  // that an abort takes
std::atomic<int> count_alive{0}, count_aborted{0}, count_ctas{0}, count_device{-1};
const int SLOW = 2;  // questions until something begun has ended
thread_local std::string last_error;

ncclResult_t fails(ncclResult_t result, const char* why) { return last_error = why, result; }

// One direction of a group's work: a length, then bytes.
struct Part {
  bool send;
  char* data;
  size_t bytes, moved = 0, header_moved = 0;
  uint64_t header = 0;
  bool done() const { return header_moved == sizeof header && moved == bytes; }
};

struct Group {
  std::vector<Part> parts;
  FakeStream* stream = nullptr;
};

}  // namespace

struct ncclComm {
  int ranks, rank, listener = -1, socket = -1, asked = 0, cuda_device = 0;
  sockaddr_un address = {};
  socklen_t address_bytes = 0;
  bool made = false, greeted = false, connected = false;
  std::atomic<bool> aborted{false};
  std::atomic<int> error{ncclSuccess};
  std::shared_ptr<Group> begun;  // not in its stream yet
  ~ncclComm() {
    if (listener >= 0) close(listener);
    if (socket >= 0) close(socket);
  }
};

namespace {

std::mutex mutex;  // of alive
std::map<ncclComm*, std::shared_ptr<ncclComm>> alive;  // kernels hold theirs for longer

std::shared_ptr<ncclComm> find(ncclComm* handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = alive.find(handle);
  return found == alive.end() ? nullptr : found->second;
}

thread_local int depth = 0;
thread_local std::map<ncclComm*, std::shared_ptr<Group>> grouped;

void advance_init(ncclComm* comm) {
  if (fault_init == 3) comm->error = ncclSystemError;
  if (fault_init || ++comm->asked < SLOW) return;
  if (comm->ranks == 1) {
    comm->made = true;
  } else if (comm->rank == 0) {
    comm->socket = accept4(comm->listener, nullptr, nullptr, SOCK_NONBLOCK);
    comm->made = comm->socket >= 0;
  } else {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (connect(fd, (sockaddr*)&comm->address, comm->address_bytes) == 0)
      comm->socket = fd, comm->made = true;
    else
      close(fd);
  }
}

// Moves what can be moved of a part. False: the peer has gone.
bool advance(int socket, Part& part) {
  while (!part.done()) {
    const bool in_header = part.header_moved < sizeof part.header;
    size_t& moved = in_header ? part.header_moved : part.moved;
    char* at = (in_header ? (char*)&part.header : part.data) + moved;
    const size_t left = (in_header ? sizeof part.header : part.bytes) - moved;
    const ssize_t n = part.send ? ::send(socket, at, left, MSG_NOSIGNAL | MSG_DONTWAIT)
                                : ::recv(socket, at, left, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
    if (n <= 0) return false;
    moved += n;
    if (!part.send && part.header_moved == sizeof part.header && part.header != part.bytes)
      abort();  // NCCL's behaviour is undefined: so is the test that did it
  }
  return true;
}

void run(const std::shared_ptr<ncclComm>& comm, Group& group) {
  if (comm->aborted) return;  // the kernel leaves
  if (fault_silent || comm->error) {
    group.stream->stuck = true;
    return;
  }
  if (comm->ranks == 1) {  // a rank with itself: the i-th send is the i-th receive
    std::vector<Part*> sends, receives;
    for (Part& part : group.parts) (part.send ? sends : receives).push_back(&part);
    if (sends.size() != receives.size()) group.stream->stuck = true;
    for (size_t i = 0; i < sends.size() && i < receives.size(); ++i)
      memcpy(receives[i]->data, sends[i]->data, receives[i]->bytes);
    return;
  }
  bool done = true;
  for (Part& part : group.parts) {
    if (!advance(comm->socket, part) && !fault_deaf) comm->error = ncclRemoteError;
    done = done && part.done();
  }
  if (!done) group.stream->stuck = true;
}

// Puts what was begun into its stream, as NCCL's thread does; the first time, when both ends have
// begun something.
void advance_work(const std::shared_ptr<ncclComm>& comm) {
  if (!comm->begun || ++comm->asked < SLOW) return;
  if (!comm->connected && comm->ranks == 2) {
    char byte = 'c';
    if (!comm->greeted) comm->greeted = send(comm->socket, &byte, 1, MSG_NOSIGNAL) == 1;
    if (recv(comm->socket, &byte, 1, MSG_DONTWAIT) != 1) return;
  }
  comm->connected = true;
  std::shared_ptr<Group> group;
  group.swap(comm->begun);
  group->stream->work.push_back([comm, group] { run(comm, *group); });
}

bool busy(ncclComm* comm) { return !comm->made || comm->begun; }

ncclResult_t add(bool send, void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                 cudaStream_t stream) {
  if (!find(comm)) return fails(ncclInvalidArgument, "no such communicator");
  if (busy(comm)) return fails(ncclInvalidArgument, "used before it returned ncclSuccess");
  if (type != ncclUint8 || peer < 0 || peer >= comm->ranks || (peer == comm->rank) != (comm->ranks == 1))
    return fails(ncclInvalidArgument, "wrong type or peer");
  int device = -1;
  cudaGetDevice(&device);
  if (device != comm->cuda_device) return fails(ncclInvalidUsage, "another device is current");
  if (!depth) return fails(ncclInvalidUsage, "the fake knows groups only");
  auto& group = grouped[comm];
  if (!group) group = std::make_shared<Group>();
  Part part = {send, (char*)data, count};
  if (send) part.header = count;
  group->stream = stream;
  group->parts.push_back(part);
  return ncclSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT ncclResult_t ncclGetVersion(int* version) { return *version = fault_version, ncclSuccess; }

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> number{0};
  memset(id, 0, sizeof *id);
  // NCCL's ids hold zeros, too: nobody may take them for a string
  snprintf(id->internal + 4, sizeof id->internal - 4, "fake-nccl-%d-%d", int(getpid()), ++number);
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* made, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t* config) {
  if (config->size < 40 || config->magic != NCCL_API_MAGIC || config->version < 21700)
    return fails(ncclInvalidArgument, "ncclConfig_t argument not initialized");
  if (config->blocking != 0) return fails(ncclInvalidUsage, "the fake does not block");
  if (config->maxCTAs != NCCL_CONFIG_UNDEF_INT && config->minCTAs > config->maxCTAs)
    return fails(ncclInvalidArgument, "invalid min/max channels");
  if (ranks < 1 || ranks > 2 || rank < 0 || rank >= ranks)
    return fails(ncclInvalidArgument, "invalid rank");
  if (fault_init == 2) return fails(ncclSystemError, "planned fault");
  auto comm = std::make_shared<ncclComm>();
  comm->ranks = ranks, comm->rank = rank;
  comm->address.sun_family = AF_UNIX;
  const size_t length = strnlen(id.internal + 4, 100);
  memcpy(comm->address.sun_path + 1, id.internal + 4, length);  // abstract: no file
  comm->address_bytes = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + length);
  if (ranks == 2 && rank == 0) {
    comm->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(comm->listener, (sockaddr*)&comm->address, comm->address_bytes) ||
        listen(comm->listener, 1))
      return fails(ncclSystemError, "the unique id was used before");
  }
  cudaGetDevice(&comm->cuda_device);
  count_device = comm->cuda_device, count_ctas = config->maxCTAs;
  ++count_alive;
  const std::lock_guard<std::mutex> lock(mutex);
  alive[comm.get()] = comm;
  *made = comm.get();
  return ncclInProgress;
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
  const std::shared_ptr<ncclComm> comm = find(handle);
  if (!comm) return fails(ncclInvalidArgument, "no such communicator");
  if (fault_async) comm->error = fault_async.exchange(0);
  if (!comm->made)
    advance_init(comm.get());
  else
    advance_work(comm);
  *error = comm->error ? ncclResult_t(int(comm->error)) : busy(comm.get()) ? ncclInProgress : ncclSuccess;
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const std::shared_ptr<ncclComm> comm = find(handle);
  if (!comm) return fails(ncclInvalidArgument, "no such communicator");
  for (int ms = 0; ms < fault_abort_ms; ++ms) usleep(1000);  // less once the fault is turned off
  comm->aborted = true;  // kernels that are there leave; their streams go on
  ++count_aborted, --count_alive;
  const std::lock_guard<std::mutex> lock(mutex);
  alive.erase(handle);
  return ncclSuccess;
}

EXPORT ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream) {
  return add(true, (char*)data, count, type, peer, comm, stream);
}

EXPORT ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
  return add(false, data, count, type, peer, comm, stream);
}

EXPORT ncclResult_t ncclGroupStart() { return ++depth, ncclSuccess; }

EXPORT ncclResult_t ncclGroupEnd() {
  if (depth == 0) return fails(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
  if (--depth) return ncclSuccess;
  for (auto& [comm, group] : grouped) comm->begun = group, comm->asked = 0;
  const bool any = !grouped.empty();
  grouped.clear();
  return any ? ncclInProgress : ncclSuccess;
}

EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  const char* texts[] = {"no error",         "unhandled cuda error", "unhandled system error",
                         "internal error",   "invalid argument",     "invalid usage",
                         "remote process exited or there was a network error",
                         "NCCL operation in progress"};
  return result >= 0 && result < 8 ? texts[result] : "unknown result code";
}

EXPORT const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

// Sets a fault if value >= 0; returns it, or a counter.
EXPORT int kvc_fake_nccl(const char* name, int value) {
  static const std::map<std::string, std::atomic<int>*> all = {
      {"version", &fault_version}, {"init", &fault_init},         {"silent", &fault_silent},
      {"deaf", &fault_deaf},       {"async", &fault_async},       {"abort_ms", &fault_abort_ms},
      {"alive", &count_alive},     {"aborted", &count_aborted},   {"ctas", &count_ctas},
      {"device", &count_device},
  };
  std::atomic<int>& one = *all.at(name);
  if (value >= 0) one = value;
  return one;
}
