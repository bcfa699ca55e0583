// Answers for test_dispatch.py what a dispatch table (the macro TABLE names its file) says of a
// call: arguments are capability, dtype and rows, again and again; one path a line.
#include <cstdio>
#include <cstdlib>
#include <string>

#include TABLE

using c2c::cuda::CacheType;
using c2c::cuda::Path;

// At compile time too: the table and the look-up are constants.
static_assert(c2c::cuda::fastest_path(std::array<c2c::cuda::DispatchRow, 0>{}, 90,
                                      CacheType::kBfloat16, 1) == Path::kPlain);

int main(int count, char** arguments) {
  for (int i = 1; i + 2 < count; i += 3) {
    const std::string dtype = arguments[i + 1];
    const CacheType type = dtype == "float64"    ? CacheType::kFloat64
                           : dtype == "float32"  ? CacheType::kFloat32
                           : dtype == "bfloat16" ? CacheType::kBfloat16
                                                 : CacheType::kFloat16;
    const Path path = c2c::cuda::fastest_path(c2c::cuda::kDispatchTable, std::atoi(arguments[i]),
                                              type, std::atoll(arguments[i + 2]));
    std::puts(path == Path::kPlain ? "plain" : path == Path::kFused ? "fused" : "hopper");
  }
}
