//! The engine: numbers against oracles, kernels, cache, mixes of requests.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/adapters.rs"]
mod support;

use tunesmith::kernels::{KvForm, WeightForm};

mod adapted_products;
mod attention;
mod families;
mod guard_pages;
mod kernels;
mod kv_dtypes;
mod lora_dtypes;
mod parity;
mod quantized;
mod stories;

/// Every form of a packed weight.
const WEIGHT_FORMS: [WeightForm; 6] = [
    WeightForm::F32,
    WeightForm::F16,
    WeightForm::Bf16,
    WeightForm::Bf16Dot,
    WeightForm::Int8,
    WeightForm::Int4,
];

/// Every form of keys and values.
const KV_FORMS: [KvForm; 3] = [KvForm::F32, KvForm::Bf16, KvForm::Int8];
