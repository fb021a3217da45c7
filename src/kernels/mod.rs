//! FLOOR 0. Slices in, slices out: the arithmetic of the decoder on the CPU.
//!
//! Knows vector instructions and threads. Must never know tensors, models or requests. All
//! `unsafe` of the crate is here.
//!
//! The arithmetic is written once (`product.rs`, `quant_product.rs`, `turned.rs`, `lora.rs`, `gemm.rs`,
//! `attention.rs`, `rows.rs`), generic over what sixteen lanes are (`simd.rs`); `portable.rs`, `avx2.rs` and `avx512.rs` say that for their instructions.
//!
//! Every output element is summed in an order that depends on its own inputs only, never on the
//! number of rows, the tile or the thread that computes it: a row of a batch is bit for bit the row
//! alone, and a training forward is bit for bit the serving one.
#![allow(unsafe_code)]

#[macro_use]
mod table;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16_rows;
mod gemm;
mod heap;
mod lora;
mod lora_shrink;
mod lora_sums;
mod pages;
mod panels;
mod pool;
mod portable;
mod product;
mod quant_product;
mod quant_rows;
mod quantize;
mod roofline;
mod row_tiles;
mod rows;
mod simd;
mod tanh;
mod threads;
mod turned;

pub use attention::{
    AttentionBackward, AttentionForward, AttentionShape, KvForm, KvPanel, KvPanelMut, KvPanels,
    KvSide, QuerySpan,
};
pub use gemm::MatmulJob;
pub use heap::{buffer, keep_freed_memory, release_freed_memory};
pub use lora::{LoraOutput, LoraSegment, add_lora, add_loras};
pub use panels::{PackedWeight, WeightForm};
pub use roofline::Roofline;
pub use rows::RmsNormGradient;
pub use simd::LANES;
pub use table::{Kernels, all, best};
pub use threads::{claim_threads, for_each_range, for_each_rows, for_each_rows_of_two};
pub use turned::{input_gradient, linear};
