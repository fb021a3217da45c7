//! tunesmith fine-tunes an open language model with LoRA, proves that the tuned model beats the
//! base, and serves it behind OpenAI's HTTP interface.
//!
//! The modules are floors of one house; each may import only the ones below it
//! (`tests/architecture.rs` checks this). From the ground up:

pub mod publish;
pub mod telemetry;

pub mod hub;

pub mod kernels;

pub mod ops;

pub mod text;

pub mod model;

pub mod adapters;

pub mod data;

pub mod engine;

pub mod train;

pub mod eval;

pub mod jobs;

pub mod api;

pub mod cli;
