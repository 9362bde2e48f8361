/* The layout of abi.h's structs as a table, which a test compares with abi.py. */
#include "abi.h"

#define STRUCT(type) {#type, 0, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(((type *)0)->field)}

const mpq_field *mpq_fields(void) {
  static const mpq_field fields[] = {
      STRUCT(mpq_weight), FIELD(mpq_weight, rows), FIELD(mpq_weight, cols), FIELD(mpq_weight, panel_bytes),
      FIELD(mpq_weight, bits), FIELD(mpq_weight, kind), FIELD(mpq_weight, offset), FIELD(mpq_weight, group),
      FIELD(mpq_weight, segment), FIELD(mpq_weight, segments), FIELD(mpq_weight, tiles), FIELD(mpq_weight, scale_kind),
      FIELD(mpq_weight, scale_bytes), FIELD(mpq_weight, row_scales), FIELD(mpq_weight, zeros),
      FIELD(mpq_weight, bf16_terms), FIELD(mpq_weight, factor), FIELD(mpq_weight, low), FIELD(mpq_weight, high),
      FIELD(mpq_weight, low_matrix), FIELD(mpq_weight, high_matrix), FIELD(mpq_weight, high_flip),
      FIELD(mpq_weight, normal_mask),
      STRUCT(mpq_call), FIELD(mpq_call, panels), FIELD(mpq_call, tensor_scale), FIELD(mpq_call, x),
      FIELD(mpq_call, tokens), FIELD(mpq_call, stride), FIELD(mpq_call, bias), FIELD(mpq_call, out),
      FIELD(mpq_call, out_stride), FIELD(mpq_call, places), FIELD(mpq_call, x_is_bf16), FIELD(mpq_call, bias_is_bf16),
      FIELD(mpq_call, out_is_bf16), FIELD(mpq_call, planes), FIELD(mpq_call, threads), FIELD(mpq_call, level),
      FIELD(mpq_call, skipped), FIELD(mpq_call, parallel),
      STRUCT(mpq_images), FIELD(mpq_images, channels), FIELD(mpq_images, size), FIELD(mpq_images, kernel),
      FIELD(mpq_images, out), FIELD(mpq_images, stride), FIELD(mpq_images, padding), FIELD(mpq_images, dilation),
      FIELD(mpq_images, steps),
      STRUCT(mpq_part), FIELD(mpq_part, weight), FIELD(mpq_part, panels), FIELD(mpq_part, tensor_scale),
      FIELD(mpq_part, places),
      STRUCT(mpq_layer), FIELD(mpq_layer, parts), FIELD(mpq_layer, bias), FIELD(mpq_layer, count),
      FIELD(mpq_layer, bias_is_bf16), FIELD(mpq_layer, planes),
      STRUCT(mpq_block), FIELD(mpq_block, q), FIELD(mpq_block, k), FIELD(mpq_block, v), FIELD(mpq_block, o),
      FIELD(mpq_block, gate), FIELD(mpq_block, up), FIELD(mpq_block, down), FIELD(mpq_block, attention_norm),
      FIELD(mpq_block, mlp_norm),
      STRUCT(mpq_decoder), FIELD(mpq_decoder, blocks), FIELD(mpq_decoder, count), FIELD(mpq_decoder, width),
      FIELD(mpq_decoder, hidden), FIELD(mpq_decoder, heads), FIELD(mpq_decoder, key_heads),
      FIELD(mpq_decoder, head_width), FIELD(mpq_decoder, epsilon), FIELD(mpq_decoder, is_bf16),
      FIELD(mpq_decoder, level), FIELD(mpq_decoder, parallel), FIELD(mpq_decoder, head), FIELD(mpq_decoder, norm),
      STRUCT(mpq_vectors), FIELD(mpq_vectors, weight), FIELD(mpq_vectors, width), FIELD(mpq_vectors, element),
      FIELD(mpq_vectors, element_bytes), FIELD(mpq_vectors, group), FIELD(mpq_vectors, scale_kind),
      FIELD(mpq_vectors, scale_bytes), FIELD(mpq_vectors, has_minimum), FIELD(mpq_vectors, by_column),
      FIELD(mpq_vectors, newest),
      STRUCT(mpq_slab), FIELD(mpq_slab, data), FIELD(mpq_slab, blocks), FIELD(mpq_slab, head_bytes),
      STRUCT(mpq_sequence), FIELD(mpq_sequence, q), FIELD(mpq_sequence, out), FIELD(mpq_sequence, keys),
      FIELD(mpq_sequence, values), FIELD(mpq_sequence, length),
      STRUCT(mpq_attention), FIELD(mpq_attention, keys), FIELD(mpq_attention, values), FIELD(mpq_attention, sequences),
      FIELD(mpq_attention, count), FIELD(mpq_attention, heads), FIELD(mpq_attention, key_heads),
      FIELD(mpq_attention, window), FIELD(mpq_attention, sinks), FIELD(mpq_attention, scale),
      FIELD(mpq_attention, planes), FIELD(mpq_attention, threads), FIELD(mpq_attention, level),
      FIELD(mpq_attention, parallel),
      STRUCT(mpq_token), FIELD(mpq_token, x), FIELD(mpq_token, cos), FIELD(mpq_token, sin), FIELD(mpq_token, logits),
      FIELD(mpq_token, caches), FIELD(mpq_token, position), FIELD(mpq_token, threads),
      STRUCT(mpq_append), FIELD(mpq_append, vectors), FIELD(mpq_append, slabs), FIELD(mpq_append, x),
      FIELD(mpq_append, head_stride), FIELD(mpq_append, token_stride), FIELD(mpq_append, heads),
      FIELD(mpq_append, tokens), FIELD(mpq_append, position), FIELD(mpq_append, values), FIELD(mpq_append, threads),
      FIELD(mpq_append, parallel),
      STRUCT(mpq_block_cache), FIELD(mpq_block_cache, keys), FIELD(mpq_block_cache, values),
      FIELD(mpq_block_cache, key_slabs), FIELD(mpq_block_cache, value_slabs),
      {NULL, 0, 0},
  };
  return fields;
}
