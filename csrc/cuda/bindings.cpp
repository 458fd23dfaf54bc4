// The operators of NVIDIA GPUs on one page: schemas that only they have, and what runs for CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(bertkern, m) {
  m.def("quantize_codes(Tensor x, Tensor? live, float step, int zero_point) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layernorm_live(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? live, float eps) -> Tensor");
  m.def(
      "add_layernorm_codes(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? live, float eps, "
      "float step, int zero_point) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_qgemm(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
      "Tensor? weight_sums, Tensor? bias, Tensor? residual, Tensor? count, int activation, float output_scale, "
      "float out_scale, int out_zero_point, ScalarType out_dtype) -> (Tensor, Tensor)");
  // The pattern is that of bertkern.ops.block_sparse.block_index.
  m.def(
      "block_sparse_linear_mma(Tensor x, Tensor values, Tensor? bias, Tensor index, SymInt n, int activation=0, "
      "Tensor? residual=None, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "block_sparse_linear_int8_mma(Tensor codes, Tensor scale, Tensor? zero, Tensor values, Tensor weight_scale, "
      "Tensor? column_sum, Tensor? bias, Tensor index, SymInt n, int activation=0, Tensor? residual=None, "
      "ScalarType? out_dtype=None, Tensor? count=None) -> Tensor");
  // The planes are those of bertkern.ops.groupwise_planes.pack_for_triton.
  m.def(
      "groupwise_linear_mma(Tensor x, Tensor[] codes, Tensor[] members, Tensor scale, Tensor? shift, Tensor? bias, "
      "Tensor? residual, int[] bits, int group, int activation=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "attention_cuda_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? key_counts, Tensor? numbers, "
      "Tensor? factors, Tensor? bias, SymInt max_length, bool causal, float scale) -> (Tensor out, Tensor statistics)");
}

STABLE_TORCH_LIBRARY_IMPL(bertkern, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&bertkern::ops::cuda::quantize_rows));
  m.impl("quantize_codes", TORCH_BOX(&bertkern::ops::cuda::quantize_codes));
  m.impl("add_layernorm", TORCH_BOX(&bertkern::ops::cuda::add_layernorm));
  m.impl("add_layernorm_live", TORCH_BOX(&bertkern::ops::cuda::add_layernorm_live));
  m.impl("add_layernorm_codes", TORCH_BOX(&bertkern::ops::cuda::add_layernorm_codes));
  m.impl("embed", TORCH_BOX(&bertkern::ops::cuda::embed));
  m.impl("cuda_qgemm", TORCH_BOX(&bertkern::ops::cuda::cuda_qgemm));
  m.impl("block_sparse_linear_mma", TORCH_BOX(&bertkern::ops::cuda::block_sparse_linear_mma));
  m.impl("block_sparse_linear_int8_mma", TORCH_BOX(&bertkern::ops::cuda::block_sparse_linear_int8_mma));
  m.impl("groupwise_linear_mma", TORCH_BOX(&bertkern::ops::cuda::groupwise_linear_mma));
  m.impl("attention_cuda_forward", TORCH_BOX(&bertkern::ops::cuda::attention_cuda_forward));
}
