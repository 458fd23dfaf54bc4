#include "cuda/check.h"

#include <dlfcn.h>

#include "cuda_facts.h"

namespace bertkern::ops {

namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// It lives in torch's CUDA library, which need not be there when this one is built or loaded.
CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  require(found, "bertkern: this torch has no CUDA.");
  return found;
}

}  // namespace

OnDevice::OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
  void* stream = nullptr;
  require(current_stream()(t.get_device_index(), &stream) == 0, "bertkern: torch has no current CUDA stream.");
  stream_ = static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice)
    require(false, op, ": this build has no code for the GPU's architecture. Build with TORCH_CUDA_ARCH_LIST for it.");
  require(false, op, ": CUDA says: ", cudaGetErrorString(error), ".");
}

}  // namespace bertkern::ops

// Found in the file, without loading it, by its first word (bertkern/_cuda.py).
extern "C" {
extern const char bertkern_cuda_facts[];
__attribute__((used)) const char bertkern_cuda_facts[] = BERTKERN_CUDA_FACTS;
}
