//! The engine: numbers against oracles, kernels, cache, mixes of requests.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/adapters.rs"]
mod support;

mod attention;
mod families;
mod guard_pages;
mod kernels;
mod kv_dtypes;
mod parity;
mod quantized;
mod stories;
