// The three products of a convolution layer in oneDNN, as custom calls of XLA. `dense.h` and `depthwise.h` have kernels'
// gradients, which are slower there.
//
// Arrays are channels-last: images (N, *spatial, I), kernels (*size, I/groups, O), results (N, *out, O), float32.
// oneDNN reads images and results in place, and chooses the layout of kernels, which are copied.
//
// Threads: each call divides the batch into one piece per thread of XLA's pool, and few images into parts of their first
// spatial dim. oneDNN computes a piece on the thread that calls it. A second pool (OpenMP) would compete with XLA's for
// the cores.

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dense.h"
#include "depthwise.h"
#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Array = ffi::Buffer<ffi::F32>;
using Span = ffi::Span<const int64_t>;
using Ints = std::vector<int64_t>;

enum class Product : int64_t { correlate, input_grad, kernel_grad };

// Whether the processor has these instructions, and ONEDNN_MAX_CPU_ISA does not exclude them.
bool supports(dnnl::cpu_isa isa) {
  const int wanted = static_cast<int>(isa);
  return (static_cast<int>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
}

dnnl::engine& engine() {
  static auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

dnnl::stream& stream() {
  static thread_local dnnl::stream stream(engine());
  return stream;
}

// Runs oneDNN on the calling thread only, and restores the thread's OpenMP setting.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

// Memory of a thread that later calls use again, because new pages cost more than most kernels.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }

  float* of_size(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) size_ = 0;
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Addresses from begin to end.
struct Range {
  uintptr_t begin, end;
};

// The mapping without a file that has this address; an empty one if there is none, and for the heap.
Range mapping_of(uintptr_t address) {
  Range found{address, address};
  std::FILE* file = std::fopen("/proc/self/maps", "r");
  char line[512], path[2];
  while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
    unsigned long begin, end, inode;
    const int fields = std::sscanf(line, "%lx-%lx %*s %*s %*s %lu %1s", &begin, &end, &inode, path);
    if (fields < 3 || address >= end) continue;
    if (fields == 3 && inode == 0 && begin <= address) found = {begin, end};
    break;
  }
  if (file != nullptr) std::fclose(file);
  return found;
}

// The temporary memory of a program, of which `result` is a part, if it is a mapping of its own; otherwise `result`.
//
// The mapping of an address is usually the same in each call, and looking it up takes longer than a small convolution.
// It is looked up again after 64 calls, after 128 more, and so on. An old one does no harm.
Range temporary_memory(Range result) {
  constexpr uintptr_t least = 1 << 25;  // glibc keeps what is smaller
  constexpr size_t most = 4096;
  struct Known {
    uintptr_t end;
    int64_t calls, next;
  };
  static std::mutex mutex;
  static auto* all = new std::map<uintptr_t, Known>;  // by the first address
  std::lock_guard<std::mutex> lock(mutex);
  auto known = all->upper_bound(result.begin);
  if (known != all->begin()) --known;
  const bool is_known = known != all->end() && known->first <= result.begin && result.begin < known->second.end;
  if (!is_known || ++known->second.calls == known->second.next) {
    const int64_t next = is_known ? 2 * known->second.next : 64;
    if (is_known) all->erase(known);  // the mapping may begin earlier now
    if (all->size() >= most) all->clear();
    Range mapping = mapping_of(result.begin);
    if (mapping.begin == mapping.end) mapping = result;
    known = all->insert_or_assign(mapping.begin, Known{mapping.end, 0, next}).first;
  }
  const Range mapping{known->first, known->second.end};
  return mapping.end - mapping.begin < least ? result : mapping;
}

// Asks Linux for pages of 2 MB for a result and the temporary memory around it. If it has more than 32 MB, XLA maps it
// anew in each call, and the faults of its pages of 4 KB take up to a third of a training step.
void use_large_pages(const void* data, size_t bytes) {
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const Range memory = temporary_memory({address, address + bytes});
  const uintptr_t begin = (memory.begin + page - 1) / page * page, end = memory.end / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail: only a hint
}

// The static part of a call; shapes have the batch as their first element.
struct Call {
  Product product;
  Ints image, kernel, result;
  Ints stride, low, high, dilation;
  int64_t groups;

  Call(int64_t product, Span image, Span kernel, Span result, Span stride, Span low, Span high, Span dilation,
       int64_t groups)
      : product(static_cast<Product>(product)), image(list(image)), kernel(list(kernel)), result(list(result)),
        stride(list(stride)), low(list(low)), high(list(high)), dilation(list(dilation)), groups(groups) {}

  static Ints list(Span values) { return Ints(values.begin(), values.end()); }

  // The elements from the first to the last tap of a window, in the first spatial dim.
  int64_t span() const { return (kernel[0] - 1) * dilation[0] + 1; }

  // Whether `depthwise.h` computes it.
  bool is_depthwise_kernel_grad() const {
    return product == Product::kernel_grad && groups >= 8 && groups == image.back() && groups == result.back() &&
           supports(dnnl::cpu_isa::avx2);
  }

  // Whether `dense.h` computes it. For 1 × 1 kernels, oneDNN is faster.
  bool is_dense_kernel_grad() const {
    const bool is_spatial = std::any_of(kernel.begin(), kernel.end() - 2, [](int64_t size) { return size > 1; });
    const bool is_dilated = std::any_of(dilation.begin(), dilation.end(), [](int64_t d) { return d > 1; });
    return product == Product::kernel_grad && groups == 1 && stride.size() <= 2 && is_spatial && !is_dilated &&
           supports(dnnl::cpu_isa::avx2);
  }

  Ints key() const {
    Ints key{static_cast<int64_t>(product), groups};
    for (const Ints* part : {&image, &kernel, &result, &stride, &low, &high, &dilation}) {
      key.insert(key.end(), part->begin(), part->end());
    }
    return key;
  }
};

// The product of sizes from dim `first` on.
int64_t elements(const Ints& shape, size_t first = 0) {
  return std::accumulate(shape.begin() + first, shape.end(), int64_t{1}, std::multiplies<>());
}

memory::desc image_desc(const Ints& shape) {
  using Tag = memory::format_tag;
  constexpr Tag layouts[] = {Tag::nwc, Tag::nhwc, Tag::ndhwc};
  memory::dims dims{shape[0], shape.back()};
  dims.insert(dims.end(), shape.begin() + 1, shape.end() - 1);
  return memory::desc(dims, memory::data_type::f32, layouts[shape.size() - 3]);
}

// Dims (groups,) O, I, *size, and their strides in an array (*size, I, groups · O).
std::pair<memory::dims, memory::dims> kernel_dims(const Call& call) {
  const size_t ndim = call.kernel.size() - 2;
  const int64_t inputs = call.kernel[ndim], outputs = call.kernel[ndim + 1], groups = call.groups;
  memory::dims dims{outputs / groups, inputs}, strides{1, outputs};
  int64_t stride = inputs * outputs;
  memory::dims spatial(ndim);
  for (size_t dim = ndim; dim-- > 0; stride *= call.kernel[dim]) spatial[dim] = stride;
  dims.insert(dims.end(), call.kernel.begin(), call.kernel.begin() + ndim);
  strides.insert(strides.end(), spatial.begin(), spatial.end());
  if (groups > 1) {
    dims.insert(dims.begin(), groups);
    strides.insert(strides.begin(), outputs / groups);
  }
  return {dims, strides};
}

// A product, compiled by oneDNN.
struct Plan {
  memory::desc image, kernel, result, scratchpad;
  memory::desc plain_kernel;  // in XLA's layout
  dnnl::primitive product, reorder;
  bool reorders = false;
  std::string implementation;  // oneDNN's name, such as "jit:avx2"

  explicit Plan(const Call& call) {
    auto [dims, strides] = kernel_dims(call);
    const auto f32 = memory::data_type::f32;
    image = image_desc(call.image);
    result = image_desc(call.result);
    plain_kernel = memory::desc(dims, f32, strides);
    const memory::desc any(dims, f32, memory::format_tag::any);
    const Ints &stride = call.stride, &low = call.low, &high = call.high;
    Ints dilation = call.dilation;
    for (auto& d : dilation) d -= 1;
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);

    const auto direct = dnnl::algorithm::convolution_direct;
    const dnnl::convolution_forward::primitive_desc forward(
        engine(), dnnl::prop_kind::forward_training, direct, image, any, result, stride, dilation, low, high, attr);
    switch (call.product) {
      case Product::correlate:
        kernel = forward.weights_desc();
        scratchpad = forward.scratchpad_desc();
        implementation = forward.impl_info_str();
        product = dnnl::convolution_forward(forward);
        break;
      case Product::input_grad: {
        const dnnl::convolution_backward_data::primitive_desc desc(
            engine(), direct, image, any, result, stride, dilation, low, high, forward, attr);
        kernel = desc.weights_desc();
        scratchpad = desc.scratchpad_desc();
        implementation = desc.impl_info_str();
        product = dnnl::convolution_backward_data(desc);
        break;
      }
      case Product::kernel_grad: {
        const dnnl::convolution_backward_weights::primitive_desc desc(
            engine(), direct, image, any, result, stride, dilation, low, high, forward, attr);
        kernel = desc.diff_weights_desc();
        scratchpad = desc.scratchpad_desc();
        implementation = desc.impl_info_str();
        product = dnnl::convolution_backward_weights(desc);
        break;
      }
    }
    reorders = kernel != plain_kernel;
    if (reorders) {
      const bool back = call.product == Product::kernel_grad;
      const auto &from = back ? kernel : plain_kernel, &to = back ? plain_kernel : kernel;
      reorder = dnnl::reorder(dnnl::reorder::primitive_desc(engine(), from, engine(), to));
    }
  }

  // Runs the product on channels-last arrays; `kernels` is in XLA's layout.
  void run(Product which, float* images, float* kernels, float* results) const {
    static thread_local Buffer scratch, reordered;
    const bool weights = which == Product::kernel_grad, data = which == Product::input_grad;
    float* own = reorders ? reordered.of_size(kernel.get_size()) : kernels;
    const memory plain(plain_kernel, engine(), kernels), chosen(kernel, engine(), own);
    if (reorders && !weights) reorder.execute(stream(), {{DNNL_ARG_FROM, plain}, {DNNL_ARG_TO, chosen}});
    product.execute(stream(), {
        {data ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, memory(image, engine(), images)},
        {weights ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, chosen},
        {data || weights ? DNNL_ARG_DIFF_DST : DNNL_ARG_DST, memory(result, engine(), results)},
        {DNNL_ARG_SCRATCHPAD, memory(scratchpad, engine(), scratch.of_size(scratchpad.get_size()))},
    });
    if (reorders && weights) reorder.execute(stream(), {{DNNL_ARG_FROM, chosen}, {DNNL_ARG_TO, plain}});
    stream().wait();
  }
};

// The plan of a call, made once per process.
const Plan& plan_of(const Call& call) {
  static std::mutex mutex;
  static auto* plans = new std::map<Ints, std::unique_ptr<const Plan>>;
  const Ints key = call.key();
  std::lock_guard<std::mutex> lock(mutex);
  auto& plan = (*plans)[key];
  if (!plan) plan = std::make_unique<const Plan>(call);
  return *plan;
}

// Some examples of a call, or some rows of one example: a call whose arrays begin at elements `image` and `result`.
struct Part {
  Call call;
  int64_t image = 0, result = 0;
  bool empty = false;  // whether no element of the image is in any of the windows
  int64_t first_output = 0, last_output = call.result.back();  // of `dense.h`
};

Part examples_of(const Call& call, int64_t first, int64_t count) {
  Part part{call, first * elements(call.image, 1), first * elements(call.result, 1)};
  part.call.image[0] = part.call.result[0] = count;
  return part;
}

// The rows from `begin` to `end` of the first spatial dim: of the image for its gradient, otherwise of the result.
Part rows_of(const Call& call, int64_t example, int64_t begin, int64_t end) {
  Part part = examples_of(call, example, 1);
  const int64_t stride = call.stride[0], low = call.low[0], images = call.image[1], results = call.result[1];
  const int64_t span = call.span();
  int64_t image = begin, image_end = end, result = begin, result_end = end;
  if (call.product == Product::input_grad) {  // the windows that have one of the rows
    result = std::max<int64_t>(0, begin + low - span + stride) / stride;
    result_end = std::max(result, std::min(results, (end - 1 + low) / stride + 1));
  } else {
    image = std::clamp<int64_t>(begin * stride - low, 0, images);
    image_end = std::clamp((end - 1) * stride - low + span, image, images);
  }
  part.image += image * elements(call.image, 2);
  part.result += result * elements(call.result, 2);
  part.call.image[1] = image_end - image;
  part.call.result[1] = result_end - result;
  part.call.low[0] = image + low - result * stride;
  part.call.high[0] = (result_end - result - 1) * stride + span - part.call.low[0] - part.call.image[1];
  part.empty = image == image_end || result == result_end;
  return part;
}

// Divides a call into parts of `size` examples.
std::vector<Part> examples(const Call& call, int64_t size) {
  const int64_t batch = call.image[0];
  std::vector<Part> result;
  for (int64_t n = 0; n < batch; n += size) result.push_back(examples_of(call, n, std::min(size, batch - n)));
  return result;
}

// Divides a call into parts for a number of threads.
std::vector<Part> divide(const Call& call, int64_t threads) {
  const int64_t batch = call.image[0];
  const int64_t rows = call.product == Product::input_grad ? call.image[1] : call.result[1];
  const int64_t multiplications = elements(call.result, 1) * elements(call.kernel) / call.result.back();
  constexpr int64_t least = 1 << 19;  // multiplications that take longer than the start of a thread
  int64_t parts = std::min(threads / std::gcd(threads, batch), (2 * threads + batch - 1) / batch);
  parts = std::min({parts, rows, multiplications / least});
  if (batch < 2 * threads && parts > 1 && call.stride[0] <= call.span()) {
    std::vector<Part> result;
    for (int64_t n = 0; n < batch; n++) {
      for (int64_t i = 0; i < parts; i++) result.push_back(rows_of(call, n, rows * i / parts, rows * (i + 1) / parts));
    }
    return result;
  }
  return examples(call, (batch + threads - 1) / threads);
}

// Divides the gradient of a kernel that is larger than the images and results: no thread then needs sums of its own.
std::vector<Part> divide_outputs(const Call& call, int64_t threads, int64_t tile) {
  const int64_t outputs = call.result.back(), tiles = (outputs + tile - 1) / tile, parts = std::min(threads, tiles);
  std::vector<Part> result;
  for (int64_t i = 0; i < parts; i++) {
    Part part{call};
    part.first_output = tiles * i / parts * tile;
    part.last_output = std::min(outputs, tiles * (i + 1) / parts * tile);
    result.push_back(part);
  }
  return result;
}

// The last spatial dims of a `jaxcnn::Depthwise` or `jaxcnn::Dense` are those of the call.
template <typename Geometry>
Geometry geometry(const Call& call) {
  Geometry geometry;
  const size_t ndim = call.stride.size(), first = geometry.image.size() - ndim;
  std::copy_n(call.image.begin() + 1, ndim, geometry.image.begin() + first);
  std::copy_n(call.result.begin() + 1, ndim, geometry.result.begin() + first);
  std::copy_n(call.kernel.begin(), ndim, geometry.kernel.begin() + first);
  std::copy_n(call.stride.begin(), ndim, geometry.stride.begin() + first);
  std::copy_n(call.low.begin(), ndim, geometry.low.begin() + first);
  return geometry;
}

jaxcnn::Depthwise depthwise(const Call& call) {
  auto depthwise = geometry<jaxcnn::Depthwise>(call);
  std::copy(call.dilation.rbegin(), call.dilation.rend(), depthwise.dilation.rbegin());
  depthwise.channels = call.groups;
  return depthwise;
}

jaxcnn::Dense dense(const Call& call) {
  auto dense = geometry<jaxcnn::Dense>(call);
  dense.inputs = call.image.back();
  dense.outputs = call.result.back();
  return dense;
}

// Pieces of work. Any thread takes the next piece until none is left. The caller takes pieces as well and then waits
// for started ones only, so a pool whose threads are all callers makes progress.
class Pieces : public std::enable_shared_from_this<Pieces> {
 public:
  Pieces(int64_t count, std::function<void(int64_t)> run) : count_(count), run_(std::move(run)) {}

  void run_on(ffi::ThreadPool& pool) {
    for (int64_t i = 1; i < count_; i++) pool.Schedule([self = shared_from_this()] { self->take(); });
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == count_; });
    if (!error_.empty()) throw std::runtime_error(error_);
  }

 private:
  void take() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
      std::string error;
      try {
        OneThread one_thread;
        run_(i);
      } catch (const std::exception& e) {
        error = e.what();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error.empty()) error_ = error;
      if (++done_ == count_) all_done_.notify_all();
    }
  }

  const int64_t count_;
  const std::function<void(int64_t)> run_;  // called for pieces below count_ only, so its captures outlive the calls
  std::atomic<int64_t> next_{0};
  int64_t done_ = 0;
  std::string error_;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// If `each`, `kernel` has the gradient of each example, one after the other.
void compute(ffi::ThreadPool& pool, const Call& call, bool each, float* image, float* kernel, float* result) {
  static thread_local Buffer buffer;
  const bool wide = supports(dnnl::cpu_isa::avx512_core);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), size = elements(call.kernel);
  const int64_t tile = wide ? jaxcnn::outputs_of_tile<jaxcnn::Avx512> : jaxcnn::outputs_of_tile<jaxcnn::Avx2>;
  const bool by_output = !each && call.is_dense_kernel_grad() && call.result.back() > tile &&
                         size > elements(call.image) + elements(call.result);
  const bool sums = call.product == Product::kernel_grad && !each && !by_output;
  const auto parts = each ? examples(call, 1) : by_output ? divide_outputs(call, threads, tile) : divide(call, threads);
  const int64_t count = parts.size();

  // The gradient of the kernel is the sum over all parts; the first one is computed in place.
  float* others = sums ? buffer.of_size((count - 1) * size * sizeof(float)) : nullptr;
  auto work = [&](int64_t i) {
    const Call& part = parts[i].call;
    float* kernels = each ? kernel + i * size : sums && i > 0 ? others + (i - 1) * size : kernel;
    float *images = image + parts[i].image, *results = result + parts[i].result;
    if (parts[i].empty) {
      if (part.product == Product::correlate) std::fill_n(results, elements(part.result), 0.0f);
      if (part.product == Product::input_grad) std::fill_n(images, elements(part.image), 0.0f);
      if (part.product == Product::kernel_grad) std::fill_n(kernels, size, 0.0f);
    } else if (part.is_depthwise_kernel_grad()) {
      auto run = wide ? jaxcnn::depthwise_kernel_grad<jaxcnn::Avx512> : jaxcnn::depthwise_kernel_grad<jaxcnn::Avx2>;
      run(depthwise(part), part.image[0], images, results, kernels);
    } else if (part.is_dense_kernel_grad()) {
      auto run = wide ? jaxcnn::dense_kernel_grad<jaxcnn::Avx512> : jaxcnn::dense_kernel_grad<jaxcnn::Avx2>;
      run(dense(part), part.image[0], parts[i].first_output, parts[i].last_output, images, results, kernels);
    } else {
      plan_of(part).run(part.product, images, kernels, results);
    }
  };
  std::make_shared<Pieces>(count, work)->run_on(pool);
  for (int64_t i = 0; sums && i < count - 1; i++) {
    for (int64_t j = 0; j < size; j++) kernel[j] += others[i * size + j];
  }
}

// Argument and result are the two factors and the product, in the order of jaxcnn/kernels. A gradient of the kernel with
// one more dim has the gradient of each example.
ffi::Error run(ffi::ThreadPool pool, Array a, Array b, ffi::Result<Array> c, int64_t product, Span stride, Span low,
               Span high, Span dilation, int64_t groups) {
  const auto which = static_cast<Product>(product);
  Array *image = &a, *kernel = &b, *result = &*c;
  if (which == Product::input_grad) image = &*c, result = &a;
  if (which == Product::kernel_grad) kernel = &*c, result = &b;
  const bool each = which == Product::kernel_grad && kernel->dimensions().size() > image->dimensions().size();
  const Span shape(kernel->dimensions().begin() + each, kernel->dimensions().size() - each);
  const Call call(product, image->dimensions(), shape, result->dimensions(), stride, low, high, dilation, groups);
  use_large_pages(c->untyped_data(), c->size_bytes());
  try {
    compute(pool, call, each, image->typed_data(), kernel->typed_data(), result->typed_data());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jaxcnn.native: ") + e.what());
  }
  return ffi::Error::Success();
}

// Copies an array, usually a kernel, to temporary memory, before XLA itself writes a large result there.
ffi::Error copy_to_large_pages(Array from, ffi::Result<Array> to) {
  use_large_pages(to->untyped_data(), to->size_bytes());
  std::memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
  return ffi::Error::Success();
}

}  // namespace

// Writes oneDNN's name of the kernel for a product, or an empty string if it has none.
extern "C" void jaxcnn_implementation(int64_t product, int64_t ndim, const int64_t* image, const int64_t* kernel,
                                      const int64_t* result, const int64_t* stride, const int64_t* low,
                                      const int64_t* high, const int64_t* dilation, int64_t groups, char* name,
                                      int64_t size) {
  const size_t dims = static_cast<size_t>(ndim), all = dims + 2;
  const Call call(product, Span(image, all), Span(kernel, all), Span(result, all), Span(stride, dims), Span(low, dims),
                  Span(high, dims), Span(dilation, dims), groups);
  std::string found;
  try {
    OneThread one_thread;
    const std::string isa = supports(dnnl::cpu_isa::avx512_core) ? "avx512" : "avx2";
    if (call.is_depthwise_kernel_grad()) {
      found = "depthwise:" + isa;
    } else if (call.is_dense_kernel_grad()) {
      found = "dense:" + isa;
    } else {
      found = plan_of(call).implementation;
    }
  } catch (const std::exception&) {
  }
  std::strncpy(name, found.c_str(), size - 1);
  name[size - 1] = 0;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcnn_convolution, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("product")
                                  .Attr<Span>("stride")
                                  .Attr<Span>("low")
                                  .Attr<Span>("high")
                                  .Attr<Span>("dilation")
                                  .Attr<int64_t>("groups"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcnn_copy_to_large_pages, copy_to_large_pages,
                              ffi::Ffi::Bind().Arg<Array>().Ret<Array>());
