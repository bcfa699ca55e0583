// Runs the blocks of an emulated launch, one after the other. A block's threads are fibers: one
// runs until it waits (barrier, warp operation) or returns, then the first one in order that can
// run does. So a thread is as far ahead of, or behind, the others as barriers allow; with the
// opposite order (C2C_EMULATE_ORDER=reverse) each pair of threads is seen both ways round. Shared
// memory holds NaNs before each block.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation_fiber.h"
#include "emulation_shared.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace c2c {
namespace emulation {

// Where in the kernel's source a primitive was called.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// What a thread waits at.
struct Call {
  const char* what;
  uint32_t lanes;  // of its warp; 0: the whole block
  Place place;
  void* operands;
  bool without_returned;  // lanes that have returned need not come
  bool meets(const Call& other) const {
    return lanes == other.lanes && place.line == other.place.line && what == other.what &&
           std::strcmp(place.file, other.place.file) == 0;
  }
};

// Runs when all lanes have come; operands[l] is what lane l passed, for the lanes named.
using Complete = void (*)(void* const* operands, uint32_t lanes);

class Runner {
 public:
  struct Copy {
    void* to;
    const void* from;  // nullptr: zeros
    std::size_t bytes;
    int group;
  };
  struct Thread {
    Thread() : fiber(&Runner::thread_body, this) {}
    Fiber fiber;
    int number = 0;  // in the block
    uint3 index{};
    bool inside = false;  // its fiber is in the kernel
    bool returned = false;
    Call call{};
    std::vector<Copy> copies;  // not landed yet
    int groups = 0;            // closed
    int warp() const { return number / 32; }
    uint32_t bit() const { return 1u << (number % 32); }
  };

  static Runner& get() {
    static Runner runner;
    return runner;
  }

  // Runs kernel() for every thread of every block.
  void run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
           const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    reverse_ = order_is_reverse();
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    const auto refuse = [&](const std::string& why) {
      throw std::runtime_error(std::string("c2c_ext emulation: kernel ") + name + ": " + why);
    };
    if (count == 0 || count > 1024 || block.z > 64) {
      refuse("blocks have 1 to 1024 threads, at most 64 deep, got " + text(block));
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
      refuse("grids have at most 2147483647 x 65535 x 65535 blocks, got " + text(grid));
    }
    if (shared_bytes > kMaxDynamicShared) {
      refuse("dynamic shared memory has at most " + std::to_string(kMaxDynamicShared) +
             " bytes, got " + std::to_string(shared_bytes));
    }
    name_ = name;
    kernel_ = &kernel;
    SharedMemory shared(shared_bytes);
    StaticShared static_shared;
    shared_ = &shared;
    static_shared_ = &static_shared;
    count_ = static_cast<int>(count);
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    blockDim = block;
    gridDim = grid;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = reverse_ ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      run_block();
    }
  }

  // ---- called by the running thread ------------------------------------------------------------
  Thread& thread() { return *running_; }
  int lane() const { return running_->number % 32; }
  unsigned char* dynamic_shared() const { return shared_->data(); }
  bool is_shared(const void* p, std::size_t bytes) const {
    return shared_->holds(p, bytes) || static_shared_->holds(p, bytes);
  }

  [[noreturn]] void fail(const std::string& why, Place place) const {
    throw std::runtime_error(where() + ", thread " + text(running_->index) + ": " + why + " (" +
                             place.text() + ")");
  }

  void barrier(const char* what, Place place) {
    Thread& self = *running_;
    wait_at(self, {what, 0, place, nullptr, true});
    ++at_barrier_;
    release_barrier();
    pass_on(self);
    if (error_) throw Cancelled{};
  }

  void warp_operation(const char* what, uint32_t lanes, Place place, void* operands,
                      Complete complete, bool without_returned = false) {
    Thread& self = *running_;
    if (!(lanes & self.bit())) fail(std::string(what) + ": the mask lacks the calling lane", place);
    wait_at(self, {what, lanes, place, operands, without_returned});
    in_warp_operation_[self.warp()] |= self.bit();
    release_warp(self.warp(), self.call, complete);
    pass_on(self);
    if (error_) throw Cancelled{};
  }

 private:
  struct Cancelled {};                     // unwinds a thread's kernel after another's error
  using Masks = std::array<uint32_t, 32>;  // lanes, per warp

  static std::string text(const dim3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
  }
  static std::string text(const uint3& v) { return text(dim3(v.x, v.y, v.z)); }
  std::string where() const {
    return "c2c_ext emulation: kernel " + name_ + ", block " + text(blockIdx);
  }

  static bool order_is_reverse() {
    const char* order = std::getenv("C2C_EMULATE_ORDER");
    if (!order || std::strcmp(order, "forward") == 0) return false;
    if (std::strcmp(order, "reverse") == 0) return true;
    throw std::runtime_error(
        std::string("c2c_ext emulation: C2C_EMULATE_ORDER must be forward or reverse, got '") +
        order + "'");
  }

  // ---- scheduling ------------------------------------------------------------------------------
  void run_block() {
    shared_->poison();
    static_shared_->poison();
    error_ = nullptr;
    ready_ = alive_ = in_warp_operation_ = {};
    ready_warps_ = 0;
    at_barrier_ = 0;
    live_ = count_;
    for (int i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      thread.number = i;
      const unsigned n = static_cast<unsigned>(i);
      thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
      thread.returned = false;
      thread.copies.clear();
      thread.groups = 0;
      alive_[thread.warp()] |= thread.bit();
      make_ready(thread.warp(), thread.bit());
    }
    enter(*next_ready(), main_);
    if (error_) {
      for (int i = 0; i < count_; ++i) {
        if (threads_[i]->inside) enter(*threads_[i], main_);
      }
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (!shared_->margins_intact()) {
      throw std::runtime_error(where() + ": wrote outside its dynamic shared memory");
    }
  }

  static void thread_body(void* argument) {
    Thread& self = *static_cast<Thread*>(argument);
    Runner& runner = get();
    for (;;) {  // once per block
      self.inside = true;
      try {
        (*runner.kernel_)();
        runner.thread_returned(self);
      } catch (const Cancelled&) {
      } catch (...) {
        if (!runner.error_) runner.error_ = std::current_exception();
      }
      self.inside = false;
      runner.pass_on(self);
    }
  }

  void thread_returned(Thread& self) {
    self.returned = true;
    make_unready(self);
    alive_[self.warp()] &= ~self.bit();
    --live_;
    release_barrier();
    for (int lane = 0; lane < 32; ++lane) {
      const Thread* other = waiting_in_warp(self.warp(), lane);
      if (other && other->call.without_returned) release_warp(self.warp(), other->call, nullptr);
    }
  }

  void enter(Thread& next, Fiber& from) {
    running_ = &next;
    threadIdx = next.index;
    from.switch_to(next.fiber);
  }

  // Leaves `self` for the first thread that can run; for the caller of the launch if none can.
  void pass_on(Thread& self) {
    Thread* next = error_ ? nullptr : next_ready();
    if (next == &self) return;
    if (next) return enter(*next, self.fiber);
    if (!error_ && live_ > 0) {
      error_ = std::make_exception_ptr(
          std::runtime_error(where() + ": no thread can go on: " + what_threads_do()));
    }
    self.fiber.switch_to(main_);
  }

  Thread* next_ready() {
    if (!ready_warps_) return nullptr;
    const int warp = first(ready_warps_);
    return threads_[warp * 32 + first(ready_[warp])].get();
  }
  int first(uint32_t bits) const {
    return reverse_ ? 31 - __builtin_clz(bits) : __builtin_ctz(bits);
  }
  void make_ready(int warp, uint32_t lanes) {
    ready_[warp] |= lanes;
    ready_warps_ |= 1u << warp;
  }
  void make_unready(const Thread& thread) {
    ready_[thread.warp()] &= ~thread.bit();
    if (!ready_[thread.warp()]) ready_warps_ &= ~(1u << thread.warp());
  }

  void wait_at(Thread& self, const Call& call) {
    self.call = call;
    make_unready(self);
  }

  void release_barrier() {
    if (at_barrier_ == 0 || at_barrier_ < live_) return;
    const Thread* first = nullptr;
    for (int i = 0; i < count_; ++i) {
      const Thread& thread = *threads_[i];
      if (thread.returned) continue;
      if (first && !first->call.meets(thread.call)) {
        throw std::runtime_error(where() +
                                 ": threads wait at different barriers: " + what_threads_do());
      }
      first = &thread;
    }
    at_barrier_ = 0;
    for (int warp = 0; warp * 32 < count_; ++warp) {
      if (alive_[warp]) make_ready(warp, alive_[warp]);
    }
  }

  const Thread* waiting_in_warp(int warp, int lane) const {
    const bool waits = in_warp_operation_[warp] >> lane & 1u;
    return waits ? threads_[warp * 32 + lane].get() : nullptr;
  }

  void release_warp(int warp, const Call& call, Complete complete) {
    const uint32_t lanes = call.without_returned ? call.lanes & alive_[warp] : call.lanes;
    if ((in_warp_operation_[warp] & lanes) != lanes) return;
    void* operands[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1u)) continue;
      const Thread& thread = *threads_[warp * 32 + lane];
      if (!thread.call.meets(call)) return;
      operands[lane] = thread.call.operands;
    }
    if (complete) complete(operands, lanes);
    in_warp_operation_[warp] &= ~lanes;
    make_ready(warp, lanes);
  }

  // "31 at __syncthreads (x.cu:12), 1 returned": for errors.
  std::string what_threads_do() const {
    std::vector<std::pair<std::string, int>> counts;
    for (int i = 0; i < count_; ++i) {
      const Thread& thread = *threads_[i];
      const Call& call = thread.call;
      std::string what = "returned";
      if (!thread.returned) {
        what = std::string("at ") + call.what;
        if (call.lanes) {
          char mask[16];
          std::snprintf(mask, sizeof(mask), "0x%x", call.lanes);
          what += std::string(" of lanes ") + mask;
        }
        what += " (" + call.place.text() + ")";
      }
      std::size_t k = 0;
      while (k < counts.size() && counts[k].first != what) ++k;
      if (k == counts.size()) counts.emplace_back(what, 0);
      ++counts[k].second;
    }
    std::string all;
    for (const auto& [what, count] : counts) {
      all += (all.empty() ? "" : ", ") + std::to_string(count) + " " + what;
    }
    return all;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Thread>> threads_;  // kept from launch to launch: stacks cost time
  Fiber main_;
  std::string name_;
  const std::function<void()>* kernel_ = nullptr;
  SharedMemory* shared_ = nullptr;
  StaticShared* static_shared_ = nullptr;
  Thread* running_ = nullptr;
  bool reverse_ = false;
  int count_ = 0, live_ = 0, at_barrier_ = 0;
  Masks ready_{}, alive_{}, in_warp_operation_{};
  uint32_t ready_warps_ = 0;
  std::exception_ptr error_;
};

}  // namespace emulation
}  // namespace c2c
