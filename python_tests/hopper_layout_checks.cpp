// Checks csrc/cuda/hopper_layout.h against what the PTX ISA says, written down here a second time:
// test_hopper.py compiles and runs this. Usage: hopper_layout_checks descriptors|fragments|barriers
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/cuda/hopper_layout.h"

using namespace c2c::cuda::hopper;

namespace {

void require(bool holds, const char* what, long a = 0, long b = 0, long c = 0) {
  if (holds) return;
  std::printf("%s (%ld, %ld, %ld)\n", what, a, b, c);
  std::exit(1);
}

// The 128-byte swizzle: address bits 4 to 6 are combined with bits 7 to 9. Both the copy engine and
// wgmma apply it to the sum of everything.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Memory in units of 16-bit elements; what an element is.
struct Element {
  int stage = -1, operand = -1, row = -1, input = -1;
};

// Fills all stages as the copy engine does, then reads every operand of every wgmma through its
// decoded descriptor.
void check_descriptors() {
  for (const uint32_t dynamic : {0x400u, 0x410u, 0x7f0u, 0x800u, 0x8f80u}) {
    const uint32_t stages = align_stages(dynamic);
    require(stages % 1024 == 0 && stages >= dynamic, "stages must be aligned", dynamic);
    require(stages + kStages * kStageBytes <= dynamic + kSharedBytes, "stages must fit", dynamic);
    std::vector<Element> memory((dynamic + kSharedBytes) / 2);
    for (int stage = 0; stage < kStages; ++stage) {
      for (int operand = 0; operand < 2; ++operand) {
        const uint32_t box = stages + (operand == 0 ? x_offset(stage) : weight_offset(stage));
        for (int row = 0; row < (operand == 0 ? kTileRows : kTileCols); ++row) {
          for (int input = 0; input < kSlice; ++input) {
            Element& e = memory[swizzled(box + row * 128 + input * 2) / 2];
            require(e.stage < 0, "boxes must not overlap", stage, operand, row);
            e = {stage, operand, row, input};
          }
        }
      }
    }
    for (int stage = 0; stage < kStages; ++stage) {
      for (int operand = 0; operand < 2; ++operand) {
        for (int consumer = 0; consumer < (operand == 0 ? kConsumers : 1); ++consumer) {
          for (int step = 0; step < kSlice / 16; ++step) {
            const uint32_t rows = stages + (operand == 0 ? x_offset(stage) : weight_offset(stage));
            const uint64_t d = operand_descriptor(rows + operand_offset(consumer, step));
            const uint32_t start = (d & 0x3fff) << 4;
            const uint32_t leading = (d >> 16 & 0x3fff) << 4;
            const uint32_t stride = (d >> 32 & 0x3fff) << 4;
            const uint64_t fields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
            require((d & ~fields) == 0, "base offset and unused bits must be 0", stage, step);
            require(d >> 62 == 1, "the swizzle must be that of 128 bytes", stage, step);
            require(leading == 16, "the leading offset must be the one that is not used");
            // K-major: eight rows of 128 bytes, then the next eight at the stride.
            for (int row = 0; row < (operand == 0 ? 64 : 128); ++row) {
              for (int k = 0; k < 16; ++k) {
                const uint32_t at = swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
                const Element& e = memory.at(at / 2);
                require(e.stage == stage && e.operand == operand && e.row == consumer * 64 + row &&
                            e.input == step * 16 + k,
                        "wgmma must read the element that was meant", stage, row, step * 16 + k);
              }
            }
          }
        }
      }
    }
  }
}

// PTX ISA, accumulator D of wgmma.m64nNk16: register i of thread t holds
//   row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
void check_fragments() {
  std::vector<int> seen(kTileRows * kTileCols);
  require(kSums == 64, "a thread must have 64 sums", kSums);
  for (int thread = 0; thread < kConsumerThreads; ++thread) {
    const int t = thread % 128;
    for (int group = 0; group < kGroups; ++group) {
      for (int lower = 0; lower < 2; ++lower) {
        for (int next = 0; next < 2; ++next) {
          const int i = sum_index(group, lower) + next;
          const int row = thread_row(thread) + 8 * lower;
          const int col = thread_col(thread) + 8 * group + next;
          require(row == thread / 128 * 64 + 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2),
                  "row of a sum", thread, i, row);
          require(col == 8 * (i / 4) + 2 * (t % 4) + i % 2, "column of a sum", thread, i, col);
          ++seen[row * kTileCols + col];
        }
      }
    }
  }
  for (size_t i = 0; i < seen.size(); ++i) {
    require(seen[i] == 1, "every sum of the tile must be held once", i / kTileCols, i % kTileCols);
  }
}

// mbarrier: a phase completes when all its arrivals and bytes have come; the next one begins.
struct Barrier {
  int arrivals, pending, bytes = 0;
  unsigned phase = 0;
  explicit Barrier(int arrivals) : arrivals(arrivals), pending(arrivals) {}
  void arrive() {
    require(pending > 0, "more arrivals than a phase has");
    --pending;
    advance();
  }
  void advance() {
    if (pending > 0 || bytes > 0) return;
    ++phase;
    pending = arrivals;
  }
  bool passes(uint32_t parity) const { return (phase & 1) != parity; }
};

// copy_slices and multiply_slices of hopper_gemm.cuh, with copies that land, and warps that run, in
// random order.
void run_barriers(int slices, int rows, std::mt19937& random) {
  std::vector<Barrier> full(kStages, Barrier(kFullArrivals));
  std::vector<Barrier> empty(kStages, Barrier(empty_arrivals(rows)));
  std::vector<int> content(kStages, -1), readers(kStages, 0);       // warps that still read a stage
  std::vector<int> flying;                                          // slices on their way
  int copied = 0;                                                   // slices whose copy was started
  std::vector<int> warps(consumers_of(rows) * kWarpgroup / 32, 0);  // the next slice of each
  for (;;) {
    std::vector<std::pair<int, int>> possible;  // actor, index
    if (copied < slices && empty[stage_of(copied)].passes(empty_parity(copied))) {
      possible.push_back({0, 0});
    }
    for (size_t i = 0; i < flying.size(); ++i) possible.push_back({1, static_cast<int>(i)});
    for (size_t w = 0; w < warps.size(); ++w) {
      const int slice = warps[w];
      if (slice < slices && full[stage_of(slice)].passes(full_parity(slice))) {
        possible.push_back({2, static_cast<int>(w)});
      }
    }
    if (possible.empty()) break;
    const auto [actor, i] = possible[random() % possible.size()];
    if (actor == 0) {
      const int stage = stage_of(copied);
      require(readers[stage] == 0, "a stage is overwritten while it is read", slices, copied);
      full[stage].bytes += kStageBytes;
      content[stage] = -1;
      flying.push_back(copied++);
      full[stage].arrive();
    } else if (actor == 1) {
      const int slice = flying[i], stage = stage_of(slice);
      flying.erase(flying.begin() + i);
      content[stage] = slice;
      readers[stage] = static_cast<int>(warps.size());
      full[stage].bytes -= kStageBytes;
      full[stage].advance();
    } else {
      int& slice = warps[i];
      require(content[stage_of(slice)] == slice, "a warp reads another slice", slices, slice,
              content[stage_of(slice)]);
      if (slice > 0) {  // wait_products<1>: the slice before is done
        --readers[stage_of(slice - 1)];
        empty[stage_of(slice - 1)].arrive();
      }
      ++slice;
    }
  }
  require(copied == slices && flying.empty(), "the copier is stuck", slices, copied);
  for (const int slice : warps) require(slice == slices, "a warp is stuck", slices, slice);
}

void check_barriers() {
  std::mt19937 random(1);
  for (int slices = 1; slices <= 6 * kStages + 1; ++slices) {
    for (int repeat = 0; repeat < 200; ++repeat) {
      run_barriers(slices, kTileRows, random);
      run_barriers(slices, 1, random);
    }
  }
  for (const auto& [rows, consumers] : {std::pair{1, 1}, {64, 1}, {65, 2}, {128, 2}, {1000, 2}}) {
    require(consumers_of(rows) == consumers, "warpgroups that have rows", rows, consumers);
  }
  require(slices_of(64) == 1 && slices_of(65) == 2 && slices_of(1152) == 18, "slices of a depth");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string check = count == 2 ? arguments[1] : "";
  if (check == "descriptors") {
    check_descriptors();
  } else if (check == "fragments") {
    check_fragments();
  } else if (check == "barriers") {
    check_barriers();
  } else {
    std::printf("no such check: '%s'\n", check.c_str());
    return 2;
  }
}
