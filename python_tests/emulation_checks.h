// What emulation_checks.cpp and emulation_faults.cpp share: PROGRAM NAME runs one check and says
// "ok", or what the emulation or a comparison had to say; without a name it lists them.
#pragma once

#define C2C_EMULATE
#include <cstdio>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>

#include "device.h"

#define CHECK(name) {#name, name}

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("expected: " + what);
}

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, A... args) {
  c2c::launch("check_kernel", kernel, grid, block, shared_bytes, nullptr, args...);
}

inline int run_check(int argc, char** argv, const std::map<std::string, void (*)()>& checks) {
  const auto check = argc == 2 ? checks.find(argv[1]) : checks.end();
  if (check == checks.end()) {
    for (const auto& [name, function] : checks) std::printf("%s\n", name.c_str());
    return 2;
  }
  try {
    check->second();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("ok\n");
  return 0;
}
