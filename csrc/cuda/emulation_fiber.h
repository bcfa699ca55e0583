// Stacks to switch between, for the threads of an emulated block.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define C2C_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define C2C_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(C2C_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace c2c {
namespace emulation {

#if defined(__x86_64__)
// Puts aside the registers that outlive a call and goes on where the other stack was left.
// swapcontext does that too, but asks the system for the signal mask: four times the time of a
// product of fragments, seven times that of a barrier.
__attribute__((naked, noinline, noipa)) inline void jump(void** /*leaving*/, void* /*entering*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

class Stack {
 public:
  void prepare(void* memory, std::size_t bytes, void (*enter)()) {
    void** const end = reinterpret_cast<void**>(static_cast<char*>(memory) + bytes);
    void** const top = end - 8;  // six registers, where `ret` goes, where that would return to
    for (void** p = top; p != end; ++p) *p = nullptr;
    top[6] = reinterpret_cast<void*>(enter);
    top_ = top;
  }
  void leave_for(Stack& other) { jump(&top_, other.top_); }

 private:
  void* top_ = nullptr;
};
#else
class Stack {
 public:
  void prepare(void* memory, std::size_t bytes, void (*enter)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, enter, 0);
  }
  void leave_for(Stack& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#endif

class Fiber {
 public:
  Fiber() = default;  // stands for whoever switches first

  // Calls body(argument), which never returns, at the first switch to it.
  Fiber(void (*body)(void*), void* argument) : body_(body), argument_(argument) {
    memory_ = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("c2c_ext emulation: no memory for a stack");
    mprotect(memory_, kGuardBytes, PROT_NONE);  // an overflow stops here
    bottom_ = static_cast<char*>(memory_) + kGuardBytes;
    bytes_ = kStackBytes;
    stack_.prepare(static_cast<char*>(memory_) + kGuardBytes, kStackBytes, &Fiber::enter);
  }
  ~Fiber() {
    if (memory_) munmap(memory_, kGuardBytes + kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which must be the running one, for `next`; returns when it is switched to.
  void switch_to(Fiber& next) {
    leaving() = this;
    entering() = &next;
#if defined(C2C_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
    stack_.leave_for(next.stack_);
    arrived();
  }

 private:
  static constexpr std::size_t kGuardBytes = 64 * 1024;  // whole pages, whatever their size
  static constexpr std::size_t kStackBytes = 512 * 1024;

  static Fiber*& leaving() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static Fiber*& entering() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber& self = *entering();
    self.arrived();
    self.body_(self.argument_);
  }

  void arrived() {
#if defined(C2C_ADDRESS_SANITIZER)
    Fiber& from = *leaving();  // the first fiber learns here where its own stack lies
    __sanitizer_finish_switch_fiber(fake_stack_, &from.bottom_, &from.bytes_);
#endif
  }

  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  Stack stack_;
  void* memory_ = nullptr;
  const void* bottom_ = nullptr;
  std::size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace emulation
}  // namespace c2c
