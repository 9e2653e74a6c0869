// Which product of FP8 rows with FP8 weights runs on Hopper: of many rows sm90/product8.cu; of fewer cuBLASLt's, which
// cuts its depth where tiles are few, if the one that the process has knows scales of blocks (12.9 and newer). It is
// looked up at run time, since what Paddle comes with decides.
//
// In cuBLASLt's order of columns first, y^T [N, T] is the product of the weight, transposed, and of x^T: its A is the
// weight with a scale for each 128 x 128, its B the rows with a scale for each 128 of a row, K / 128 of them far apart.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>

#include "common.cuh"
#include "qwen1m/weight8.h"
#include "sm90/product8.h"

namespace qwen1m {
namespace cuda {
namespace {

// The part of cublasLt.h that is used, whose numbers are those of every version.
namespace lt {

using Handle = void*;
using Description = void*;
using Layout = void*;
using Preference = void*;

enum Status { kSuccess = 0 };
enum DataType { kFloat = 0, kFloat16 = 2, kBFloat16 = 14, kE4M3 = 28 };
enum ComputeType { kComputeFloat = 68 };
enum DescriptionAttribute {
  kTransposeA = 3,
  kTransposeB = 4,
  kScalesOfA = 17,
  kScalesOfB = 18,
  kScaleModeOfA = 31,
  kScaleModeOfB = 32
};
enum ScaleMode : int32_t { k128OfARow = 4, k128x128 = 5 };
enum Transpose : int32_t { kAsItIs = 0, kTransposed = 1 };
enum PreferenceAttribute { kWorkspaceBytes = 1 };
constexpr size_t kFirstVersion = 120900;

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

}  // namespace lt

// cuBLASLt's functions; those of a library that is not there are null.
struct Library {
  size_t (*version)() = nullptr;
  int (*create)(lt::Handle*) = nullptr;
  int (*create_description)(lt::Description*, int compute, int scale) = nullptr;
  int (*destroy_description)(lt::Description) = nullptr;
  int (*set)(lt::Description, int attribute, const void*, size_t) = nullptr;
  int (*create_layout)(lt::Layout*, int type, uint64_t rows, uint64_t columns, int64_t pitch) = nullptr;
  int (*destroy_layout)(lt::Layout) = nullptr;
  int (*create_preference)(lt::Preference*) = nullptr;
  int (*destroy_preference)(lt::Preference) = nullptr;
  int (*prefer)(lt::Preference, int attribute, const void*, size_t) = nullptr;
  int (*find)(lt::Handle, lt::Description, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d, lt::Preference,
              int wanted, lt::Heuristic*, int* found) = nullptr;
  int (*multiply)(lt::Handle, lt::Description, const void* alpha, const void* a, lt::Layout, const void* b, lt::Layout,
                  const void* beta, const void* c, lt::Layout, void* d, lt::Layout, const lt::Algorithm*, void*, size_t,
                  cudaStream_t) = nullptr;

  Library() {
    void* library = open();
    if (library == nullptr) return;
    bool whole = true;
    const auto look_up = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      whole = whole && function != nullptr;
    };
    look_up(version, "cublasLtGetVersion");
    look_up(create, "cublasLtCreate");
    look_up(create_description, "cublasLtMatmulDescCreate");
    look_up(destroy_description, "cublasLtMatmulDescDestroy");
    look_up(set, "cublasLtMatmulDescSetAttribute");
    look_up(create_layout, "cublasLtMatrixLayoutCreate");
    look_up(destroy_layout, "cublasLtMatrixLayoutDestroy");
    look_up(create_preference, "cublasLtMatmulPreferenceCreate");
    look_up(destroy_preference, "cublasLtMatmulPreferenceDestroy");
    look_up(prefer, "cublasLtMatmulPreferenceSetAttribute");
    look_up(find, "cublasLtMatmulAlgoGetHeuristic");
    look_up(multiply, "cublasLtMatmul");
    if (!whole) version = nullptr;
  }

  // The one that the process uses already, else the newest that is installed.
  static void* open() {
    const char* const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    for (const int loaded : {RTLD_NOLOAD, 0}) {
      for (const char* name : names) {
        if (void* library = dlopen(name, RTLD_LAZY | loaded)) return library;
      }
    }
    return nullptr;
  }

  bool has_block_scales() const { return version != nullptr && version() >= lt::kFirstVersion; }
};

const Library& library() {
  static const Library found;
  return found;
}

constexpr int64_t kWorkspaceBytes = 32 << 20;
constexpr int64_t kScaleMultiple = 4;  // of the scales of a row of blocks, behind which cuBLASLt wants a gap

int64_t padded_scales(const qwen1m_product8& a) {
  return ceil_div(a.in_features / a.weight.columns, kScaleMultiple) * kScaleMultiple;
}

bool needs_gaps(const qwen1m_product8& a) { return padded_scales(a) != a.in_features / a.weight.columns; }

// What describes a product, for as long as it is queued.
class Product {
 public:
  // `weight_scales`: with gaps.
  Product(const qwen1m_product8& a, const void* weight_scales) {
    const auto rows = static_cast<uint64_t>(a.x.rows), depth = static_cast<uint64_t>(a.in_features);
    const auto features = static_cast<uint64_t>(a.out_features);
    const int out = a.out_dtype == QWEN1M_FLOAT16 ? lt::kFloat16 : lt::kBFloat16;
    check(library().create_description(&description_, lt::kComputeFloat, lt::kFloat));
    set(lt::kTransposeA, lt::kTransposed);
    set(lt::kTransposeB, lt::kAsItIs);
    set(lt::kScaleModeOfA, lt::k128x128);
    set(lt::kScaleModeOfB, lt::k128OfARow);
    set(lt::kScalesOfA, weight_scales);
    set(lt::kScalesOfB, static_cast<const void*>(a.x.scales));
    check(library().create_layout(&weight_, lt::kE4M3, depth, features, a.in_features));
    check(library().create_layout(&x_, lt::kE4M3, depth, rows, a.in_features));
    check(library().create_layout(&y_, out, features, rows, a.out_features));
  }

  ~Product() {
    if (y_) library().destroy_layout(y_);
    if (x_) library().destroy_layout(x_);
    if (weight_) library().destroy_layout(weight_);
    if (description_) library().destroy_description(description_);
  }

  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  bool is_described() const { return described_; }

  // Whether there is an algorithm.
  bool find(lt::Handle handle, lt::Algorithm& algorithm) const {
    lt::Preference preference = nullptr;
    if (library().create_preference(&preference) != lt::kSuccess) return false;
    const auto most = static_cast<size_t>(kWorkspaceBytes);
    lt::Heuristic found{};
    int count = 0;
    const bool success =
        library().prefer(preference, lt::kWorkspaceBytes, &most, sizeof(most)) == lt::kSuccess &&
        library().find(handle, description_, weight_, x_, y_, y_, preference, 1, &found, &count) == lt::kSuccess &&
        count > 0 && found.status == lt::kSuccess;
    library().destroy_preference(preference);
    algorithm = found.algorithm;
    return success;
  }

  int queue(lt::Handle handle, const lt::Algorithm& algorithm, const qwen1m_product8& a, void* workspace,
            cudaStream_t stream) const {
    const float one = 1.0f, zero = 0.0f;
    return library().multiply(handle, description_, &one, a.weight.numbers, weight_, a.x.numbers, x_, &zero, a.y, y_,
                              a.y, y_, &algorithm, workspace, static_cast<size_t>(kWorkspaceBytes), stream);
  }

 private:
  void check(int status) { described_ = described_ && status == lt::kSuccess; }

  template <typename Value>
  void set(int attribute, Value value) {
    if (described_) check(library().set(description_, attribute, &value, sizeof(value)));
  }

  lt::Description description_ = nullptr;
  lt::Layout weight_ = nullptr, x_ = nullptr, y_ = nullptr;
  bool described_ = true;
};

// Handles of devices, and the algorithms that were found for shapes.
class Chosen {
 public:
  // For the current device. False where there is none.
  bool algorithm(const Product& product, const qwen1m_product8& a, lt::Handle& handle, lt::Algorithm& algorithm) {
    int device = 0;
    if (!product.is_described() || cudaGetDevice(&device) != cudaSuccess) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    lt::Handle& own = handles_[device];
    if (own == nullptr && library().create(&own) != lt::kSuccess) return false;
    handle = own;
    const Shape shape{device, a.x.rows, a.in_features, a.out_features, a.out_dtype};
    const auto known = algorithms_.find(shape);
    if (known != algorithms_.end()) {
      algorithm = known->second;
      return true;
    }
    if (!product.find(handle, algorithm)) return false;
    if (algorithms_.size() >= kMost) algorithms_.clear();
    algorithms_.emplace(shape, algorithm);
    return true;
  }

 private:
  using Shape = std::tuple<int, int64_t, int64_t, int64_t, int>;
  static constexpr size_t kMost = 1024;

  std::mutex mutex_;
  std::map<int, lt::Handle> handles_;
  std::map<Shape, lt::Algorithm> algorithms_;
};

Chosen& chosen() {
  static Chosen all;
  return all;
}

bool fits(const qwen1m_product8& a) {
  return a.weight.kind == QWEN1M_E4M3 && a.weight.rows == QWEN1M_ROWS8_BLOCK &&
         a.weight.columns == QWEN1M_ROWS8_BLOCK && a.in_features % QWEN1M_ROWS8_BLOCK == 0 &&
         a.out_features % QWEN1M_ROWS8_BLOCK == 0 && a.x.rows % QWEN1M_ROWS8_MULTIPLE == 0;
}

bool is_empty(const qwen1m_product8& a) { return a.x.rows == 0 || a.out_features == 0; }

// cudaErrorNotSupported where the library has none.
int product_of_library(const qwen1m_product8& a, void* workspace, cudaStream_t stream) {
  const void* scales = a.weight.scales;
  if (needs_gaps(a)) {
    void* with_gaps = static_cast<char*>(workspace) + kWorkspaceBytes;
    const size_t row = a.in_features / a.weight.columns * sizeof(float), pitch = padded_scales(a) * sizeof(float);
    const cudaError_t status = cudaMemcpy2DAsync(with_gaps, pitch, scales, row, row, a.out_features / a.weight.rows,
                                                 cudaMemcpyDeviceToDevice, stream);
    if (status != cudaSuccess) return status;
    scales = with_gaps;
  }
  const Product product(a, scales);
  lt::Handle handle = nullptr;
  lt::Algorithm algorithm{};
  if (!chosen().algorithm(product, a, handle, algorithm)) return cudaErrorNotSupported;
  return product.queue(handle, algorithm, a, workspace, stream) == lt::kSuccess ? cudaSuccess : cudaErrorUnknown;
}

bool asks_library(const qwen1m_product8& a) { return a.x.rows < QWEN1M_MANY_ROWS && library().has_block_scales(); }

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int64_t qwen1m_cuda_product8_workspace(const qwen1m_product8* a) {
  if (!asks_library(*a)) return 0;
  const int64_t scales = needs_gaps(*a) ? a->out_features / a->weight.rows * padded_scales(*a) : 0;
  return kWorkspaceBytes + scales * static_cast<int64_t>(sizeof(float));
}

int qwen1m_cuda_product8(const qwen1m_product8* a, void* workspace, qwen1m_stream stream) {
  if (!fits(*a)) return cudaErrorInvalidValue;
  if (!is_hopper()) return cudaErrorNotSupported;
  return with_half_type(a->out_dtype, [&](auto type) -> int {
    if (is_empty(*a)) return cudaSuccess;
    if (asks_library(*a)) {
      const int status = product_of_library(*a, workspace, as_stream(stream));
      if (status != cudaErrorNotSupported) return status;
    }
    return sm90::product8<decltype(type)>(*a, as_stream(stream));
  });
}

int qwen1m_cuda_gated_product8(const qwen1m_gated_product8* a, qwen1m_stream stream) {
  const qwen1m_product8& product = a->product;
  if (!fits(product) || product.out_features % (2 * QWEN1M_ROWS8_BLOCK) != 0 || a->out.rows != product.x.rows) {
    return cudaErrorInvalidValue;
  }
  if (!is_hopper()) return cudaErrorNotSupported;
  return is_empty(product) ? cudaSuccess : sm90::gated_product8(product, a->out, as_stream(stream));
}

int qwen1m_cuda_multiplies_rows8() { return is_hopper() ? 1 : 0; }
