//! FLOOR 1. The dozen tensor operations that a decoder needs; one file, one operation.
//!
//! Every operation decides by its data: where an input is tracked, candle records the operation
//! with its analytic backward pass; else only the fused forward runs. Both call the same kernels in
//! the same order, so a training forward is bit for bit the serving one. Activations are f32;
//! frozen weights are packed for the kernels and held inside an operation, so that no gradient of them
//! is ever computed.
//!
//! Knows tensors and kernels. Must never know layers, families, requests or text.

pub mod adapted_linear;
pub mod add;
pub mod attention;
pub mod cross_entropy;
pub mod dora;
pub mod dropout;
pub mod embedding;
pub mod gated_mlp;
pub mod in_place;
pub mod linear;
pub mod lora;
pub mod lora_dtype;
pub mod mean_row;
pub mod noise;
pub mod own_rows;
pub mod profile;
pub mod rms_norm;
pub mod rope;
pub mod seed;
pub mod served;
pub mod soft_cap;
pub mod storage;
pub mod values;
pub mod weight;

pub use crate::kernels::{keep_freed_memory, release_freed_memory};
