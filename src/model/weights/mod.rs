//! Where weights come from: safetensors files, or a random start.

mod random;
mod safetensors;

pub(super) use random::RandomWeights;
pub(super) use safetensors::SafetensorsFolder;
