// The kernel's gradient of a convolution in one or two dims, without dilation or groups:
//
//   w[k, j, o] = Σ_{n, r, p} x[n, r·s + k − lo, p·s·I + j] · y[n, r, p, o]
//
// where j counts the channels of all taps of a row. They are adjacent in a channels-last row, so each k is a product of
// matrices (J × windows) · (windows × O), whose first factor is read from the image without a copy. oneDNN's kernels take
// 1.3 to 1.7 times as long with AVX2, and 0.7 to 1.7 times with AVX-512.

#ifndef JAXCNN_NATIVE_DENSE_H_
#define JAXCNN_NATIVE_DENSE_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace jaxcnn {

// Height and width. An image in one dim has height 1.
using Sides = std::array<int64_t, 2>;

struct Dense {
  Sides image{1, 1}, kernel{1, 1}, result{1, 1}, stride{1, 1}, low{0, 0};
  int64_t inputs, outputs;
};

// Windows of images and elements of their results, in rows. x is the first element of the first window.
struct Windows {
  const float *x, *y;
  int64_t images, rows, row;  // `row` windows in each of `rows` rows
  int64_t x_image, x_row, x_step, y_image, y_step;

  int64_t y_row() const { return row * y_step; }
};

// sums[j · sums_row + o] += Σ_windows x[j] · y[o] for j < height and o < lanes · vectors, with the sums in registers.
template <typename Isa, int height, int vectors>
struct Tile {
  using Vector = typename Isa::Vector;

  const Windows& windows;
  float* sums;
  int64_t sums_row;

  __attribute__((always_inline)) inline void operator()() const {
    Vector sum[height][vectors];
#pragma GCC unroll 32
    for (int j = 0; j < height; j++) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) sum[j][v] = reinterpret_cast<Vector*>(sums + j * sums_row)[v];
    }
    for (int64_t i = 0; i < windows.images * windows.rows; i++) {
      const int64_t n = i / windows.rows, r = i % windows.rows;
      const float* x = windows.x + n * windows.x_image + r * windows.x_row;
      const float* y = windows.y + n * windows.y_image + r * windows.y_row();
      for (int64_t p = 0; p < windows.row; p++, x += windows.x_step, y += windows.y_step) {
        Vector values[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) values[v] = reinterpret_cast<const Vector*>(y)[v];
#pragma GCC unroll 32
        for (int j = 0; j < height; j++) {
#pragma GCC unroll 2
          for (int v = 0; v < vectors; v++) sum[j][v] += x[j] * values[v];
        }
      }
    }
#pragma GCC unroll 32
    for (int j = 0; j < height; j++) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) reinterpret_cast<Vector*>(sums + j * sums_row)[v] = sum[j][v];
    }
  }
};

// The same for j < count, in tiles of at most `height`.
template <typename Isa, int height, int vectors>
inline void add_tiles(Windows windows, float* sums, int64_t sums_row, int64_t count) {
  for (; count >= height; count -= height, windows.x += height, sums += height * sums_row) {
    Isa::run(Tile<Isa, height, vectors>{windows, sums, sums_row});
  }
  if constexpr (height > 1) {
    if (count > 0) add_tiles<Isa, height - 1, vectors>(windows, sums, sums_row, count);
  }
}

// Copies a row with zeros on both sides.
inline void pad_row(const float* row, int64_t low, int64_t elements, int64_t size, float* padded) {
  low = std::min(low, size);
  const int64_t count = std::min(elements, size - low);
  std::fill_n(padded, low, 0.0f);
  std::copy_n(row, count, padded + low);
  std::fill(padded + low + count, padded + size, 0.0f);
}

// Copies `real` elements of each result of a row, followed by zeros.
inline void pack(const float* y, int64_t step, int64_t row, int64_t real, int64_t lanes, float* packed) {
  for (int64_t p = 0; p < row; p++, y += step, packed += lanes) {
    std::copy_n(y, real, packed);
    std::fill(packed + real, packed + lanes, 0.0f);
  }
}

// Outputs that are computed together.
template <typename Isa>
constexpr int64_t outputs_of_tile = 2 * Isa::lanes;

// Computes outputs [first, last) of w from `batch` channels-last images x and results y; `first` is a multiple of
// `outputs_of_tile`. If an image has few windows, the windows of several images are summed before sums are stored.
template <typename Isa>
void dense_kernel_grad(const Dense& d, int64_t batch, int64_t first, int64_t last, const float* x, const float* y,
                       float* w) {
  constexpr int64_t tile = outputs_of_tile<Isa>, about = 128;  // windows that are summed before sums are stored
  const int64_t height = d.result[0], width = d.result[1], taps = d.kernel[1] * d.inputs;
  const int64_t image_row = d.image[1] * d.inputs, step = d.stride[1] * d.inputs;
  const int64_t reach = (width - 1) * step + taps, low = d.low[1] * d.inputs;
  const bool pads = low > 0 || reach > image_row;
  const int64_t x_row = pads ? reach : image_row, x_image = d.image[0] * x_row;
  const int64_t columns = std::min(width, 2 * about), rows = std::max<int64_t>(1, about / columns);
  const int64_t images = std::max<int64_t>(1, about / (height * width));
  const int64_t all = last - first, outputs = (all + Isa::lanes - 1) / Isa::lanes * Isa::lanes;  // in whole vectors

  static thread_local std::vector<float> padded, packed, wider;
  float* sums = w + first;
  int64_t sums_row = d.outputs;
  if (outputs > all) {
    wider.resize(d.kernel[0] * taps * outputs);
    sums = wider.data();
    sums_row = outputs;
  }
  if (pads) padded.resize(std::min(images, batch) * x_image);
  for (int64_t i = 0; i < d.kernel[0] * taps; i++) std::fill_n(sums + i * sums_row, outputs, 0.0f);
  for (int64_t n = 0; n < batch; n += images) {
    const int64_t count = std::min(images, batch - n), y_all = height * width * d.outputs;
    const float *image = x + n * d.image[0] * image_row, *result = y + n * y_all;
    if (pads) {
      for (int64_t i = 0; i < count * d.image[0]; i++) {
        pad_row(image + i * image_row, low, image_row, reach, &padded[i * reach]);
      }
      image = padded.data();
    }
    for (int64_t top = 0; top < height; top += rows) {
      const int64_t bottom = std::min(top + rows, height);
      for (int64_t left = 0; left < width; left += columns) {
        const int64_t row = std::min(columns, width - left);
        for (int64_t o = first; o < last; o += tile) {
          const int64_t lanes = std::min(tile, first + outputs - o), real = std::min(tile, last - o);
          const int64_t packed_row = row * lanes, packed_image = (bottom - top) * packed_row;
          packed.resize(count * packed_image);
          for (int64_t i = 0; i < count; i++) {
            for (int64_t r = top; r < bottom; r++) {
              const float* from = result + i * y_all + (r * width + left) * d.outputs + o;
              pack(from, d.outputs, row, real, lanes, &packed[i * packed_image + (r - top) * packed_row]);
            }
          }
          for (int64_t k = 0; k < d.kernel[0]; k++) {
            // The rows whose row of the image is not padding.
            int64_t begin = top, end = bottom;
            while (begin < end && begin * d.stride[0] + k < d.low[0]) begin++;
            while (begin < end && (end - 1) * d.stride[0] + k - d.low[0] >= d.image[0]) end--;
            if (begin == end) continue;
            const Windows windows{
                image + (begin * d.stride[0] + k - d.low[0]) * x_row + left * step,
                &packed[(begin - top) * packed_row],
                count, end - begin, row, x_image, d.stride[0] * x_row, step, packed_image, lanes};
            float* part = sums + k * taps * sums_row + (o - first);
            if (lanes == tile) add_tiles<Isa, Isa::rows_of_two, 2>(windows, part, sums_row, taps);
            if (lanes < tile) add_tiles<Isa, Isa::rows_of_one, 1>(windows, part, sums_row, taps);
          }
        }
      }
    }
  }
  for (int64_t i = 0; outputs > all && i < d.kernel[0] * taps; i++) {
    std::copy_n(sums + i * outputs, all, w + i * d.outputs + first);
  }
}

}  // namespace jaxcnn

#endif  // JAXCNN_NATIVE_DENSE_H_
