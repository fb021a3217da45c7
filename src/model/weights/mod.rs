//! Where weights come from: safetensors files, or a random start.

mod parameters;
mod random;
mod safetensors;

pub(super) use parameters::{Parameters, Source};
pub(super) use random::RandomWeights;
pub(super) use safetensors::SafetensorsFolder;
