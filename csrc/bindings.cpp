// Every operator's schema on one page, and the checks at the edge: a kernel behind it sees only what it expects.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(bertkern, m) {
  m.def("cpu_isa() -> int");
  m.def("pack_linear(Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "pack_qlinear(Tensor weight_codes, Tensor weight_scale, Tensor? bias, float input_scale=0., "
      "int input_zero_point=0, float output_scale=0.) -> Tensor");
  m.def(
      "pack_sparse_linear(Tensor crow, Tensor col, Tensor values, SymInt n, SymInt k, Tensor? weight_scale, "
      "Tensor? bias, float input_scale=0., int input_zero_point=0, float output_scale=0., int form=0) -> Tensor");
  m.def(
      "pack_groupwise(Tensor codes, Tensor scale, Tensor? zero, Tensor bits, SymInt n, SymInt k, int axis, "
      "int group_size, Tensor? bias, ScalarType operand, float input_scale=0., int input_zero_point=0) -> Tensor");
  m.def("unpack_groupwise(Tensor packed, Tensor bits) -> Tensor");
  m.def("unpack_linear(Tensor packed) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor packed, SymInt out_features, int activation=0, Tensor? residual=None, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def("quantize_rows(Tensor x, float scale=0., int zero_point=0, bool unsigned=False) -> (Tensor, Tensor)");
  m.def(
      "qgemm(Tensor codes, Tensor scale, int zero_point, Tensor packed, SymInt out_features, int activation=0, "
      "Tensor? residual=None, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "qgemm_requantize(Tensor codes, Tensor scale, int zero_point, Tensor packed, SymInt out_features, "
      "int activation=0, float out_scale=0., int out_zero_point=0) -> (Tensor, Tensor)");
  // For benchmarks: the seconds of each of `calls` products into one output, without dispatch and allocation, with one
  // of the weights after the other.
  m.def(
      "qgemm_seconds(Tensor codes, Tensor scale, Tensor[] packed, SymInt out_features, int activation, bool "
      "requantize, "
      "ScalarType out_dtype, int calls) -> Tensor");
  m.def("add_layernorm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "embed(Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor weight, Tensor bias, float eps, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? key_counts=None, Tensor? bias=None, "
      "Tensor? head_mask=None, float scale=0., bool causal=False) -> Tensor");
  m.def(
      "qattention(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor cu_seqlens, "
      "Tensor? key_counts=None, Tensor? bias=None, Tensor? head_mask=None, float scale=0., bool causal=False, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "attention_requantize(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
      "Tensor cu_seqlens, Tensor? key_counts=None, Tensor? bias=None, Tensor? head_mask=None, float scale=0., "
      "bool causal=False, float out_scale=0., int out_zero_point=0) -> (Tensor, Tensor)");
  m.def(
      "encoder(Tensor x, Tensor? mask, Tensor? position_bias, Tensor[] linears, Tensor norms, int[] heads, "
      "int activation, float eps, bool keep_padding=False, bool all_hidden_states=False, bool empty_attends=False, "
      "bool exact_attention=False, Tensor? head_mask=None, bool packed=False) -> Tensor");
  m.def(
      "mobilebert_encoder(Tensor x, Tensor? mask, Tensor[] linears, Tensor norms, Tensor? eps, int[] heads, "
      "int bottleneck, int activation, bool keep_padding=False, bool all_hidden_states=False, "
      "bool empty_attends=False, bool exact_attention=False, Tensor? head_mask=None, "
      "bool packed=False) -> Tensor");
  m.def(
      "trigram_embed(Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor? packed, Tensor weight, Tensor bias, "
      "float? eps=None, bool trigram=True, ScalarType? out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bertkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&bertkern::ops::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(bertkern, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&bertkern::ops::pack_linear));
  m.impl("pack_qlinear", TORCH_BOX(&bertkern::ops::pack_qlinear));
  m.impl("pack_sparse_linear", TORCH_BOX(&bertkern::ops::pack_sparse_linear));
  m.impl("pack_groupwise", TORCH_BOX(&bertkern::ops::pack_groupwise));
  m.impl("unpack_groupwise", TORCH_BOX(&bertkern::ops::unpack_groupwise));
  m.impl("unpack_linear", TORCH_BOX(&bertkern::ops::unpack_linear));
  m.impl("linear", TORCH_BOX(&bertkern::ops::linear));
  m.impl("quantize_rows", TORCH_BOX(&bertkern::ops::quantize_rows));
  m.impl("qgemm", TORCH_BOX(&bertkern::ops::qgemm));
  m.impl("qgemm_requantize", TORCH_BOX(&bertkern::ops::qgemm_requantize));
  m.impl("qgemm_seconds", TORCH_BOX(&bertkern::ops::qgemm_seconds));
  m.impl("add_layernorm", TORCH_BOX(&bertkern::ops::add_layernorm));
  m.impl("embed", TORCH_BOX(&bertkern::ops::embed));
  m.impl("attention", TORCH_BOX(&bertkern::ops::attention));
  m.impl("qattention", TORCH_BOX(&bertkern::ops::qattention));
  m.impl("attention_requantize", TORCH_BOX(&bertkern::ops::attention_requantize));
  m.impl("encoder", TORCH_BOX(&bertkern::ops::encoder));
  m.impl("mobilebert_encoder", TORCH_BOX(&bertkern::ops::mobilebert_encoder));
  m.impl("trigram_embed", TORCH_BOX(&bertkern::ops::trigram_embed));
}
