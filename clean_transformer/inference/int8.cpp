// x W + b with W in 8 bits, for few rows. `int8.py` compiles this file, and describes the layout.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

namespace {

// As in int8.py: inputs with a common step, and outputs next to each other in memory.
constexpr int64_t GROUP = 16, TILE = 64;

// Bytes ahead of the weights in use. Without prefetching, the kernel waits for memory half the time.
constexpr int64_t AHEAD = 4096;

void one_tile(const float* x, const int8_t* W, const at::BFloat16* step, int64_t d_in, float* sums) {
  for (int64_t start = 0; start < d_in; start += GROUP) {
    float part[TILE] = {};
    const int64_t end = std::min(start + GROUP, d_in);
    for (int64_t i = start; i < end; i++) {
      const int8_t* weights = W + i * TILE;
#ifdef __GNUC__
      __builtin_prefetch(weights + AHEAD);
#endif
      // GCC 12 vectorizes the conversion to float only through int32.
      for (int64_t o = 0; o < TILE; o++)
        part[o] += x[i] * static_cast<float>(static_cast<int32_t>(weights[o]));
    }
    for (int64_t o = 0; o < TILE; o++)
      sums[o] += static_cast<float>(step[start / GROUP * TILE + o]) * part[o];
  }
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& W, const at::Tensor& step,
                       const at::Tensor& b) {
  const at::Tensor rows = x.contiguous();
  const int64_t n_rows = x.size(0), d_in = x.size(1), d_out = b.size(0), n_groups = W.size(1);
  at::Tensor output = at::empty({n_rows, d_out}, x.options());
  const float* inputs = rows.const_data_ptr<float>();
  const int8_t* weights = W.const_data_ptr<int8_t>();
  const at::BFloat16* steps = step.const_data_ptr<at::BFloat16>();
  const float* bias = b.const_data_ptr<float>();
  float* outputs = output.mutable_data_ptr<float>();
  at::parallel_for(0, W.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      for (int64_t row = 0; row < n_rows; row++) {
        float sums[TILE] = {};
        one_tile(inputs + row * d_in, weights + tile * n_groups * GROUP * TILE,
                 steps + tile * n_groups * TILE, d_in, sums);
        const int64_t first = tile * TILE, last = std::min(first + TILE, d_out);
        for (int64_t o = first; o < last; o++)
          outputs[row * d_out + o] = sums[o - first] + bias[o];
      }
    }
  });
  return output;
}

}  // namespace

TORCH_LIBRARY(clean_transformer, library) {
  library.def("int8_linear(Tensor x, Tensor W, Tensor step, Tensor b) -> Tensor");
  library.impl("int8_linear", c10::DispatchKey::CPU, &int8_linear);
}
